//! Ethernet addresses.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An Ethernet address, written `aa:bb:cc:dd:ee:ff`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address of one interface; the error says why `bytes` are none.
    pub fn new(bytes: [u8; 6]) -> Result<Self, String> {
        let mac = Self(bytes);
        match bytes[0] & 1 {
            0 => Ok(mac),
            _ => Err(format!("`{mac}` is a group's MAC address, an interface needs its own")),
        }
    }

    /// A locally administered address that is always the same for the same names.
    pub fn derived(id: &str, iface_id: &str) -> Self {
        // FNV-1a, 64 bits.
        let bytes = id.bytes().chain([0]).chain(iface_id.bytes());
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let [_, _, a, b, c, d, e, f] = hash.to_be_bytes();
        // Unicast, locally administered.
        Self([a & 0xfc | 2, b, c, d, e, f])
    }
}

impl std::str::FromStr for Mac {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bytes: Vec<_> = text.split(':').map(|part| u8::from_str_radix(part, 16)).collect();
        let wrong = || format!("`{text}` is not a MAC address like 06:00:ac:10:00:02");
        if text.len() != 17 {
            return Err(wrong());
        }
        let bytes: Vec<u8> = bytes.into_iter().collect::<Result<_, _>>().map_err(|_| wrong())?;
        Self::new(bytes.try_into().map_err(|_| wrong())?)
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_the_same_way() {
        let mac: Mac = "06:00:AC:10:00:02".parse().unwrap();
        assert_eq!(mac.to_string(), "06:00:ac:10:00:02");
        for wrong in ["", "06:00:ac:10:00", "06:00:ac:10:00:02:03", "g6:00:ac:10:00:02", "0600:ac:10:00:02x"]
        {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
        assert!("01:00:00:00:00:00".parse::<Mac>().unwrap_err().contains("group"));
    }

    #[test]
    fn derived_addresses_are_local_and_differ_by_names() {
        let mac = Mac::derived("vm", "eth0");
        assert_eq!(mac, Mac::derived("vm", "eth0"));
        assert_ne!(mac, Mac::derived("vm", "eth1"));
        assert_ne!(mac, Mac::derived("vme", "th0"));
        assert_eq!(mac.0[0] & 3, 2);
    }
}
