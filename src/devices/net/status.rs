//! Whether the guest has a link (virtio 1.2, 5.1.4): its TAP is there and up, its passt lives.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Result;
use crate::host::link::Link;
use crate::host::tap::Tap;
use crate::log;
use crate::poll::{self, EventFd};

/// The link, as the guest is told.
pub struct Status {
    /// The interface's name, for the log.
    name: String,
    /// Hears of changes of the TAP's interface.
    pub watch: Option<Link>,
    is_up: AtomicBool,
    /// Of a guest that was restored over another network.
    pub cable: Option<Cable>,
}

/// The network of a restored guest is another one, which knows none of the guest's connections: as of a cable that is
/// pulled and put in again, the driver sees no link until it has looked.
pub struct Cable {
    is_out: AtomicBool,
    is_seen: AtomicBool,
    /// Written, and never read, when the driver has seen that there is no link.
    pub seen: EventFd,
}

impl Status {
    /// Of the interface `name` over `tap`.
    pub fn of(name: &str, tap: &Tap) -> Self {
        let watch = Link::watch(tap);
        let is_up = watch.as_ref().is_none_or(|link| link.is_up(tap)).into();
        Self { name: name.to_owned(), watch, is_up, cable: None }
    }

    /// The link of the interface `name`, which is up until it is set down.
    pub fn up(name: &str) -> Self {
        Self { name: name.to_owned(), watch: None, is_up: true.into(), cable: None }
    }

    /// The link of an interface that was restored over another network: the cable is out.
    pub fn pulled(name: &str) -> Result<Self> {
        let seen = poll::event("link of a network interface")?;
        let cable = Cable { is_out: true.into(), is_seen: false.into(), seen };
        Ok(Self { cable: Some(cable), ..Self::up(name) })
    }

    /// Whether the driver is to see no link although there is one.
    pub fn is_pulled(&self) -> bool {
        self.cable.as_ref().is_some_and(|cable| cable.is_out.load(Ordering::SeqCst))
    }

    /// Puts the cable in.
    pub fn put_in(&self) {
        self.cable.iter().for_each(|cable| cable.is_out.store(false, Ordering::SeqCst));
    }

    /// The driver looks: whether it is up.
    pub fn look(&self) -> bool {
        if let Some(cable) = self.cable.as_ref().filter(|_| self.is_pulled()) {
            // Once: a driver that looks again and again does not put off what comes of it.
            if !cable.is_seen.swap(true, Ordering::SeqCst) {
                // A counter that is full has told it.
                let _ = cable.seen.write(1);
            }
            return false;
        }
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
