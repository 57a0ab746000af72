//! The statistics that a guest tells of its memory (virtio 1.2, 5.5.6.4): nobody has checked them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The names of Firecracker's API for the statistics, by their tags. One text: a table of pointers would have to be
/// relocated whenever the process starts.
const NAMES: &str = "swap_in swap_out major_faults minor_faults free_memory total_memory available_memory \
                     disk_caches hugetlb_allocations hugetlb_failures oom_kill alloc_stall async_scan direct_scan \
                     async_reclaim direct_reclaim";
const COUNT: usize = 16;
/// The size of an entry: a tag of two bytes and a value of eight, without a gap.
const ENTRY: usize = 10;
/// The number of bytes that are read of a guest's statistics: room for more tags than there are. A guest can make a
/// buffer of 4 GiB.
pub const SIZE_MAX: usize = 64 * ENTRY;

/// The statistics that a guest told last, by their tags.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Statistics([Option<u64>; COUNT]);

impl Statistics {
    /// The statistics that a driver's buffer has, and the number of its entries whose tag is unknown.
    pub fn parse(bytes: &[u8]) -> (Self, u64) {
        let (mut told, mut unknown) = (Self::default(), 0);
        let (entries, _) = bytes.as_chunks::<ENTRY>();
        for [low, high, value @ ..] in entries {
            match told.0.get_mut(usize::from(u16::from_le_bytes([*low, *high]))) {
                Some(place) => *place = Some(u64::from_le_bytes(*value)),
                None => unknown += 1,
            }
        }
        (told, unknown)
    }

    /// Adds the statistics that were told to `answer`.
    pub fn tell(&self, answer: &mut Map<String, Value>) {
        let told = NAMES.split_whitespace().zip(self.0);
        answer.extend(told.filter_map(|(name, value)| Some((name.to_owned(), value?.into()))));
    }
}

/// The schema of the answer that [`Statistics::tell`] is a part of.
#[cfg(test)]
pub fn schema() -> schemars::Schema {
    let integer = |name: &str| (name.to_owned(), serde_json::json!({ "type": "integer", "minimum": 0 }));
    let always = ["target_pages", "actual_pages", "target_mib", "actual_mib"];
    let properties: Map<_, _> = always.into_iter().chain(NAMES.split_whitespace()).map(integer).collect();
    schemars::json_schema!({ "type": "object", "required": always, "properties": properties })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_told_by_their_names_and_what_is_unknown_is_counted() {
        assert_eq!(NAMES.split_whitespace().count(), COUNT);
        let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let bytes = [entry(4, 5), entry(16, 1), entry(15, u64::MAX), entry(0xffff, 2), entry(4, 6)].concat();
        let (told, unknown) = Statistics::parse(&[&bytes[..], &[4, 0, 1]].concat());
        assert_eq!(unknown, 2);
        let mut answer = Map::new();
        told.tell(&mut answer);
        assert_eq!(
            Value::Object(answer),
            serde_json::json!({ "free_memory": 6, "direct_reclaim": u64::MAX })
        );
        assert_eq!(Statistics::parse(&[]), (Statistics::default(), 0));
    }
}
