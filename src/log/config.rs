//! What can be said of the log: its level, where it goes, and what its lines have.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::Result;

/// How much a message matters; a log has those up to its own level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "LogLevel"))]
#[allow(missing_docs, reason = "names of the API")]
pub enum Level {
    Off,
    Error,
    Warning,
    Info,
    Debug,
    Trace,
}

impl Level {
    const ALL: [Self; 6] = [Self::Off, Self::Error, Self::Warning, Self::Info, Self::Debug, Self::Trace];

    /// As a log line has it.
    pub(super) fn tag(self) -> &'static str {
        ["OFF", "ERROR", "WARN", "INFO", "DEBUG", "TRACE"][self as usize]
    }
}

impl std::str::FromStr for Level {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let is = |level: &&Self| format!("{level:?}").eq_ignore_ascii_case(text);
        match text.to_ascii_lowercase().as_str() {
            "warn" => Ok(Self::Warning),
            _ => Self::ALL.iter().find(is).copied().ok_or_else(|| {
                format!("unknown level `{text}`: expected Error, Warning, Info, Debug, Trace or Off")
            }),
        }
    }
}

impl<'de> Deserialize<'de> for Level {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Body of `PUT /logger`; what is left out has its default.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Logger"))]
#[serde(deny_unknown_fields, expecting = "struct LoggerConfig")]
pub struct Config {
    /// A file, created if it is missing, or a FIFO; none: standard error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// Messages up to this level; none: Info.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<Level>,
    /// Lines have their level.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Lines have the place in the source that wrote them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only messages of this module and of those in it: `virtio` or `alula::virtio::workers`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

impl Config {
    /// This with what `other` says: what it leaves out stays.
    pub fn changed(self, other: &Self) -> Self {
        let Self { log_path, level, show_level, show_log_origin, module } = other.clone();
        Self {
            log_path: log_path.or(self.log_path),
            level: level.or(self.level),
            show_level: show_level.or(self.show_level),
            show_log_origin: show_log_origin.or(self.show_log_origin),
            module: module.or(self.module),
        }
    }
}
