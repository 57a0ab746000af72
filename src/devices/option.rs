//! Options of the command line that add devices.

/// An option of the command line.
#[derive(Clone, Copy, Debug)]
pub struct CliOption {
    /// Its name, without the hyphens.
    pub name: &'static str,
    /// The form of its value; empty: it has none.
    pub value: &'static str,
    /// The help of the option, in lines of at most 75 characters.
    pub help: &'static str,
}

/// Refuses a word of an option's value (`NAME` or `NAME=...`) that is there twice: which of the two is
/// meant, only the user knows.
pub fn check_words<'a>(words: impl Iterator<Item = &'a str>, may_be_repeated: &[&str]) -> Result<(), String> {
    let mut given = Vec::new();
    for word in words {
        let name = word.split_once('=').map_or(word, |(name, _)| name);
        if given.contains(&name) && !may_be_repeated.contains(&name) {
            return Err(format!("`{word}`: `{name}` is given twice: give it once"));
        }
        given.push(name);
    }
    Ok(())
}
