//! A machine that leaves its process: its state and its memory in files, and the way back.

pub mod diff;
pub mod folder;
pub mod line;
pub mod memory_file;
pub mod merge;
pub mod pagemap;
pub mod pages;
pub mod rebase;
pub mod replaced;
pub mod state_file;
pub mod stored;
pub mod working_set;
