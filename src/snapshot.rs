//! State that outlives the process: a device, a bus or a CPU gives it as plain data, and takes it back
//! into a component freshly built from the same configuration. Saved state is untrusted, like guest
//! memory: whatever it says, a restore ends in a sound component or in an error.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Context, Error, Result};

/// The most that the saved state of one part may be, in bytes: a list of things that are two bytes in a file may take
/// 16 times as much of memory.
const STATE_MAX: usize = 512 << 10;

/// A list of at most `MAX` things, as anybody may have written it: where its things are small in a file and large in
/// memory, this bounds how much memory reading them takes.
pub fn at_most<'de, const MAX: usize, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    struct List<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for List<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX} of them")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut all: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::with_capacity(all.size_hint().unwrap_or(0).min(MAX));
            while let Some(next) = all.next_element()? {
                if list.len() == MAX {
                    return Err(A::Error::custom(format_args!("a list has more than {MAX} entries")));
                }
                list.push(next);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_seq(List::<T, MAX>(PhantomData))
}

/// The same for things with names.
pub fn at_most_named<'de, const MAX: usize, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, T>, D::Error> {
    struct Map<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Map<T, MAX> {
        type Value = BTreeMap<String, T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX} of them, by their names")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut all: A) -> Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((name, next)) = all.next_entry()? {
                if map.len() == MAX {
                    return Err(A::Error::custom(format_args!("a list has more than {MAX} entries")));
                }
                map.insert(name, next);
            }
            Ok(map)
        }
    }

    deserializer.deserialize_map(Map::<T, MAX>(PhantomData))
}

/// Something whose state can be saved and restored.
pub trait Snapshot {
    /// What the guest can see of it, beyond its configuration.
    type State: Serialize + DeserializeOwned;
    /// Of this form; another one is refused. One more whenever `State` changes.
    const VERSION: u16 = 1;
    /// Older forms that are read all the same: each lacks the last fields alone, and the bytes stand for those.
    const OLDER: &'static [(u16, &'static [u8])] = &[];

    /// The state. The caller promises that nothing changes it meanwhile.
    fn save(&self) -> Result<Self::State>;
    /// Takes a state over. The caller promises that this was just built, from the same configuration
    /// as what was saved. After an error it must not be used.
    fn restore(&mut self, state: Self::State) -> Result<()>;
}

/// Says of types that a guest changes nothing of them: all that there is of them is configuration.
macro_rules! stateless {
    ($($name:ty),*) => {
        $(impl $crate::snapshot::Snapshot for $name {
            type State = ();
            fn save(&self) -> $crate::error::Result<()> {
                Ok(())
            }
            fn restore(&mut self, (): ()) -> $crate::error::Result<()> {
                Ok(())
            }
        })*
    };
}
pub(crate) use stateless;

/// The same with the type of the state erased: version, then the state, as `postcard` writes them.
pub trait SaveState {
    /// The state as bytes.
    fn save_state(&self) -> Result<Vec<u8>>;
    /// Takes the state from bytes.
    fn restore_state(&mut self, bytes: &[u8]) -> Result<()>;
}

impl<T: Snapshot> SaveState for T {
    fn save_state(&self) -> Result<Vec<u8>> {
        let state = self.save()?;
        let bytes = postcard::to_extend(&T::VERSION, Vec::new());
        bytes.and_then(|bytes| postcard::to_extend(&state, bytes)).context("write saved state")
    }

    fn restore_state(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() > STATE_MAX {
            let length = bytes.len();
            return Err(Error::config(format!(
                "the saved state has {length} bytes, at most {STATE_MAX} are read: it is damaged"
            )));
        }
        let (version, bytes): (u16, _) = take(bytes)?;
        let older = T::OLDER.iter().find(|(older, _)| *older == version);
        let bytes = match older {
            Some((_, lacking)) => Cow::Owned([bytes, lacking].concat()),
            None if version == T::VERSION => Cow::Borrowed(bytes),
            None => {
                let known = T::VERSION;
                return Err(Error::config(format!(
                    "the saved state has version {version}, this is for {known}"
                )));
            }
        };
        let (state, rest) = take(&bytes)?;
        if !rest.is_empty() {
            return Err(Error::config(format!("the saved state has {} bytes too many", rest.len())));
        }
        self.restore(state)
    }
}

fn take<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, &[u8])> {
    postcard::take_from_bytes(bytes)
        .map_err(|error| Error::config(format!("the saved state is damaged: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq)]
    struct Counter(Vec<u32>);

    impl Snapshot for Counter {
        type State = Vec<u32>;
        fn save(&self) -> Result<Self::State> {
            Ok(self.0.clone())
        }
        fn restore(&mut self, state: Self::State) -> Result<()> {
            self.0 = state;
            Ok(())
        }
    }

    #[test]
    fn what_was_saved_comes_back() {
        let counter = Counter(vec![1, 2, 300_000]);
        let mut other = Counter::default();
        other.restore_state(&counter.save_state().unwrap()).unwrap();
        assert_eq!(counter, other);
    }

    /// A counter that has a name since its second form.
    #[derive(Debug, PartialEq)]
    struct Named(u32, String);

    impl Snapshot for Named {
        type State = (u32, String);
        const VERSION: u16 = 2;
        const OLDER: &'static [(u16, &'static [u8])] = &[(1, b"\x03old")];
        fn save(&self) -> Result<Self::State> {
            Ok((self.0, self.1.clone()))
        }
        fn restore(&mut self, state: Self::State) -> Result<()> {
            *self = Self(state.0, state.1);
            Ok(())
        }
    }

    #[test]
    fn an_older_form_has_what_stands_for_its_last_fields() {
        let mut named = Named(0, String::new());
        named.restore_state(&[1, 7]).unwrap();
        assert_eq!(named, Named(7, "old".to_owned()));
        let mut again = Named(0, String::new());
        again.restore_state(&named.save_state().unwrap()).unwrap();
        assert_eq!(again, named);
        for damaged in [&[1][..], &[1, 7, 0]] {
            let error = named.restore_state(damaged).unwrap_err().to_string();
            assert!(error.contains("damaged") || error.contains("too many"), "{error}");
        }
        assert!(named.restore_state(&[3, 7]).unwrap_err().to_string().contains("version 3, this is for 2"));
    }

    #[test]
    fn damaged_state_is_refused() {
        let bytes = Counter(vec![1, 2, 3]).save_state().unwrap();
        let refused = |bytes: &[u8]| Counter::default().restore_state(bytes).unwrap_err().to_string();
        for length in 0..bytes.len() {
            assert!(refused(&bytes[..length]).contains("is damaged"), "{length}");
        }
        assert!(refused(&[&bytes[..], &[0]].concat()).contains("1 bytes too many"));
        assert!(refused(&[&[9], &bytes[1..]].concat()).contains("version 9, this is for 1"));
        // A length that would take all memory.
        assert!(refused(&[1, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f]).contains("is damaged"));
    }
}
