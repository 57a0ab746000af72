//! This bench measures what a guest's memory costs a restore: a guest that has 4 GiB beside one of 128 MiB, both of
//! which touch the same pages.

use std::process::Command;

use crate::Result;
use crate::counters::own_memory;
use crate::restore::{Bench, MEMORY_MIB, ROWS, Row, Way};
use crate::start::median;
use crate::table::verdict;

const LARGE_MIB: u32 = 4096;
/// How many times as much a restore of the large guest may cost.
const RATIO_MAX: f64 = 1.1;

/// The time and the memory of one way to restore, of both sizes.
#[derive(Default)]
struct Measured {
    alula: [Vec<f64>; 2],
    floor: [Vec<f64>; 2],
    own_kib: [Vec<f64>; 2],
}

/// The table of both sizes, as the least of `runs`: a difference of two medians of a busy machine says nothing. KVM's
/// call for a slot takes longer for a larger one: the floor program times that call, and the ratio leaves it out where
/// it is made after the request.
pub fn sizes(ours: &str, runs: usize) -> Result<()> {
    let benches = [Bench::new(ours, MEMORY_MIB)?, Bench::new(ours, LARGE_MIB)?];
    let (mut rows, mut slots) = (ROWS.map(|_| Measured::default()), [Vec::new(), Vec::new()]);
    for _ in 0..runs {
        for (place, bench) in benches.iter().enumerate() {
            for (Row(_, way, mode, ..), row) in ROWS.iter().zip(&mut rows) {
                let restored = bench.one(*way)?;
                row.alula[place].push(restored.wall_ms);
                row.own_kib[place].push(own_memory(restored.child.id())? as f64);
                restored.end()?;
                let restored = bench.one_floor(mode)?;
                row.floor[place].push(restored.wall_ms);
                restored.end()?;
            }
            slots[place].push(slots_ms(bench.floor("slots"))?);
        }
    }
    let slots = slots.map(|slots| least(&slots));
    println!(
        "the same with {LARGE_MIB} MiB: ms, of which KVM's call for the slots; the least of {runs} runs"
    );
    let [small, large] = [MEMORY_MIB, LARGE_MIB].map(|mib| format!("{mib} MiB"));
    println!("{:<34} {small:>9} {large:>9} {:>8} {:>8} {:>6}", "", "slots", "slots", "ratio");
    for (Row(name, way, ..), row) in ROWS.iter().zip(&rows) {
        // A warm service and a parked clone have their slots before they are asked.
        let slots = if matches!(way, Way::Warm | Way::Resume) { [0.0; 2] } else { slots };
        print_row(name, &row.alula, slots);
        print_row("  floor", &row.floor, slots);
    }
    println!("anonymous memory, KiB:");
    for (Row(name, ..), row) in ROWS.iter().zip(&rows) {
        let [small, large] = row.own_kib.each_ref().map(|values| median(values));
        println!("{name:<34} {small:>9.0} {large:>9.0} {}", judged(large / small, 24));
    }
    Ok(())
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn print_row(name: &str, times: &[Vec<f64>; 2], slots: [f64; 2]) {
    let [small, large] = times.each_ref().map(|values| least(values));
    let ratio = (large - slots[1]) / (small - slots[0]);
    println!("{name:<34} {small:>9.2} {large:>9.2} {:>8.3} {:>8.3} {}", slots[0], slots[1], judged(ratio, 6));
}

fn judged(ratio: f64, width: usize) -> String {
    // Too few runs on a busy machine: the call alone took longer than all of a restore.
    let told = if ratio > 0.0 { verdict(ratio <= RATIO_MAX) } else { "not measured" };
    format!("{ratio:>width$.2}  <= {RATIO_MAX}: {told}")
}

/// The time that KVM's call for the slots takes, in ms, by the floor program's word.
fn slots_ms(mut floor: Command) -> Result<f64> {
    let output = floor.output()?;
    if !output.status.success() {
        return Err(format!("the floor program could not make its slots: {}", output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?.trim().parse::<f64>()? / 1e6)
}
