//! This bench measures what a network of passt costs a restore, which starts a passt of its own for it: a guest that has
//! one beside a guest that has no network.

use crate::restore::{Bench, Guest, MEMORY_MIB, ROWS, Row, spread};
use crate::start::median;
use crate::{Folder, Result};

/// The table of both guests, as medians of `runs`, where passt is installed.
pub fn networks(ours: &str, runs: usize) -> Result<()> {
    if let Err(error) = alula::host::passt::find() {
        println!("the same with a network of passt (--net user): not measured: {error}");
        return Ok(());
    }
    let guest = Guest { memory_mib: MEMORY_MIB, words: "answer", ready: "A\n", has_passt: true };
    let benches = [Bench::new(ours, MEMORY_MIB)?, Bench::of(ours, &guest, Folder::new()?)?];
    let mut times = ROWS.map(|_| [Vec::new(), Vec::new()]);
    for _ in 0..runs {
        for (Row(_, way, ..), times) in ROWS.iter().zip(&mut times) {
            for (bench, times) in benches.iter().zip(times) {
                let restored = bench.one(*way)?;
                times.push(restored.wall_ms);
                restored.end()?;
            }
        }
    }
    println!("the same with a network of passt, ms; medians (least, p99) of {runs} runs");
    println!("{:<34} {:>23} {:>23} {:>6}", "", "no network", "--net user", "more");
    for (Row(name, ..), [without, with]) in ROWS.iter().zip(&times) {
        let more = median(with) - median(without);
        println!("{name:<34} {} {} {more:>6.2}", spread(without), spread(with));
    }
    Ok(())
}
