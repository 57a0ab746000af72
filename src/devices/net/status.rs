//! Whether the guest has a link (virtio 1.2, 5.1.4): its TAP is there and up, its passt lives.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::host::link::Link;
use crate::host::tap::Tap;
use crate::log;

/// The link, as the guest is told.
pub struct Status {
    /// The interface's name, for the log.
    name: String,
    /// Hears of changes of the TAP's interface.
    pub watch: Option<Link>,
    is_up: AtomicBool,
}

impl Status {
    /// Of the interface `name` over `tap`.
    pub fn of(name: &str, tap: &Tap) -> Self {
        let watch = Link::watch(tap);
        let is_up = watch.as_ref().is_none_or(|link| link.is_up(tap)).into();
        Self { name: name.to_owned(), watch, is_up }
    }

    /// The link of the interface `name`, which is up until it is set down.
    pub fn up(name: &str) -> Self {
        Self { name: name.to_owned(), watch: None, is_up: true.into() }
    }

    /// Whether it is up.
    pub fn is_up(&self) -> bool {
        self.is_up.load(Ordering::SeqCst)
    }

    /// True: it was up until now.
    pub fn set_down(&self) -> bool {
        self.is_up.swap(false, Ordering::SeqCst)
    }

    /// Looks at the interface again; true: it is no longer as it was, which the log tells.
    pub fn refresh(&self, tap: &Tap) -> bool {
        let Some(link) = &self.watch else { return false };
        link.drain();
        let is_up = link.is_up(tap);
        let has_changed = self.is_up.swap(is_up, Ordering::SeqCst) != is_up;
        if has_changed {
            let (name, what) =
                (&self.name, if is_up { "a link again" } else { "no link: its TAP is down or gone" });
            log::line(format_args!("network interface `{name}` has {what}"));
        }
        has_changed
    }
}
