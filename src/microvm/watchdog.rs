//! The end of the guest's watchdog's countdown: what the configuration says is done then.

use std::time::Instant;

use super::Microvm;
use crate::config::WatchdogAction;
use crate::history::{self, Event};
use crate::log;
use crate::machine::Exit;

impl Microvm {
    /// When the guest's watchdog will expire, as things are; none: the guest has none, or does not use it now.
    pub fn watchdog_ends_at(&self) -> Option<Instant> {
        self.machine.as_deref()?.watchdog()?.lock().ends_at()
    }

    /// Does what is to be done if the guest's watchdog has expired. To be called when [`Self::watchdog_ends_at`] says,
    /// which is to be asked about once a second.
    pub fn heed_watchdog(&mut self) {
        let Some(machine) = self.machine.as_deref() else { return };
        let Some(watchdog) = machine.watchdog() else { return };
        if machine.exit().is_some() || !watchdog.lock().take_end(Instant::now()) {
            return;
        }
        match self.config.machine_config.watchdog {
            Some(WatchdogAction::Reset) if !self.boots_once => self.reset_by_watchdog(),
            Some(WatchdogAction::Reset | WatchdogAction::Poweroff) => machine.end(Exit::WatchdogExpired),
            Some(WatchdogAction::Tell) | None => {
                log::guest_line("the guest's watchdog expired");
                tell(WatchdogAction::Tell);
            }
        }
    }

    fn reset_by_watchdog(&mut self) {
        let again = |microvm: &Self| {
            if let Some(watchdog) = microvm.machine.as_deref().and_then(|machine| machine.watchdog()) {
                watchdog.lock().end_again(Instant::now());
            }
        };
        // A live snapshot has the memory of the guest as it is.
        if self.check_not_saving().is_err() {
            return again(self);
        }
        log::guest_line("the guest's watchdog expired: it is reset");
        tell(WatchdogAction::Reset);
        // Of a guest whose new machine cannot be built there is none any more: its owner is told by `take_end`.
        if let Err(error) = self.reset("watchdog")
            && self.machine.is_some()
        {
            log::guest_line(format_args!("reset the guest, whose watchdog expired: {error}"));
            again(self);
        }
    }
}

fn tell(action: WatchdogAction) {
    history::tell(|| Event::WatchdogExpired { action: action.name() });
}
