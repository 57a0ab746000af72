//! `alula check`: everything wrong with config files, without starting anything.

use std::path::Path;

use serde_json::{Value, json};

use super::arguments::Check;
use super::ctl::{say, standard_input};
use crate::config::{Config, Problem};
use crate::dialect::Dialect;
use crate::error::{Error, Result};

/// The findings on one file.
struct Verdict {
    file: String,
    /// Sections that are not read, which do not make the file wrong.
    warnings: Vec<String>,
    problems: Vec<Problem>,
}

/// Prints a line for each problem; returns the exit code.
pub fn run(check: &Check) -> Result<u8> {
    let standard_input = check.files.iter().filter(|file| file.as_os_str() == "-").count();
    if standard_input > 1 {
        return Err(Error::config("`-`, which is standard input, can be read but once"));
    }
    let (mut found, mut told) = (false, Vec::new());
    for file in &check.files {
        match (Verdict::of(file), check.json) {
            (Ok(verdict), is_json) => {
                found |= !verdict.problems.is_empty();
                if is_json { told.push(verdict.json()) } else { verdict.say()? }
            }
            // Of a file that cannot be read nothing else is known, but the others can be looked at.
            (Err(error), true) => {
                found = true;
                let problem = json!({ "message": error.to_string(), "warning": false });
                told.push(json!({ "file": file.to_string_lossy(), "ok": false, "problems": [problem] }));
            }
            (Err(error), false) => {
                found = true;
                eprintln!("alula: {error}");
            }
        }
    }
    if check.json {
        say(&format!("{:#}", Value::Array(told)))?;
    }
    Ok(if found { super::FAILED_SERVE } else { 0 })
}

impl Verdict {
    fn of(path: &Path) -> Result<Self> {
        let (file, text) = match path.as_os_str() == "-" {
            true => ("(standard input)".to_owned(), standard_input()?),
            false => (path.display().to_string(), Config::read(path)?),
        };
        let (config, mut problems) = Config::examine(Dialect::Alula, &text);
        let sections = Config::sections(&text);
        if !sections.iter().any(|(section, _)| section == "boot-source") && is_object(&text) {
            let message = "`boot-source` is missing: it names the kernel to boot".to_owned();
            problems.push(Problem { message, place: None });
        }
        let missing = config.look().into_iter();
        problems.extend(missing.map(|error| Problem { message: error.to_string(), place: None }));
        Ok(Self { file, warnings: Config::unread(&sections), problems })
    }

    fn say(&self) -> Result<()> {
        let file = &self.file;
        self.warnings.iter().try_for_each(|warning| say(&format!("{file}: {warning}")))?;
        for Problem { message, place } in &self.problems {
            match place {
                Some((line, column)) => say(&format!("{file}:{line}:{column}: {message}"))?,
                None => say(&format!("{file}: {message}"))?,
            }
        }
        if self.problems.is_empty() { say(&format!("{file}: ok")) } else { Ok(()) }
    }

    fn json(&self) -> Value {
        let warnings = self.warnings.iter().map(|message| json!({ "message": message, "warning": true }));
        let problems = self.problems.iter().map(|Problem { message, place }| match place {
            Some((line, column)) => {
                json!({ "message": message, "line": line, "column": column, "warning": false })
            }
            None => json!({ "message": message, "warning": false }),
        });
        let all: Vec<_> = warnings.chain(problems).collect();
        json!({ "file": self.file, "ok": self.problems.is_empty(), "problems": all })
    }
}

fn is_object(text: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Map<_, _>>(text).is_ok()
}
