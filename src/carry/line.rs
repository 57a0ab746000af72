//! The order of a microVM's snapshots, which decides into which ones the pages of a difference may be merged.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A snapshot among all that there are.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Place {
    /// A random number of the microVM that was saved: of its start, its restore, or its last reset.
    pub microvm: u128,
    /// Snapshots of that microVM are counted from 1 on.
    pub number: u32,
}

/// A snapshot's place, and what the snapshot comes after, as its state says.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Line {
    /// The snapshot's own place.
    pub place: Place,
    /// The snapshots that a difference comes after; None: the snapshot is a whole one.
    pub after: Option<After>,
}

/// The snapshots that a difference has all pages since.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct After {
    /// The number of the first of these snapshots that are of the difference's own microVM.
    pub number: u32,
    /// The snapshot that the microVM was restored from, if it is one of these and its state has said its place.
    pub restored_from: Option<Place>,
}

impl Line {
    /// Whether this difference may be merged into the snapshot at `base`.
    ///
    /// # Errors
    /// The difference lacks pages that were written since the snapshot at `base`, or is of another microVM; the error
    /// says which snapshots are meant.
    pub fn check_follows(&self, base: Place) -> Result<()> {
        let Self { place: Place { microvm, number }, after: Some(after) } = *self else { return Ok(()) };
        let is_own = base.microvm == microvm;
        if is_own && (after.number..number).contains(&base.number) || after.restored_from == Some(base) {
            return Ok(());
        }
        let wanted = match (after.number, after.restored_from) {
            (0, Some(_)) => "one before it, or the one that the microVM was restored from".to_owned(),
            (0, None) => "one before it".to_owned(),
            (number, _) => format!("snapshot {number} of that microVM"),
        };
        let there = match (is_own, base.number) {
            (true, other) if other >= number => {
                format!("snapshot {other} of it, which has these pages or later ones")
            }
            (true, other) => format!("snapshot {other} of it"),
            (false, _) => "of another microVM, or from before or after another restore or reset".to_owned(),
        };
        Err(Error::config(format!(
            "the difference is snapshot {number} of its microVM, and is for {wanted}; what it is to be merged into is \
             {there}: merge differences in the order in which they were saved, and leave none out"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN: Place = Place { microvm: 7, number: 4 };

    fn place(number: u32) -> Place {
        Place { microvm: 9, number }
    }

    fn refused(after: After, base: Place) -> String {
        let line = Line { place: place(5), after: Some(after) };
        line.check_follows(base).map_or_else(|error| error.to_string(), |()| String::new())
    }

    #[test]
    fn a_difference_of_noted_writes_is_for_the_one_before_it() {
        let after = After { number: 4, restored_from: None };
        assert_eq!(refused(after, place(4)), "");
        for (base, expected) in [
            (
                place(3),
                "is for snapshot 4 of that microVM; what it is to be merged into is snapshot 3 of it:",
            ),
            (place(5), "is snapshot 5 of it, which has these pages or later ones"),
            (place(6), "is snapshot 6 of it, which has these pages or later ones"),
            (ORIGIN, "is of another microVM"),
        ] {
            let error = refused(after, base);
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_difference_of_own_pages_is_for_any_before_it() {
        let after = After { number: 0, restored_from: Some(ORIGIN) };
        for base in [place(1), place(4), ORIGIN] {
            assert_eq!(refused(after, base), "");
        }
        for base in [place(5), Place { microvm: 7, number: 5 }, Place { microvm: 8, number: 4 }] {
            assert!(
                refused(after, base)
                    .contains("is for one before it, or the one that the microVM was restored from")
            );
        }
        assert!(refused(After { restored_from: None, ..after }, ORIGIN).contains("is for one before it;"));
    }

    #[test]
    fn what_is_no_difference_is_for_none() {
        Line { place: place(5), after: None }.check_follows(ORIGIN).unwrap();
    }
}
