//! How the guest begins: at the start, and with every reset of the machine, which is another one then.

use super::Microvm;
use super::saving::Taken;
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::machine::{Cpus, Kept, Machine, Prepared};
use crate::memory::lost;
use crate::metadata::Service;

impl Microvm {
    /// Builds, loads and starts the machine; without a boot source it runs the firmware guest.
    /// `reason`: who wants it.
    pub fn start(&mut self, reason: &'static str) -> Result<()> {
        let machine = self.build(Kept::default(), Event::Started { reason });
        self.machine = Some(machine.inspect_err(|_| self.prepare_again())?);
        self.ahead = None;
        self.write_metrics();
        Ok(())
    }

    /// Has the guest boot once only: it is there for a command, with which everything else ends.
    pub fn boot_once(&mut self) {
        self.boots_once = true;
    }

    /// The reset button: stops the guest, running or paused, at once, and boots it again in a new machine, from what its
    /// configuration says now. What devices have of the host stays open, and what they have in flight is finished, so
    /// that no write that the guest was told of is lost. `reason`: who wants it.
    ///
    /// # Errors
    /// The reset is refused before anything was stopped: the guest goes on. Or the new machine could not be built: there
    /// is no machine any more, and [`Microvm::take_end`] says why.
    pub fn reset(&mut self, reason: &'static str) -> Result<()> {
        self.begin_reset().inspect_err(|_| self.host.release_all())?;
        self.take_asked()?;
        self.take_asked_cpus();
        // The counters since the last line are those of parts that go with the machine.
        self.write_metrics();
        let Some(machine) = self.machine.take() else { return Err(super::not_started()) };
        let kept = machine.retire(&mut self.host);
        // These describe memory that is gone; a page-fault handler goes after the machine's threads.
        (self.handler, self.origin, self.unsaved) = (None, None, None);
        // A difference from now on lacks pages that are zero again: a snapshot from before must not be taken for its base.
        self.taken = Taken::default();
        lost::forget();
        self.host.forget_origin();
        (self.has_agent, self.asked_to_end) = (false, None);
        self.host.take_agent_call();
        self.resets += 1;
        let built = self.build(kept, Event::Restarted { reason }).context("boot the guest again");
        self.machine =
            Some(built.inspect_err(|error| self.end = Some(Error::new(error.kind(), error.to_string())))?);
        self.write_metrics();
        Ok(())
    }

    /// Has the guest stand still for a reset, once all that can be known to fail has not.
    fn begin_reset(&mut self) -> Result<()> {
        self.check_not_saving()?;
        if self.boots_once {
            return Err(Error::config(
                "the guest is there for one command (`alula run -- COMMAND`): run that again",
            ));
        }
        let files = self.config.boot_source.clone();
        let machine = self.started()?;
        if machine.is_changing() {
            return Err(Error::config("a change of a device waits for what it has in flight: wait for that"));
        }
        if let Some(exit) = machine.exit() {
            return Err(Error::guest(format!("the guest has ended: {exit}")));
        }
        if let Some(source) = files {
            Machine::hold_boot_files(&source, &mut self.host)?;
        }
        self.started()?.pause()
    }

    /// How often the machine was reset.
    pub fn resets(&self) -> u64 {
        self.resets
    }

    /// The action by which a client has asked the guest to end, if one has since the guest boots.
    pub fn asked_to_end(&self) -> Option<&'static str> {
        self.asked_to_end
    }

    /// Why there is no machine any more; None: that is not so.
    pub fn take_end(&mut self) -> Option<Error> {
        self.end.take()
    }

    /// A machine that runs, with the devices that were `kept` of the one before, and told of by this event.
    fn build(&mut self, kept: Kept, event: Event) -> Result<Box<Machine>> {
        let base =
            self.take_base(Cpus::of(&self.config)?, self.config.machine_config.mem_size_mib, Prepared::new)?;
        let service = self.config.mmds_config.clone();
        self.host.serve_metadata(service.map(|config| Service { config, store: self.metadata.clone() }));
        let mut machine = Machine::build_after(kept, &self.id, &self.config, &mut self.host, base)?;
        machine.load(&self.config, &mut self.host)?;
        if self.config.machine_config.track_dirty_pages {
            machine.track_writes(true)?;
        }
        self.host.release_all();
        // Told first: what the guest does comes after it.
        history::tell(|| event);
        machine.resume()?;
        Ok(machine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn a_guest_that_is_there_for_a_command_is_not_reset() {
        let mut microvm = Microvm::new("test".to_owned(), Config::default());
        microvm.boot_once();
        let error = microvm.reset("test").unwrap_err().to_string();
        assert!(error.contains("`alula run -- COMMAND`") && microvm.take_end().is_none(), "{error}");
    }
}
