//! What the device counts. Directions are the guest's.

use crate::metrics::Counter;

crate::metrics::metrics! {
    /// Of all connections; names as in Firecracker's metrics, where it counts the same.
    pub struct Metrics {
        /// Turns that a kick for received packets began.
        rx_queue_event_count: Counter,
        /// Turns that a kick for sent packets began.
        tx_queue_event_count: Counter,
        /// Bytes that the guest was sent.
        rx_bytes_count: Counter,
        /// Bytes that the guest sent.
        tx_bytes_count: Counter,
        /// Packets that the guest was sent.
        rx_packets_count: Counter,
        /// Packets that the guest sent.
        tx_packets_count: Counter,
        /// System calls that read bytes of the host's programs.
        rx_call_count: Counter,
        /// System calls that gave the host's programs bytes.
        tx_call_count: Counter,
        /// Packets of the guest's that make no sense.
        tx_malformed_packets: Counter,
        /// Reads that failed.
        rx_read_fails: Counter,
        /// Writes that failed.
        tx_write_fails: Counter,
        /// Connections that there were, or that somebody asked for.
        conns_added: Counter,
        /// Connections that were reset, by whichever side.
        conns_killed: Counter,
        /// Connections that are no more.
        conns_removed: Counter,
        /// Connections that a limit has refused, or ended.
        conns_refused: Counter,
    }
}
