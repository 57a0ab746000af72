//! The line of metrics: what everything counts, in one JSON object, in the shape of Firecracker's where
//! it counts the same. `GET /metrics` has the totals.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::counts;
use crate::clock::{self, Utc};
use crate::descriptors;
use crate::error::Result;
use crate::log;
use crate::machine::Machine;
use crate::metadata;
use crate::metrics::{Config, Group, View};
use crate::process;
use crate::sink::{Purpose, Sink};

/// How often a line is written by itself.
const PERIOD: Duration = Duration::from_secs(60);

/// Where lines are written.
pub struct MetricsFile {
    config: Config,
    sink: Sink,
    due: Instant,
}

impl MetricsFile {
    /// Opens the file or FIFO. The first line is written when the machine starts.
    pub fn open(config: Config) -> Result<Self> {
        let sink = Sink::open(Purpose::Metrics, &config.metrics_path)?;
        log::debug(format_args!("opened metrics file `{}` to write", config.metrics_path.display()));
        Ok(Self { config, sink, due: Instant::now() + PERIOD })
    }

    /// Whether it is time for a line.
    pub fn is_due(&self) -> bool {
        self.due <= Instant::now()
    }

    /// Writes a line with what is new since the last one. Nothing is counted as told while nobody reads:
    /// the line is left out, and that is counted.
    pub fn write(&mut self, id: &str, machine: Option<&Machine>) {
        self.due = Instant::now() + PERIOD;
        if !self.sink.flush() {
            log::METRICS.missed_metrics_count.add(1);
            return;
        }
        log::debug(format_args!("open descriptors: {}", descriptors::List));
        let mut line = collect(machine, View::New);
        if self.config.emit_id {
            line.insert("id".to_owned(), id.into());
        }
        if let Some(properties) = &self.config.properties {
            line.insert("properties".to_owned(), json!(properties));
        }
        let line = format!("{}\n", Value::Object(line));
        if !self.sink.write_line(line.as_bytes()) {
            log::METRICS.missed_metrics_count.add(1);
        }
    }

    /// Goes on with a line that a slow reader had no room for.
    pub fn flush(&mut self) {
        self.sink.flush();
    }
}

/// Everything that is counted.
pub fn collect(machine: Option<&Machine>, view: View) -> Map<String, Value> {
    let mut all = counts::collect(view);
    all.insert("utc_timestamp_ms".to_owned(), (Utc::now().0.as_millis() as u64).into());
    all.insert("logger".to_owned(), log::METRICS.collect(view));
    all.insert("mmds".to_owned(), metadata::METRICS.collect(view));
    let mut start = Map::new();
    if let Some(machine) = machine {
        all.extend(machine.metrics(view));
        let step = |(name, time): &(&str, Duration)| ((*name).to_owned(), (time.as_micros() as u64).into());
        start.extend(machine.timeline().steps().iter().map(step));
    }
    let process = json!({
        "uptime_ms": clock::uptime().as_millis() as u64,
        "cpu_us": process::cpu_us(None),
        "memory": process::memory(None),
        "start_us": start,
    });
    all.insert("process".to_owned(), process);
    complete(&mut all);
    all
}

/// Parsers of Firecracker's lines want every field of every group, of devices too that are not there:
/// what is not counted here is 0, as there.
fn complete(all: &mut Map<String, Value>) {
    for line in SHAPE.lines() {
        let (group, fields) = line.split_once(':').expect("every line is a group and its fields");
        let group = all.entry(group).or_insert_with(|| json!({}));
        let Value::Object(group) = group else { continue };
        for field in fields.split_whitespace() {
            group.entry(field).or_insert_with(|| match field.ends_with("_agg") {
                true => json!({ "min_us": 0, "max_us": 0, "sum_us": 0 }),
                false => json!(0),
            });
        }
    }
}

/// The groups of Firecracker's metrics and their fields, as parsers of 1.x know them. One text: a table of
/// pointers would have to be relocated whenever the process starts.
const SHAPE: &str = "\
api_server: process_startup_time_us process_startup_time_cpu_us sync_response_fails \
    sync_vmm_send_timeout_count
balloon: activate_fails inflate_count stats_updates_count stats_update_fails deflate_count \
    event_fails free_page_report_count free_page_report_freed free_page_report_fails \
    free_page_hint_count free_page_hint_freed free_page_hint_fails
block: activate_fails cfg_fails no_avail_buffer event_fails execute_fails invalid_reqs_count \
    flush_count queue_event_count rate_limiter_event_count update_count update_fails read_bytes \
    write_bytes read_count write_count read_agg write_agg rate_limiter_throttled_events \
    io_engine_throttled_events remaining_reqs_count
deprecated_api: deprecated_http_api_calls deprecated_cmd_line_api_calls
entropy: activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails \
    entropy_rate_limiter_throttled rate_limiter_event_count
get_api_requests: instance_info_count machine_cfg_count mmds_count vmm_version_count \
    hotplug_memory_count
i8042: error_count missed_read_count missed_write_count read_count write_count reset_count
latencies_us: full_create_snapshot diff_create_snapshot load_snapshot pause_vm resume_vm \
    vmm_full_create_snapshot vmm_diff_create_snapshot vmm_load_snapshot vmm_pause_vm vmm_resume_vm
logger: missed_metrics_count metrics_fails missed_log_count log_fails
memory_hotplug: activate_fails queue_event_fails queue_event_count plug_agg plug_count plug_bytes \
    plug_fails unplug_agg unplug_count unplug_bytes unplug_fails unplug_discard_fails \
    unplug_all_agg unplug_all_count unplug_all_fails state_agg state_count state_fails
mmds: rx_accepted rx_accepted_err rx_accepted_unusual rx_bad_eth rx_count tx_bytes tx_count \
    tx_errors tx_frames connections_created connections_destroyed
net: activate_fails cfg_fails mac_address_updates no_rx_avail_buffer no_tx_avail_buffer \
    event_fails rx_queue_event_count rx_event_rate_limiter_count rx_partial_writes \
    rx_rate_limiter_throttled rx_tap_event_count rx_bytes_count rx_packets_count rx_fails rx_count \
    tap_read_fails tap_write_fails tap_write_agg tx_bytes_count tx_malformed_frames tx_fails \
    tx_count tx_packets_count tx_partial_reads tx_queue_event_count tx_rate_limiter_event_count \
    tx_rate_limiter_throttled tx_spoofed_mac_count tx_remaining_reqs_count
patch_api_requests: drive_count drive_fails network_count network_fails machine_cfg_count \
    machine_cfg_fails mmds_count mmds_fails pmem_count pmem_fails hotplug_memory_count \
    hotplug_memory_fails
pmem: activate_fails cfg_fails event_fails queue_event_count rate_limiter_throttled_events \
    rate_limiter_event_count
put_api_requests: actions_count actions_fails boot_source_count boot_source_fails drive_count \
    drive_fails logger_count logger_fails machine_cfg_count machine_cfg_fails cpu_cfg_count \
    cpu_cfg_fails metrics_count metrics_fails network_count network_fails mmds_count mmds_fails \
    vsock_count vsock_fails pmem_count pmem_fails hotplug_memory_count hotplug_memory_fails
seccomp: num_faults
signals: sigbus sigsegv sigxfsz sigxcpu sigpipe sighup sigill
uart: error_count flush_count missed_read_count missed_write_count read_count write_count
vcpu: exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures exit_io_in_agg \
    exit_io_out_agg exit_mmio_read_agg exit_mmio_write_agg
vmm: device_events panic_count
vsock: activate_fails cfg_fails rx_queue_event_fails tx_queue_event_fails ev_queue_event_fails \
    muxer_event_fails conn_event_fails rx_queue_event_count tx_queue_event_count rx_bytes_count \
    tx_bytes_count rx_packets_count tx_packets_count conns_added conns_killed conns_removed \
    killq_resync tx_flush_fails tx_write_fails rx_read_fails
";
