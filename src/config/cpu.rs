//! Changes of the guest's CPUs against those of the host: the body of `PUT /cpu-config`, the custom CPU
//! template of Firecracker.

use std::fmt;

use serde::de::{Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::arch;
use crate::error::{Error, Result};
use crate::platform::{CpuidModifier, CpuidRegister};

/// More changes than this are refused: each is compared with all CPUID entries of the host, and a config file
/// has room for tens of thousands. A processor has some hundred registers of CPUID.
const MODIFIERS_MAX: usize = 1024;

/// How the CPUs that the guest sees differ from those that the host's KVM supports. An empty body changes
/// nothing.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "CpuConfig"))]
#[serde(deny_unknown_fields, expecting = "struct CustomCpuTemplate")]
pub struct CpuConfig {
    /// Changes of CPUID (x86_64).
    pub cpuid_modifiers: Option<Vec<CpuidLeaf>>,
    /// Not implemented yet, except an empty list: capabilities of KVM, switched off or asked for.
    kvm_capabilities: Option<Vec<String>>,
    /// Not implemented yet, except an empty list: model-specific registers (x86_64).
    msr_modifiers: Option<Vec<RegisterModifier>>,
    /// Not implemented yet, except an empty list: registers (aarch64).
    reg_modifiers: Option<Vec<RegisterModifier>>,
    /// Not implemented yet, except an empty list: features of the CPUs (aarch64).
    vcpu_features: Option<Vec<CpuFeature>>,
}

/// Changes of one leaf of CPUID.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "CpuidLeafModifier"))]
#[serde(deny_unknown_fields, expecting = "struct CpuidLeafModifier")]
pub struct CpuidLeaf {
    /// The leaf (EAX): a text such as `0x80000001`.
    leaf: Number,
    /// The subleaf (ECX): a text such as `0x0`.
    subleaf: Number,
    /// KVM's flags of the entry. An entry is found by its leaf and subleaf, whatever its flags are.
    flags: u32,
    /// The changes, register by register.
    modifiers: Vec<RegisterChange>,
}

/// A change of one register of a leaf.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "CpuidRegisterModifier"))]
#[serde(deny_unknown_fields, expecting = "struct CpuidRegisterModifier")]
struct RegisterChange {
    /// Which register.
    register: Register,
    /// Its bits, the highest first, after `0b`: `0` and `1` are set so, `x` is left as the host has it. What
    /// is not written in front is `x`; `_` separates.
    bitmap: Bits,
}

/// A register that CPUID answers in.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "CpuidRegister"))]
#[serde(rename_all = "lowercase")]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change of a register that has an address.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct RegisterModifier {
    /// The register's address or id.
    addr: String,
    /// Its bits.
    bitmap: String,
}

/// A change of a set of CPU features.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "VcpuFeatures"))]
#[serde(deny_unknown_fields)]
struct CpuFeature {
    /// Which set.
    index: u32,
    /// Its bits.
    bitmap: String,
}

impl CpuConfig {
    /// A body that makes sense in itself, as JSON.
    pub(super) const EXAMPLE: &'static str = "{}";

    /// Whether it makes sense on this architecture, whatever the host can do.
    pub fn check(&self) -> Result<()> {
        let lists = [
            ("kvm_capabilities", self.kvm_capabilities.as_ref().map(Vec::len)),
            ("msr_modifiers", self.msr_modifiers.as_ref().map(Vec::len)),
            ("reg_modifiers", self.reg_modifiers.as_ref().map(Vec::len)),
            ("vcpu_features", self.vcpu_features.as_ref().map(Vec::len)),
        ];
        if let Some((field, _)) = lists.into_iter().find(|(_, length)| length.is_some_and(|it| it > 0)) {
            return Err(Error::config(format!("`{field}` is not implemented yet: leave it out")));
        }
        let leaves = self.cpuid_modifiers.as_deref().unwrap_or_default();
        if !arch::HAS_CPUID && !leaves.is_empty() {
            return Err(Error::config(format!("`cpuid_modifiers`: {} has no CPUID", arch::NAME)));
        }
        let count = leaves.iter().map(|leaf| leaf.modifiers.len()).sum::<usize>();
        if count > MODIFIERS_MAX {
            let reason =
                format!("`cpuid_modifiers` has {count} registers: at most {MODIFIERS_MAX} are taken");
            return Err(Error::config(reason));
        }
        Ok(())
    }

    /// The changes of CPUID, one register after the other.
    pub fn cpuid(&self) -> Vec<CpuidModifier> {
        let of_leaf = |leaf: &CpuidLeaf| {
            let (function, index) = (leaf.leaf.0, leaf.subleaf.0);
            let modifier = move |change: &RegisterChange| CpuidModifier {
                leaf: function,
                subleaf: index,
                register: match change.register {
                    Register::Eax => CpuidRegister::Eax,
                    Register::Ebx => CpuidRegister::Ebx,
                    Register::Ecx => CpuidRegister::Ecx,
                    Register::Edx => CpuidRegister::Edx,
                },
                mask: change.bitmap.mask,
                value: change.bitmap.value,
            };
            leaf.modifiers.iter().map(modifier).collect::<Vec<_>>()
        };
        self.cpuid_modifiers.iter().flatten().flat_map(of_leaf).collect()
    }
}

/// A number of 32 bits as text: hexadecimal after `0x`, binary after `0b`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Number(u32);

impl Number {
    fn parse(text: &str) -> Option<Self> {
        let (digits, radix) = match text.strip_prefix("0x") {
            Some(digits) => (digits, 16),
            None => (text.strip_prefix("0b")?, 2),
        };
        // `from_str_radix` takes a sign.
        let all_digits = digits.chars().all(|digit| digit.is_digit(radix));
        all_digits.then(|| u32::from_str_radix(digits, radix).ok().map(Self))?
    }
}

/// The bits of a register that are changed (`mask`), and what they become (`value`, 0 elsewhere).
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bits {
    mask: u32,
    value: u32,
}

impl Bits {
    fn parse(text: &str) -> Option<Self> {
        let (mut mask, mut value, mut count) = (0u32, 0u32, 0);
        for letter in text.strip_prefix("0b")?.chars().filter(|letter| *letter != '_') {
            let (is_changed, bit) = match letter {
                '0' => (1, 0),
                '1' => (1, 1),
                'x' => (0, 0),
                _ => return None,
            };
            (mask, value) = (mask << 1 | is_changed, value << 1 | bit);
            count += 1;
        }
        (1..=u32::BITS).contains(&count).then_some(Self { mask, value })
    }
}

/// Reads a text by a function that knows whether it makes sense.
struct Text<T> {
    expected: &'static str,
    parse: fn(&str) -> Option<T>,
}

impl<T> Visitor<'_> for Text<T> {
    type Value = T;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }
    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = "a text with a number of 32 bits, such as \"0x80000001\"";
        deserializer.deserialize_str(Text { expected, parse: Self::parse })
    }
}

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Bits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = "a text with at most 32 of `0`, `1` and `x` after `0b`, such as \"0bxx10\"";
        deserializer.deserialize_str(Text { expected, parse: Self::parse })
    }
}

impl Serialize for Bits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let letter = |bit: u32| match (self.mask >> bit & 1, self.value >> bit & 1) {
            (0, _) => 'x',
            (_, 0) => '0',
            _ => '1',
        };
        let letters: String = (0..u32::BITS).rev().map(letter).collect();
        serializer.collect_str(&format_args!("0b{letters}"))
    }
}

/// Both are texts in JSON.
#[cfg(test)]
mod schema {
    use std::borrow::Cow;

    use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

    macro_rules! text {
        ($($name:ident)*) => {
            $(impl JsonSchema for super::$name {
                fn schema_name() -> Cow<'static, str> {
                    stringify!($name).into()
                }
                fn inline_schema() -> bool {
                    true
                }
                fn json_schema(_: &mut SchemaGenerator) -> Schema {
                    json_schema!({ "type": "string" })
                }
            })*
        };
    }
    text!(Number Bits);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<CpuConfig, String> {
        let config: CpuConfig = serde_json::from_str(text).map_err(|error| error.to_string())?;
        config.check().map(|()| config).map_err(|error| error.to_string())
    }

    fn leaf(leaf: &str, bitmap: &str) -> String {
        format!(
            r#"{{"cpuid_modifiers":[{{"leaf":"{leaf}","subleaf":"0b1","flags":1,
            "modifiers":[{{"register":"ecx","bitmap":"{bitmap}"}}]}}]}}"#
        )
    }

    #[test]
    fn bits_are_those_that_the_text_names() {
        let config = serde_json::from_str::<CpuConfig>(&leaf("0x80000001", "0b1x_0x")).unwrap();
        let expected = CpuidModifier {
            leaf: 0x8000_0001,
            subleaf: 1,
            register: CpuidRegister::Ecx,
            mask: 0b1010,
            value: 0b1000,
        };
        assert_eq!(config.cpuid(), [expected]);
        let told = serde_json::to_string(&config).unwrap();
        assert!(told.contains(&format!(r#""bitmap":"0b{}1x0x""#, "x".repeat(28))), "{told}");
        assert_eq!(serde_json::from_str::<CpuConfig>(&told).unwrap(), config, "what is told can be given");
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_its_name() {
        for (text, expected) in [
            (leaf("1", "0b1"), "expected a text with a number of 32 bits"),
            (leaf("0x", "0b1"), "invalid value"),
            (leaf("0x+1", "0b1"), "invalid value"),
            (leaf("0x100000000", "0b1"), "invalid value"),
            (leaf("0x1", "0b"), "at most 32 of `0`, `1` and `x`"),
            (leaf("0x1", "0b2"), "invalid value"),
            (leaf("0x1", &format!("0b{}", "x".repeat(33))), "invalid value"),
            (r#"{"msr_modifiers":[{"addr":"0x1","bitmap":"0b1"}]}"#.to_owned(), "`msr_modifiers` is not"),
            (r#"{"kvm_capabilities":["!56"]}"#.to_owned(), "`kvm_capabilities` is not implemented"),
            (r#"{"vcpu_features":[{"index":0,"bitmap":"0b1"}]}"#.to_owned(), "`vcpu_features` is not"),
            (r#"{"cpuid":[]}"#.to_owned(), "unknown field `cpuid`"),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        for text in ["{}", r#"{"cpuid_modifiers":null,"msr_modifiers":[],"reg_modifiers":null}"#] {
            assert!(parse(text).is_ok_and(|config| config.cpuid().is_empty()));
        }
        assert_eq!(parse(&leaf("0x1", "0b1")).is_ok(), arch::HAS_CPUID);
        let many = leaf("0x1", "0b1").replace(
            r#"{"register":"ecx","bitmap":"0b1"}"#,
            &[r#"{"register":"ecx","bitmap":"0b1"}"#; MODIFIERS_MAX + 1].join(","),
        );
        assert!(parse(&many).is_err());
    }
}
