//! The options that say where what happens to a guest is told: events, messages, metrics.

use std::path::PathBuf;

use lexopt::ValueExt;

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
}

impl OutputOptions {
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
                    "module" => log.module = Some(parser.value()?.string()?),
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
