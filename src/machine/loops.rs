//! The io threads of a machine: one that devices share, and those that devices have of their own.

use std::sync::Arc;

use crate::errands::Errands;
use crate::error::Result;
use crate::virtio::workers::Loop;

/// The name of the thread that devices share.
const SHARED: &str = "io";

/// The loops of a machine. When this is dropped, their threads end.
pub struct Loops {
    /// Where their workers ask `main`.
    errands: Arc<Errands>,
    /// The one on which the workers of devices run that have none of their own, once there is such a device.
    shared: Option<Arc<Loop>>,
    /// Those that devices have of their own.
    own: Vec<Arc<Loop>>,
}

impl Loops {
    /// None yet.
    pub fn new(errands: &Arc<Errands>) -> Self {
        Self { errands: errands.clone(), shared: None, own: Vec::new() }
    }

    /// Makes the loop that devices share, before there is a device.
    pub fn make_shared(&mut self) -> Result<()> {
        self.shared = Some(Loop::new(SHARED, &self.errands)?);
        Ok(())
    }

    /// Loops for a device that wants so many of its own; 0: it shares one. They belong to the machine once
    /// [`Self::keep`] is called.
    pub fn for_device(&self, threads: usize) -> Result<Vec<Arc<Loop>>> {
        match (threads, &self.shared) {
            (0, Some(shared)) => Ok(vec![shared.clone()]),
            (0, None) => Ok(vec![Loop::new(SHARED, &self.errands)?]),
            _ => (0..threads).map(|index| Loop::new(format!("{SHARED}-{index}"), &self.errands)).collect(),
        }
    }

    /// Keeps what [`Self::for_device`] gave for the same device.
    pub fn keep(&mut self, threads: usize, loops: Vec<Arc<Loop>>) {
        match threads {
            0 => self.shared = loops.into_iter().next(),
            _ => self.own.extend(loops),
        }
    }

    /// Ends those of `loops` that are a device's own. The shared one stays.
    pub fn end_own(&mut self, loops: &[Arc<Loop>]) {
        let (ended, kept) = std::mem::take(&mut self.own)
            .into_iter()
            .partition(|own| loops.iter().any(|other| Arc::ptr_eq(own, other)));
        self.own = kept;
        let ended: Vec<_> = ended;
        ended.iter().for_each(Loop::end);
    }

    /// Starts the threads of those that have none.
    pub fn start(&self) -> Result<()> {
        self.all().try_for_each(Loop::start)
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Loop>> {
        self.shared.iter().chain(&self.own)
    }
}

impl Drop for Loops {
    fn drop(&mut self) {
        self.all().for_each(Loop::end);
    }
}
