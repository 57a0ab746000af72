//! The clocks of restored guests go on when they do: their timers, and the counters of their CPUs.

use super::*;

#[test]
fn a_sleeping_cpu_is_woken_by_its_timer_after_a_restore() {
    let naps = std::env::var(POINTS).map_or(10, |points| points.parse::<usize>().unwrap().min(50));
    let ground = Ground::new();
    let screen = Screen::default();
    let mut machine = boot(&ground.config(false, 1, "case=sleep"), &screen);
    for nap in 1..=naps {
        wait_for(|| screen.text().contains(&format!("nap {nap}\n")));
        // The CPU sleeps, or is about to: its timer is what brings it to the next nap.
        machine.pause().unwrap();
        machine = Suspended::new(machine).go_on(&screen);
    }
    end(&machine, &screen);
}

#[test]
fn the_counters_of_two_cpus_are_one_after_each_restore() {
    let ground = Ground::new();
    let screen = Screen::default();
    let mut machine = boot(&ground.config(false, 2, "case=counters"), &screen);
    wait_for(|| screen.text().contains("counting\n"));
    for generation in 0..4 {
        if generation > 0 {
            machine.pause().unwrap();
            machine = Suspended::new(machine).go_on(&screen);
        }
        machine.type_on_console(b"!");
        wait_for(|| screen.text().matches("counted\n").count() > generation || machine.exit().is_some());
    }
    machine.type_on_console(b"\n");
    end(&machine, &screen);
}
