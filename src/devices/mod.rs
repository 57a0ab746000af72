//! The devices: those at fixed places here, each in a file of its own.

pub mod console;
pub mod exit;
pub mod keyboard;
pub mod power;
pub mod rtc;
