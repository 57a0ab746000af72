//! The options that say where what happens to a guest is told: events, messages, metrics.

use std::path::PathBuf;

use lexopt::ValueExt;

use super::persona::Persona;
use crate::config::Config;
use crate::error::Result;
use crate::history::{self, Feed};
use crate::log::{self, Level};
use crate::metrics;

const HELP: &str = "
Options for those who watch it:
      --events PATH      Write what happens to the guest there, a JSON object a line: to a file, a
                         FIFO, or `fd:N`, an inherited descriptor
      --log-path PATH    Write messages there (file, FIFO, `fd:N`) instead of standard error
      --level LEVEL      Which messages: Error, Warning, Info, Debug, Trace or Off; docs/observing.md
                         says what each adds [default: Info in a log file, Warning on standard error]
      --show-level       Lines of the log have their level
      --show-log-origin  Lines of the log have the place in Alula's source that wrote them
      --module MODULE    Only messages of this module of Alula's source, such as `virtio`
      --metrics-path PATH
                         Write a line of metrics there (file, FIFO, `fd:N`) at the start, every
                         minute and at the end
      --boot-timer       A register where the guest writes 123 when it has booted: the log, at level
                         Info, and events say how long that took
";

const NAMES: [&str; 8] =
    ["boot-timer", "events", "log-path", "level", "show-level", "show-log-origin", "module", "metrics-path"];

/// The modules of this program that are in no other (src/lib.rs).
const MODULES: &str = "agent api arch archive bus carry cli clock config descriptors devices dialect errands error firmware \
    guest history host jail jobs json kvm limiter log machine memory metadata metrics microvm part paths pci \
    platform poll process protocol sink snapshot spelling sys terminal timeline units uring virtio vm walls";

/// A module whose messages are wanted: one that there is, or one in it. By a word that no message comes from, all would be
/// hidden.
fn module(text: &str) -> Result<String, String> {
    let within = text.strip_prefix("alula").map_or(text, |rest| rest.trim_start_matches("::"));
    let outer = within.split("::").next().unwrap_or_default();
    match outer.is_empty() || MODULES.split(' ').any(|module| module == outer) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "there is no such module (`--show-log-origin` tells of each message where it comes from): expected one of \
             {}, or one in it",
            MODULES.replace(' ', ", ")
        )),
    }
}

/// The help of a command with these options in it, after its own.
pub fn with_help(help: &str) -> String {
    help.replacen("\n\nThe exit code", &format!("\n{HELP}\nThe exit code"), 1)
}

/// What was said by them.
#[derive(Debug, Default)]
pub struct OutputOptions {
    events: Option<PathBuf>,
    /// None: nothing was said of the log.
    log: Option<log::Config>,
    metrics: Option<PathBuf>,
    boot_timer: bool,
    /// How much is said on standard error, where nothing else was said of it.
    voice: Option<Level>,
    /// Clients name modules that are Firecracker's own.
    has_other_modules: bool,
}

impl OutputOptions {
    /// The options before any is given, of a program that is called so.
    pub fn of(persona: Persona) -> Self {
        Self { has_other_modules: persona == Persona::Firecracker, ..Self::default() }
    }

    /// The option of this name, if it is one of these.
    pub fn named(name: &str) -> Option<&'static str> {
        NAMES.into_iter().find(|other| *other == name)
    }

    /// Takes the option called `name` with its value.
    pub fn take(&mut self, name: &'static str, parser: &mut lexopt::Parser) -> Result<(), lexopt::Error> {
        match name {
            "events" => self.events = Some(parser.value()?.into()),
            "boot-timer" => self.boot_timer = true,
            "metrics-path" => self.metrics = Some(parser.value()?.into()),
            _ => {
                let log = self.log.get_or_insert_default();
                match name {
                    "log-path" => log.log_path = Some(parser.value()?.into()),
                    "level" => log.level = Some(super::arguments::value(parser, "--level", str::parse)?),
                    "module" if self.has_other_modules => log.module = Some(parser.value()?.string()?),
                    "module" => log.module = Some(super::arguments::value(parser, "--module", module)?),
                    "show-level" => log.show_level = Some(true),
                    _ => log.show_log_origin = Some(true),
                }
            }
        }
        Ok(())
    }

    /// Adds to the configuration what was said; it overrides what is there.
    pub fn configure(&self, config: &mut Config) {
        config.boot_timer = self.boot_timer;
        let mut log = self.log.clone();
        if let Some(level) = self.voice {
            let log = log.get_or_insert_default();
            if log.log_path.is_none() {
                log.level.get_or_insert(level);
            }
        }
        if let Some(log) = log {
            config.logger = Some(config.logger.take().unwrap_or_default().changed(&log));
        }
        if let Some(metrics_path) = self.metrics.clone() {
            let file = config.metrics.take();
            let (emit_id, properties) = file.map_or((false, None), |file| (file.emit_id, file.properties));
            config.metrics = Some(metrics::Config { metrics_path, emit_id, properties });
        }
    }

    /// Takes `--quiet`, as Error, or `--verbose`, as Info.
    pub fn speak(&mut self, level: Level) -> Result<(), lexopt::Error> {
        match self.voice.replace(level) {
            Some(other) if other != level => Err("--quiet and --verbose do not go together".into()),
            _ => Ok(()),
        }
    }

    /// Whether nothing is to be said that is no error.
    pub fn is_quiet(&self) -> bool {
        self.voice == Some(Level::Error)
    }

    /// Whether the guest is to have a boot timer.
    pub fn has_boot_timer(&self) -> bool {
        self.boot_timer
    }

    /// Opens where events go. They are kept when somebody can ask for them.
    pub fn open_feed(&self, id: &str, has_api: bool) -> Result<Option<Feed>> {
        if has_api || self.events.is_some() {
            history::open(id);
        }
        self.events.as_deref().map(Feed::open).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_modules_are_those_of_the_source() {
        let lines = include_str!("../lib.rs").lines();
        let modules = lines.filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
        assert_eq!(MODULES.split(' ').collect::<Vec<_>>(), modules.collect::<Vec<_>>());
        for text in ["virtio", "alula", "alula::virtio::workers", ""] {
            assert_eq!(module(text).as_deref(), Ok(text));
        }
        for text in ["banana", "alula::banana", "virt"] {
            assert!(module(text).unwrap_err().contains("expected one of agent, api, "), "{text}");
        }
    }
}
