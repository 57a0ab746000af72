//! A guest's calls about the power of its CPUs, where this process answers them, in words of any architecture.

/// A call by which a guest switches CPUs on and off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerCall {
    /// Another CPU is to be switched on.
    On {
        /// Its number; none: no CPU has the name that the guest gives.
        cpu: Option<usize>,
        /// The address at which the CPU begins, whatever is there.
        entry: u64,
        /// The value that the CPU finds in its first register.
        argument: u64,
    },
    /// The CPU that calls is to be switched off.
    Off,
}

/// An answer to [`PowerCall::On`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerAnswer {
    /// The CPU is on.
    IsOn,
    /// The CPU was on already.
    WasOn,
    /// The guest has not been given the CPU.
    Denied,
    /// There is no such CPU.
    NoSuchCpu,
}
