//! Whether the guest has a link (virtio 1.2, 5.1.4): its TAP is there and up, its passt lives.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::host::link::Link;
use crate::host::tap::Tap;

/// The link, as the guest is told.
pub struct Status {
    /// Hears of changes of the TAP's interface.
    pub watch: Option<Link>,
    is_up: AtomicBool,
}

impl Status {
    /// Of an interface over `tap`.
    pub fn of(tap: &Tap) -> Self {
        let watch = Link::watch(tap);
        let is_up = watch.as_ref().is_none_or(|link| link.is_up(tap)).into();
        Self { watch, is_up }
    }

    /// A link that is up until it is set down.
    pub fn up() -> Self {
        Self { watch: None, is_up: true.into() }
    }

    /// Whether it is up.
    pub fn is_up(&self) -> bool {
        self.is_up.load(Ordering::SeqCst)
    }

    /// True: it was up until now.
    pub fn set_down(&self) -> bool {
        self.is_up.swap(false, Ordering::SeqCst)
    }

    /// Looks at the interface again; true: it is no longer as it was.
    pub fn refresh(&self, tap: &Tap) -> bool {
        let Some(link) = &self.watch else { return false };
        link.drain();
        let is_up = link.is_up(tap);
        self.is_up.swap(is_up, Ordering::SeqCst) != is_up
    }
}
