//! Config files. What is read is told back the same; what is refused is refused at a place in the file.

use alula::config::Config;

pub fn run(bytes: &[u8]) {
    match Config::parse(bytes) {
        Ok(config) => {
            config.check().unwrap();
            let _ = config.root_words();
            let text = serde_json::to_vec(&config).unwrap();
            let again = Config::parse(&text).unwrap();
            assert_eq!(serde_json::to_vec(&again).unwrap(), text);
        }
        Err(problems) => {
            assert!(!problems.is_empty());
            let lines: Vec<_> = bytes.split(|byte| *byte == b'\n').collect();
            for (line, column) in problems.iter().filter_map(|problem| problem.place) {
                // serde_json counts the line end that it stopped at as a line's column 0.
                assert!(line >= 1 && line <= lines.len(), "line {line} of {}", lines.len());
                assert!(column <= lines[line - 1].len() + 1, "column {column} of line {line}");
            }
        }
    }
}
