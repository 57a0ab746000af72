//! What the host does with the agent in a guest (docs/agent.md), and what a guest is made of whose first program the
//! agent is.

pub mod boot;
pub mod call;
pub mod cpio;
pub mod fetch;
pub mod hearing;
pub mod images;
pub mod kernel;
pub mod modules;
pub mod program;
pub mod root_image;
pub mod runtime;
pub mod tree;
