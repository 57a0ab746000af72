//! Everything wrong with one JSON object, where reading it stops at the first fault: what was found is
//! mended, and the object judged again.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::file::Problem;
use crate::json;

/// So many faults of one object are told at most: with FIELDS_MAX and BYTES_MAX this bounds how often a
/// hostile file is read.
const FAULTS_MAX: usize = 16;
/// An object of more fields is not mended: no resource has so many.
const FIELDS_MAX: usize = 32;
/// Nor is one of more bytes: command lines and paths are shorter.
const BYTES_MAX: usize = 8 << 10;

/// What was read, and everything wrong with it.
pub struct Judged<T> {
    /// Without the fields at fault; nothing if not even that makes sense, or if a field that must be
    /// there had to be made up.
    pub value: Option<T>,
    /// In the order found. Places count from the object's beginning.
    pub problems: Vec<Problem>,
}

/// Judges an object by `read`, again and again, without the fields at fault: those that must be there get
/// the value that they have in `example`, which makes sense. `read` is told whether that was done: names in
/// its message, before a colon, are then not the user's.
pub fn judge<T>(text: &str, example: &str, read: impl Fn(&str, bool) -> Result<T, Problem>) -> Judged<T> {
    let mut value = None;
    let mut note = |text: &str, made_up: bool| {
        value = read(text, made_up).map(Some)?;
        Ok(())
    };
    let (makes_sense, problems) = mend_all(text, example, &mut note);
    Judged { value: value.filter(|_| makes_sense), problems }
}

/// Reads an object, and is told whether a field of it was made up. What it reads is kept by whoever gives it: mending
/// is then one function for objects of all types, which would be compiled for each of them.
type Reader<'a> = &'a mut dyn FnMut(&str, bool) -> Result<(), Problem>;

/// Mends `text` until `read` takes it: whether what it took last is the object, without the fields at fault, and
/// everything wrong with it.
fn mend_all(text: &str, example: &str, read: Reader<'_>) -> (bool, Vec<Problem>) {
    let mut problem = match read(text, false) {
        Ok(()) => return (true, Vec::new()),
        Err(problem) => problem,
    };
    let mut problems = vec![problem.clone()];
    let (Ok(Fields(mut fields)), Ok(Fields(example))) = (json::from_text(text), json::from_text(example))
    else {
        return (false, problems);
    };
    if fields.len() > FIELDS_MAX || text.len() > BYTES_MAX {
        return (false, problems);
    }
    let mut made_up = false;
    while problems.len() < FAULTS_MAX {
        let mut read = |text: &str, now: bool| read(text, made_up || now);
        let Some((mended, result)) = mend(&fields, &example, &problem.message, &mut read) else { break };
        made_up |= mended.len() >= fields.len();
        match result {
            Ok(()) => return (!made_up, problems),
            Err(next) => {
                // A place in the text that was mended says nothing. What was given by the user has one.
                let raw = mended.iter().find(|(name, _)| quoted(&next.message).any(|word| word == name));
                let told = Problem { place: Some((1, 1)), ..next.clone() };
                let bytes = text.as_bytes();
                problems.push(
                    match raw.filter(|(_, raw)| bytes.as_ptr_range().contains(&raw.get().as_ptr())) {
                        Some((_, raw)) => told.moved(bytes, raw),
                        None => told,
                    },
                );
                (fields, problem) = (mended, next);
            }
        }
    }
    (false, problems)
}

type List<'a> = Vec<(String, &'a RawValue)>;

/// The first change of one field that leads to another verdict: fields that `message` names are tried first.
fn mend<'a>(
    fields: &List<'a>,
    example: &List<'a>,
    message: &str,
    read: Reader<'_>,
) -> Option<(List<'a>, Result<(), Problem>)> {
    // A message quotes what the user wrote, too: hundreds of words that are no fields.
    let mut named: Vec<&str> = Vec::new();
    for word in quoted(message) {
        let is_field = fields.iter().chain(example).any(|(name, _)| name == word);
        if is_field && !named.contains(&word) {
            named.push(word);
        }
    }
    let others = fields.iter().map(|(name, _)| name.as_str()).filter(|name| !named.contains(name));
    named.iter().copied().chain(others).find_map(|name| {
        let made_up = example.iter().find(|(other, _)| other == name);
        // What may have to be there is replaced rather than removed. Of a field that is there twice, one
        // goes at a time.
        let index = fields.iter().position(|(other, _)| other == name);
        let removed: List<'_> = fields
            .iter()
            .enumerate()
            .filter(|(at, _)| Some(*at) != index)
            .map(|(_, one)| one.clone())
            .collect();
        let replaced = made_up.map(|made_up| removed.iter().chain([made_up]).cloned().collect());
        [replaced, Some(removed)].into_iter().flatten().find_map(|mended| {
            let result = read(&write(&mended), mended.len() >= fields.len());
            match &result {
                // It was there, and must be.
                Err(next) if next.message.contains(&format!("missing field `{name}`")) => None,
                Err(next) if next.message.contains(&format!("`{name}` is missing")) => None,
                Err(next) if reason(&next.message) == reason(message) => None,
                _ => Some((mended, result)),
            }
        })
    })
}

/// A message without the name of what it is about.
fn reason(message: &str) -> &str {
    message.split_once(": ").map_or(message, |(_, reason)| reason)
}

/// The words in backticks.
fn quoted(message: &str) -> impl Iterator<Item = &str> {
    message.split('`').skip(1).step_by(2)
}

fn write(fields: &List<'_>) -> String {
    let name = |name: &String| serde_json::Value::from(name.as_str()).to_string();
    let fields: Vec<_> = fields.iter().map(|(key, value)| format!("{}:{}", name(key), value.get())).collect();
    format!("{{{}}}", fields.join(","))
}

/// The fields of an object, the same one more than once if it is there so.
struct Fields<'a>(List<'a>);

impl<'a> Deserialize<'a> for Fields<'a> {
    fn deserialize<D: serde::Deserializer<'a>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'a> serde::de::Visitor<'a> for Visitor {
            type Value = Fields<'a>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: serde::de::MapAccess<'a>>(self, mut map: A) -> Result<Fields<'a>, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn words_that_are_no_fields_are_not_tried() {
        let words = "`a`b".repeat(1000);
        for message in [words.clone(), format!("{words}`id`"), "`id` ".repeat(1000)] {
            let reads = Cell::new(0);
            let text = r#"{"id": 1, "size": 2}"#;
            let judged = judge(text, r#"{"id": 0}"#, |text, _| {
                reads.set(reads.get() + 1);
                match text.contains("\"id\":0") && !text.contains("size") {
                    true => Ok(()),
                    false => Err(Problem { message: message.clone(), place: None }),
                }
            });
            assert_eq!(judged.problems.len(), 1);
            // The text, and each field replaced or removed.
            assert!(reads.get() <= 1 + 2 * 2, "{} reads", reads.get());
        }
    }
}
