//! `alula agent`: what this program does inside a guest.

use std::os::unix::net::UnixListener;

use super::arguments::agent::Agent;
use crate::agent::{self, Listener};
use crate::archive;
use crate::error::{Context, Result};

/// Does what is said; one that listens does so for ever.
pub fn run(agent: Agent) -> Result<()> {
    match agent {
        Agent::Port(port) => agent::Agent::new(Listener::vsock(port)?)?.run(),
        Agent::Socket(path) => {
            let listener = UnixListener::bind(&path)
                .with_context(|| format!("listen on socket `{}`", path.display()))?;
            agent::Agent::new(Listener::unix(listener)?)?.run()
        }
        Agent::Send(path) => {
            archive::send(&path, std::io::stdout().lock(), |line| eprintln!("alula: {line}"))
        }
        Agent::Receive(path, name, parents) => {
            if parents {
                let folder = crate::paths::folder(&path);
                std::fs::create_dir_all(folder).with_context(|| format!("create `{}`", folder.display()))?;
            }
            let is_root = agent::is_root();
            archive::receive(&archive::target(&path, &name), std::io::stdin().lock(), is_root)
        }
    }
}
