//! Changes of the guest's CPUs against those of the host: the body of `PUT /cpu-config`, the custom CPU
//! template of Firecracker.

mod told;

use std::fmt;

use serde::de::{Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::arch;
use crate::error::{Error, Result};
use crate::platform::{CpuChanges, CpuidModifier, CpuidRegister, FeatureModifier, RegisterModifier};

/// More changes than this are refused: each is compared with all CPUID entries of the host, or is two calls of KVM for
/// each CPU, and a config file has room for tens of thousands. A processor has some hundred registers of CPUID.
const MODIFIERS_MAX: usize = 1024;

/// How the CPUs that the guest sees differ from those that the host's KVM supports. An empty body changes
/// nothing. Unknown fields of the changes in the lists are ignored, as Firecracker does.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "CpuConfig"))]
#[serde(deny_unknown_fields, expecting = "struct CustomCpuTemplate")]
pub struct CpuConfig {
    /// Changes of CPUID (x86_64).
    pub cpuid_modifiers: Option<Vec<CpuidLeaf>>,
    /// Capabilities of KVM by their numbers (`"56"`), which this host's KVM must have. With `!` in front (`"!56"`) the
    /// start does not ask for one; Alula asks for none but those that it uses, so this changes nothing.
    kvm_capabilities: Option<Vec<Capability>>,
    /// Changes of model-specific registers (x86_64), which are part of a CPU's state for KVM.
    msr_modifiers: Option<Vec<MsrChange>>,
    /// Changes of registers as KVM numbers them (aarch64; KVM api, KVM_GET_ONE_REG).
    reg_modifiers: Option<Vec<ArmRegisterChange>>,
    /// Features that KVM initialises the CPUs with, or without (aarch64; KVM api, KVM_ARM_VCPU_INIT): scalable vectors and
    /// pointer authentication, beside what KVM prefers.
    vcpu_features: Option<Vec<CpuFeature>>,
}

/// Changes of one leaf of CPUID.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "CpuidLeafModifier"))]
#[serde(expecting = "struct CpuidLeafModifier")]
pub struct CpuidLeaf {
    /// The leaf (EAX): a text such as `0x80000001`.
    leaf: Number<32>,
    /// The subleaf (ECX): a text such as `0x0`.
    subleaf: Number<32>,
    /// KVM's flags of the entry. An entry is found by its leaf and subleaf, whatever its flags are.
    flags: u32,
    /// The changes, register by register.
    modifiers: Vec<RegisterChange>,
}

/// A change of one register of a leaf.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "CpuidRegisterModifier"))]
#[serde(expecting = "struct CpuidRegisterModifier")]
struct RegisterChange {
    /// Which register.
    register: Register,
    /// Its bits, the highest first, after `0b`: `0` and `1` are set so, `x` is left as the host has it. What
    /// is not written in front is `x`; `_` separates.
    bitmap: Bits<32>,
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

/// A change of a model-specific register.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "MsrModifier"))]
#[serde(expecting = "struct MsrModifier")]
struct MsrChange {
    /// The register's number: a text such as `0x10a`.
    addr: Number<32>,
    /// The register's bits, as those of CPUID; at most 64.
    bitmap: Bits<64>,
}

/// A change of a register of aarch64.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "ArmRegisterModifier"))]
#[serde(expecting = "struct ArmRegisterModifier")]
struct ArmRegisterChange {
    /// KVM's number of the register: a text such as `0x603000000013c020`.
    addr: Number<64>,
    /// The register's bits, as those of CPUID; at most as many as the register has.
    bitmap: Bits<128>,
}

/// A change of a set of CPU features.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "VcpuFeatures"))]
struct CpuFeature {
    /// Which word of features; all that there are today are in word 0.
    index: u32,
    /// The word's bits, as those of CPUID.
    bitmap: Bits<32>,
}

impl CpuConfig {
    /// A body that makes sense in itself, as JSON.
    pub(super) const EXAMPLE: &'static str = "{}";

    /// Whether it makes sense on this architecture, whatever the host can do.
    pub fn check(&self) -> Result<()> {
        let leaves = self.cpuid_modifiers.as_deref().unwrap_or_default();
        let count_of = |length: Option<usize>| length.unwrap_or(0);
        let of_leaves = leaves.iter().map(|leaf| leaf.modifiers.len()).sum::<usize>();
        let of_msrs = count_of(self.msr_modifiers.as_ref().map(Vec::len));
        let of_registers = count_of(self.reg_modifiers.as_ref().map(Vec::len));
        let of_capabilities = count_of(self.kvm_capabilities.as_ref().map(Vec::len));
        let of_features = count_of(self.vcpu_features.as_ref().map(Vec::len));
        let foreign = [
            ("cpuid_modifiers", arch::HAS_CPUID, leaves.len(), "CPUID"),
            ("msr_modifiers", arch::HAS_CPUID, of_msrs, "model-specific registers"),
            ("reg_modifiers", !arch::HAS_CPUID, of_registers, "registers of aarch64"),
            ("vcpu_features", !arch::HAS_CPUID, of_features, "features of aarch64"),
        ];
        for (field, has_them, count, what) in foreign {
            if !has_them && count > 0 {
                return Err(Error::config(format!("`{field}`: {} has no {what}", arch::NAME)));
            }
        }
        let lists = [
            ("cpuid_modifiers", of_leaves, "registers"),
            ("msr_modifiers", of_msrs, "registers"),
            ("reg_modifiers", of_registers, "registers"),
            ("vcpu_features", of_features, "features"),
            ("kvm_capabilities", of_capabilities, "capabilities"),
        ];
        match lists.into_iter().find(|(_, count, _)| *count > MODIFIERS_MAX) {
            Some((field, count, what)) => {
                Err(Error::config(format!("`{field}` has {count} {what}: at most {MODIFIERS_MAX} are taken")))
            }
            None => arch::CpuFeatures::new(&self.features()).map(drop),
        }
    }

    fn features(&self) -> Vec<FeatureModifier> {
        let modifier = |CpuFeature { index, bitmap }: &CpuFeature| FeatureModifier {
            index: *index,
            mask: bitmap.mask as u32,
            value: bitmap.value as u32,
        };
        self.vcpu_features.iter().flatten().map(modifier).collect()
    }

    /// All changes, in their order.
    pub fn changes(&self) -> CpuChanges {
        let msr = |change: &MsrChange| change.bitmap.of_register(change.addr.0);
        let register = |change: &ArmRegisterChange| change.bitmap.of_register(change.addr.0);
        let asked = |capability: &Capability| capability.is_needed.then_some(capability.number);
        CpuChanges {
            vendor: None,
            capabilities: self.kvm_capabilities.iter().flatten().filter_map(asked).collect(),
            cpuid: self.cpuid(),
            features: self.features(),
            registers: (self.msr_modifiers.iter().flatten().map(msr))
                .chain(self.reg_modifiers.iter().flatten().map(register))
                .collect(),
        }
    }

    /// The changes of CPUID, one register after the other.
    fn cpuid(&self) -> Vec<CpuidModifier> {
        let of_leaf = |leaf: &CpuidLeaf| {
            let (function, index) = (leaf.leaf.0 as u32, leaf.subleaf.0 as u32);
            let modifier = move |change: &RegisterChange| CpuidModifier {
                leaf: function,
                subleaf: index,
                register: match change.register {
                    Register::Eax => CpuidRegister::Eax,
                    Register::Ebx => CpuidRegister::Ebx,
                    Register::Ecx => CpuidRegister::Ecx,
                    Register::Edx => CpuidRegister::Edx,
                },
                mask: change.bitmap.mask as u32,
                value: change.bitmap.value as u32,
            };
            leaf.modifiers.iter().map(modifier).collect::<Vec<_>>()
        };
        self.cpuid_modifiers.iter().flatten().flat_map(of_leaf).collect()
    }
}

/// A number of at most so many bits as text: hexadecimal after `0x`, binary after `0b`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Number<const BITS: u32>(u64);

impl<const BITS: u32> Number<BITS> {
    fn parse(text: &str) -> Option<Self> {
        let (digits, radix) = match text.strip_prefix("0x") {
            Some(digits) => (digits, 16),
            None => (text.strip_prefix("0b")?, 2),
        };
        // `from_str_radix` takes a sign.
        let all_digits = digits.chars().all(|digit| digit.is_digit(radix));
        let number = u64::from_str_radix(digits, radix).ok().filter(|_| all_digits)?;
        (number.checked_shr(BITS).unwrap_or(0) == 0).then_some(Self(number))
    }
}

/// The bits of a register that are changed (`mask`), and what they become (`value`, 0 elsewhere); no others than the
/// lowest `BITS`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bits<const BITS: u32> {
    mask: u128,
    value: u128,
}

impl<const BITS: u32> Bits<BITS> {
    fn parse(text: &str) -> Option<Self> {
        let (mut mask, mut value, mut count) = (0u128, 0u128, 0);
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
        (1..=BITS).contains(&count).then_some(Self { mask, value })
    }

    fn of_register(&self, number: u64) -> RegisterModifier {
        RegisterModifier { number, mask: self.mask, value: self.value }
    }
}

/// A capability of KVM, and whether KVM must have it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Capability {
    number: u32,
    is_needed: bool,
}

impl Capability {
    fn parse(text: &str) -> Option<Self> {
        let (digits, is_needed) = match text.strip_prefix('!') {
            Some(digits) => (digits, false),
            None => (text, true),
        };
        let all_digits = digits.chars().all(|digit| digit.is_ascii_digit());
        let number = digits.parse().ok().filter(|_| all_digits)?;
        Some(Self { number, is_needed })
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

impl<'de, const BITS: u32> Deserialize<'de> for Number<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = match BITS {
            32 => "a text with a number of 32 bits, such as \"0x80000001\"",
            _ => "a text with a number of 64 bits, such as \"0x603000000013c020\"",
        };
        deserializer.deserialize_str(Text { expected, parse: Self::parse })
    }
}

impl<const BITS: u32> Serialize for Number<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

impl<'de, const BITS: u32> Deserialize<'de> for Bits<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = match BITS {
            32 => "a text with at most 32 of `0`, `1` and `x` after `0b`, such as \"0bxx10\"",
            64 => "a text with at most 64 of `0`, `1` and `x` after `0b`, such as \"0bxx10\"",
            _ => "a text with at most 128 of `0`, `1` and `x` after `0b`, such as \"0bxx10\"",
        };
        deserializer.deserialize_str(Text { expected, parse: Self::parse })
    }
}

impl<const BITS: u32> Serialize for Bits<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let letter = |bit: u32| match (self.mask >> bit & 1, self.value >> bit & 1) {
            (0, _) => 'x',
            (_, 0) => '0',
            _ => '1',
        };
        let letters: String = (0..BITS).rev().map(letter).collect();
        serializer.collect_str(&format_args!("0b{letters}"))
    }
}

impl<'de> Deserialize<'de> for Capability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = "a text with the number of a capability, such as \"56\" or \"!56\"";
        deserializer.deserialize_str(Text { expected, parse: Self::parse })
    }
}

impl Serialize for Capability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let sign = if self.is_needed { "" } else { "!" };
        serializer.collect_str(&format_args!("{sign}{}", self.number))
    }
}

/// These are texts in JSON.
#[cfg(test)]
mod schema {
    use std::borrow::Cow;

    use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

    macro_rules! text {
        ($name:literal, $type:ty $(, $bits:ident)?) => {
            impl $(<const $bits: u32>)? JsonSchema for $type {
                fn schema_name() -> Cow<'static, str> {
                    $name.into()
                }
                fn inline_schema() -> bool {
                    true
                }
                fn json_schema(_: &mut SchemaGenerator) -> Schema {
                    json_schema!({ "type": "string" })
                }
            }
        };
    }
    text!("Number", super::Number<BITS>, BITS);
    text!("Bits", super::Bits<BITS>, BITS);
    text!("Capability", super::Capability);
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

    /// A change of so many bits of a register.
    fn register(field: &str, bits: usize) -> String {
        format!(r#"{{"{field}":[{{"addr":"0x10","bitmap":"0b{}"}}]}}"#, "1".repeat(bits))
    }

    #[test]
    fn registers_and_capabilities_are_those_that_the_text_names() {
        let (field, bits) = if arch::HAS_CPUID { ("msr_modifiers", 64) } else { ("reg_modifiers", 128) };
        let text = register(field, bits).replacen('{', r#"{"kvm_capabilities":["7","!56"],"#, 1);
        let config = parse(&text).unwrap();
        let all = u128::MAX >> (u128::BITS as usize - bits);
        let expected = RegisterModifier { number: 0x10, mask: all, value: all };
        let changes = config.changes();
        assert_eq!((&changes.registers[..], &changes.capabilities[..]), (&[expected][..], &[7][..]));
        let told = serde_json::to_string(&config).unwrap();
        assert_eq!(parse(&told).unwrap(), config, "what is told can be given: {told}");
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
    fn unknown_fields_are_ignored_inside_the_lists_alone() {
        let leaf = leaf("0x1", "0b1").replace(r#""flags":1,"#, r#""flags":1,"x":1,"#);
        let leaf = leaf.replace(r#""register":"ecx","#, r#""x":[],"register":"ecx","#);
        for text in [
            leaf,
            r#"{"msr_modifiers":[{"addr":"0x10","bitmap":"0b1","x":1}]}"#.to_owned(),
            r#"{"reg_modifiers":[{"addr":"0x10","bitmap":"0b1","x":null}]}"#.to_owned(),
            r#"{"vcpu_features":[{"index":0,"bitmap":"0b1","x":{}}]}"#.to_owned(),
        ] {
            serde_json::from_str::<CpuConfig>(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        }
        assert!(parse(r#"{"msr_modifiers":[],"x":1}"#).unwrap_err().contains("unknown field `x`"));
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
            (
                r#"{"msr_modifiers":[{"addr":"0x100000000","bitmap":"0b1"}]}"#.to_owned(),
                "a number of 32 bits",
            ),
            (r#"{"reg_modifiers":[{"addr":"0x10000000000000000","bitmap":"0b1"}]}"#.to_owned(), "of 64 bits"),
            (register("msr_modifiers", 65), "at most 64 of `0`, `1` and `x`"),
            (register("reg_modifiers", 129), "at most 128 of `0`, `1` and `x`"),
            (register(if arch::HAS_CPUID { "reg_modifiers" } else { "msr_modifiers" }, 1), "_modifiers`: "),
            (r#"{"kvm_capabilities":["+56"]}"#.to_owned(), "the number of a capability"),
            (r#"{"kvm_capabilities":["!!56"]}"#.to_owned(), "the number of a capability"),
            (r#"{"kvm_capabilities":[""]}"#.to_owned(), "the number of a capability"),
            (r#"{"kvm_capabilities":["4294967296"]}"#.to_owned(), "the number of a capability"),
            (r#"{"vcpu_features":[{"index":0,"bitmap":"0b1"}]}"#.to_owned(), "`vcpu_features`: "),
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
