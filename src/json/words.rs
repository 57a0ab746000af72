//! Messages on JSON texts that are wrong, in words for people: serde names the types of programs, and not always the field.

use serde::de::IgnoredAny;

/// A message of serde, without the place that it ends with, for who writes JSON by hand. What it says of fields
/// and their values it says in backticks, and so does this.
pub fn plain(message: &str) -> String {
    if let Some((found, expected)) = split(message, "invalid type: ") {
        return format!("expected {}, found {}", kind(expected), found_words(found));
    }
    if let Some((found, expected)) = split(message, "invalid value: ") {
        let expected = match kind(expected) {
            NUMBER if found.contains('-') => "a number that is not negative",
            NUMBER => "a smaller number",
            other => other,
        };
        return format!("expected {expected}, found {}", found_words(found));
    }
    if let Some((_, expected)) = split(message, "invalid length ") {
        return format!("expected {}, found a list", kind(expected));
    }
    if let Some(rest) = message.strip_prefix("unknown variant ") {
        return format!("unknown value {rest}");
    }
    let words = match message {
        "EOF while parsing an object" => "the text ends within an object: a `}` is missing",
        "EOF while parsing a list" => "the text ends within a list: a `]` is missing",
        "EOF while parsing a string" => "the text ends within a string: a `\"` is missing",
        "EOF while parsing a value" => "the text ends where a value is expected",
        "expected value" => "expected a value: an object, a list, a string, a number, true, false or null",
        "expected ident" => "expected true, false or null",
        "expected `:`" => "expected a `:` after the name of a field",
        "expected `,` or `}`" => "expected a `,` and one more field, or the `}` that ends the object",
        "expected `,` or `]`" => "expected a `,` and one more entry, or the `]` that ends the list",
        "key must be a string" => "the name of a field must stand in double quotes",
        "trailing comma" => "there is a `,` after the last one",
        "trailing characters" => "there is more text after the end of the value",
        "invalid escape" => {
            "a `\\` in a string is followed by what JSON does not have: `\\\\` is a backslash"
        }
        "recursion limit exceeded" => "too many objects or lists are in one another",
        _ if message.starts_with("control character") => {
            "a string has the end of a line, or another control character, in it: `\\n` is the end of a line"
        }
        _ => return message.to_owned(),
    };
    words.to_owned()
}

/// The words for all types of whole numbers.
const NUMBER: &str = "a whole number";

/// The two halves of a message of serde that begins with `beginning`: the value that it has found, and the type that it
/// has expected.
fn split<'m>(message: &'m str, beginning: &str) -> Option<(&'m str, &'m str)> {
    message.strip_prefix(beginning)?.rsplit_once(", expected ")
}

/// The words for a type that serde has expected.
fn kind(expected: &str) -> &str {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" | "i8" | "i16" | "i32" | "i64" | "isize" => NUMBER,
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a map" => "an object",
        "unit" => "null",
        "path string" => "a string",
        "option" => "a value or null",
        _ if expected.starts_with("struct ") => "an object",
        other => other,
    }
}

/// The words for a value that serde has found.
fn found_words(found: &str) -> String {
    let known = [
        ("string ", "the text "),
        ("integer ", ""),
        ("floating point ", ""),
        ("boolean ", ""),
        ("sequence", "a list"),
        ("map", "an object"),
        ("unit", "null"),
    ];
    let words =
        known.iter().find_map(|(serde, words)| Some(format!("{words}{}", found.strip_prefix(serde)?)));
    words.unwrap_or_else(|| found.to_owned())
}

/// The name of the field whose value is at this place of a JSON text: the last name before it. Lines and columns
/// count from 1.
pub fn field_at(text: &[u8], line: usize, column: usize) -> Option<&str> {
    let lines = text.split_inclusive(|byte| *byte == b'\n');
    let start: usize = lines.take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    let end = (start + column).min(text.len());
    let (mut field, mut string, mut escaped) = (None, None, false);
    for (place, byte) in text.iter().enumerate().take(end) {
        match (string, byte) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), b'\\') => escaped = true,
            (Some(begin), b'"') => {
                string = None;
                if text[place + 1..].trim_ascii_start().starts_with(b":") {
                    field = std::str::from_utf8(&text[begin..place]).ok();
                }
            }
            (None, b'"') => string = Some(place + 1),
            _ => {}
        }
    }
    field
}

/// The fault of `text` that `error` tells, in plain words, with the field and without the place.
pub fn tell(text: &[u8], error: &serde_json::Error) -> String {
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or_default();
    // serde calls what is neither a string nor an object no value at all, where a field has one of some words.
    let is_no_word = message == "expected value" && serde_json::from_slice::<IgnoredAny>(text).is_ok();
    let message = if is_no_word { "expected a string".to_owned() } else { plain(message) };
    // Of a text that is no JSON, and of a field that is named, the field before is of no interest.
    let is_named = !error.is_data() && !is_no_word || message.contains(" field `");
    match field_at(text, error.line(), error.column()).filter(|_| !is_named) {
        Some(field) => format!("`{field}`: {message}"),
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[allow(dead_code, reason = "only what is wrong is looked at")]
    #[serde(deny_unknown_fields)]
    struct Engine {
        count: u16,
        is_on: bool,
        name: String,
        speed: Speed,
        parts: Vec<u8>,
        next: Option<Box<Self>>,
    }

    #[derive(Debug, Deserialize)]
    enum Speed {
        Slow,
        Fast,
    }

    #[test]
    fn what_is_wrong_is_said_in_words_for_people() {
        for (text, expected) in [
            (r#"{"count": "1"}"#, "`count`: expected a whole number, found the text \"1\""),
            (r#"{"count": 1.5}"#, "`count`: expected a whole number, found `1.5`"),
            (r#"{"count": true}"#, "`count`: expected a whole number, found `true`"),
            (r#"{"count": 70000}"#, "`count`: expected a smaller number, found `70000`"),
            (r#"{"count": -1}"#, "`count`: expected a number that is not negative, found `-1`"),
            (r#"{"is_on": 1}"#, "`is_on`: expected true or false, found `1`"),
            (r#"{"name": null}"#, "`name`: expected a string, found null"),
            (r#"{"name": {}}"#, "`name`: expected a string, found an object"),
            (r#"{"parts": 7}"#, "`parts`: expected a list, found `7`"),
            (r#"{"parts": [1, "two"]}"#, "`parts`: expected a whole number, found the text \"two\""),
            (r#"{"next": 7}"#, "`next`: expected an object, found `7`"),
            (r#"{"next": []}"#, "`next`: expected an object, found a list"),
            ("7", "expected an object, found `7`"),
            (r#"{"speed": "Quick"}"#, "`speed`: unknown value `Quick`, expected `Slow` or `Fast`"),
            (r#"{"colour": 1}"#, "unknown field `colour`, expected one of `count`, `is_on`"),
            ("{}", "missing field `count`"),
            (r#"{"count": 1, "count": 2}"#, "duplicate field `count`"),
            ("", "the text ends where a value is expected"),
            ("{", "the text ends within an object: a `}` is missing"),
            (r#"{"parts": [1"#, "the text ends within a list: a `]` is missing"),
            (r#"{"name": "a"#, "the text ends within a string: a `\"` is missing"),
            (r#"{"count": }"#, "expected a value: an object, a list, a string, a number"),
            (r#"{"count": 1 "is_on""#, "expected a `,` and one more field, or the `}`"),
            (r#"{"parts": [1 2"#, "expected a `,` and one more entry, or the `]`"),
            (r#"{"count" 1}"#, "expected a `:` after the name of a field"),
            ("{count: 1}", "the name of a field must stand in double quotes"),
            (r#"{"parts": [1,]"#, "there is a `,` after the last one"),
            (r#"{"is_on": nope}"#, "expected true, false or null"),
            (r#"{"name": "\q"}"#, "a `\\` in a string is followed by what JSON does not have"),
            ("{\"name\": \"a\n\"}", "a string has the end of a line"),
        ] {
            let error = serde_json::from_slice::<Engine>(text.as_bytes()).expect_err(text);
            let told = tell(text.as_bytes(), &error);
            assert!(told.starts_with(expected), "{text}: {told}");
            for jargon in ["u8", "u16", "EOF", "invalid type", "struct", "variant", "sequence", " map"] {
                assert!(!told.contains(jargon), "{text}: {told}");
            }
        }
        let error = serde_json::from_str::<Vec<u8>>("[1] 2").unwrap_err();
        assert_eq!(tell(b"[1] 2", &error), "there is more text after the end of the value");
    }

    #[test]
    fn a_text_of_any_bytes_has_a_field_or_none() {
        for text in [&b"{\"\xff\": 1"[..], b"\"", b"{\"a\": \"\\", b"\xff\xfe"] {
            assert_eq!(field_at(text, 1, usize::MAX / 2).filter(|field| *field != "a"), None, "{text:?}");
        }
        assert_eq!(field_at(br#"{"a": "\"b\":", "c": 1}"#, 1, 22), Some("c"));
    }
}
