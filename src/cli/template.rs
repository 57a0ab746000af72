//! `alula template`: a process that makes clones of a snapshot, and what such a clone does first of all. `alula clone`,
//! by which people ask for clones.

use std::path::Path;

use serde_json::{Value, json};

use super::arguments::template::{Clones, Template};
use super::{FAILED_SERVE, conclude, ctl, finish, listen, served};
use crate::api::BODY_MAX;
use crate::api::client::Client;
use crate::api::template::{self, Newborn, Order, Turn};
use crate::clock;
use crate::error::{Context, Error, Result};
use crate::guest::runtime;
use crate::history;
use crate::log;
use crate::microvm::Microvm;
use crate::microvm::monitor::{Ending, Monitor};
use crate::microvm::signals::{self, Signals};
use crate::microvm::snapshots::Opened;
use crate::sys::descriptor;
use crate::walls::{self, Wanted};

/// The name of a microVM that nobody has named.
const DEFAULT_ID: &str = "anonymous-instance";

/// Makes this process a template, or then a clone, and returns the exit code.
pub fn run(arguments: &Template) -> u8 {
    match serve(arguments) {
        Ok(Turn::Ended(signal)) => signals::exit_code(signal),
        Ok(Turn::Clone(newborn)) => {
            clock::begin();
            history::open(newborn.order.id.as_deref().unwrap_or(DEFAULT_ID));
            finish(Ok(None), FAILED_SERVE, |_| live(*newborn, &arguments.walls))
        }
        Err(error) => super::told(Err(error)),
    }
}

fn serve(arguments: &Template) -> Result<Turn> {
    // All clones would have the inherited descriptors: a terminal's keys would be anybody's, and a TAP interface
    // everybody's.
    descriptor::close_inherited().context("close descriptors that were inherited")?;
    descriptor::empty_standard_input().context("open /dev/null as standard input")?;
    let opened = Opened::open(&arguments.location, false)?.with_kvm()?;
    signals::end_when_refused();
    walls::keep_first(&arguments.walls)?;
    template::Template::new(opened, &arguments.api_sock)?.serve()
}

/// Makes this process a clone with these walls until its guest has ended.
fn live(newborn: Newborn, wanted: &Wanted) -> Result<Ending> {
    let Newborn { order, opened, report } = newborn;
    let (mut monitor, microvm) = match prepare(&order, wanted) {
        Ok(made) => made,
        Err(error) => {
            report.tell(Err(&error));
            return Ok(told_by_template(conclude(&Err(error), FAILED_SERVE, served)));
        }
    };
    let (mut report, mut left) = (Some(report), None);
    let start = |microvm: &mut Microvm| {
        microvm.load_from(|| Ok(opened), &order.load, "PUT /clones")?;
        report.take().into_iter().for_each(|report| report.tell(Ok(())));
        Ok(())
    };
    let ending = monitor.run(microvm, start, |outcome| {
        left = outcome.as_ref().err().map(|error| Error::host(error.to_string()));
        conclude(outcome, FAILED_SERVE, served)
    });
    // A fault is told when nothing of the clone is left: a client that is told asks for another at the same socket.
    if let (Some(report), Some(error)) = (report, left) {
        report.tell(Err(&error));
        return Ok(told_by_template(ending));
    }
    Ok(ending)
}

/// The end of a clone that never was: its template, whose standard error this process has, says why. A log file of the
/// clone's own has it, too.
fn told_by_template(ending: Ending) -> Ending {
    log::end_in_file(ending.level, &ending.reason);
    Ending { reason: String::new(), ..ending }
}

/// Makes the monitor that serves the clone, and the clone's microVM, which is not loaded yet.
fn prepare(order: &Order, wanted: &Wanted) -> Result<(Monitor, Box<Microvm>)> {
    let signals = Signals::take_over();
    let id = order.id.as_deref().unwrap_or(DEFAULT_ID);
    let socket = match &order.api_sock {
        Some(path) => path.clone(),
        None => runtime::prepare(id).with_context(|| {
            format!("serve clone `{id}` by its name (set XDG_RUNTIME_DIR, or give `api_sock`)")
        })?,
    };
    let front = listen(&socket, BODY_MAX)?;
    let mut microvm = Microvm::new(id.to_owned(), order.config.clone());
    microvm.open_outputs()?;
    walls::begin(wanted, Some(&socket))?;
    Ok((Monitor::new(signals, Some(front), None)?, microvm))
}

/// Has a template make clones, and prints what they are called.
pub fn clone(clones: &Clones) -> Result<()> {
    let mut client = Client::connect_to_template(&clones.template)?;
    client.wait_for_ever()?;
    let numbers = clones.count.map_or(0..=0, |count| 1..=count);
    for number in numbers {
        let id = match number {
            0 => clones.id.clone(),
            number => format!("{}-{number}", clones.id),
        };
        let body = order(clones, &id, number)?.to_string();
        let answer =
            ctl::ask(&mut client, "PUT", "/clones", &body).with_context(|| format!("make clone `{id}`"))?;
        ctl::say(&format!("{id}: process {}", ctl::parsed(&answer)?["pid"]))?;
    }
    Ok(())
}

/// The body of the request for one clone.
fn order(clones: &Clones, id: &str, number: u32) -> Result<Value> {
    let own = |text: &str| text.replace("{id}", id).replace("{n}", &number.to_string());
    // The template may be in another folder.
    let path = |text: &str| {
        let path = own(text);
        std::path::absolute(Path::new(&path)).with_context(|| format!("find `{path}`"))
    };
    let mut body = json!({ "id": id, "resume_vm": !clones.are_paused });
    let taps = clones.taps.iter().map(|(id, tap)| json!({ "iface_id": id, "host_dev_name": own(tap) }));
    body["network_overrides"] = taps.collect();
    let drives = clones.drives.iter().map(|(id, text, is_overlay)| {
        Ok(json!({ "drive_id": id, "path_on_host": path(text)?, "overlay": is_overlay }))
    });
    body["drive_overrides"] = drives.collect::<Result<_>>()?;
    if let Some(text) = &clones.vsock {
        body["vsock_override"] = json!({ "uds_path": path(text)? });
    }
    if let Some(text) = &clones.console {
        body["serial"] = json!({ "serial_out_path": path(text)? });
    }
    Ok(body)
}
