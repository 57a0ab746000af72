//! `alula check`: everything wrong with a config file, without starting anything.

use std::path::Path;

use crate::config::{Config, Problem};
use crate::dialect::Dialect;

/// Prints a line for each problem; returns the exit code.
pub fn run(path: &Path) -> u8 {
    let file = path.display();
    let text = match Config::read(path) {
        Ok(text) => text,
        Err(error) => {
            eprintln!("alula: {error}");
            return super::FAILED_SERVE;
        }
    };
    let (config, mut problems) = Config::examine(Dialect::Alula, &text);
    let sections = Config::sections(&text);
    for unread in Config::unread(&sections) {
        println!("{file}: {unread}");
    }
    if !sections.iter().any(|(section, _)| section == "boot-source") && is_object(&text) {
        let message = "`boot-source` is missing: it names the kernel to boot".to_owned();
        problems.push(Problem { message, place: None });
    }
    let missing = config.look().into_iter();
    problems.extend(missing.map(|error| Problem { message: error.to_string(), place: None }));
    for Problem { message, place } in &problems {
        match place {
            Some((line, column)) => println!("{file}:{line}:{column}: {message}"),
            None => println!("{file}: {message}"),
        }
    }
    match problems.len() {
        0 => {
            println!("{file}: ok");
            0
        }
        _ => super::FAILED_SERVE,
    }
}

fn is_object(text: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Map<_, _>>(text).is_ok()
}
