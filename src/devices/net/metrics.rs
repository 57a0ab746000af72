//! What an interface counts.

use crate::metrics::Counter;

crate::metrics::metrics! {
    /// Of one interface, over all its queue pairs.
    pub struct Metrics {
        /// Frames that the guest received.
        rx_packets_count: Counter,
        /// Bytes of them, without the headers of virtio.
        rx_bytes_count: Counter,
        /// Receive buffers that they filled.
        rx_count: Counter,
        /// Frames lost because the guest's buffers could not hold them.
        rx_fails: Counter,
        /// How often frames may have waited because the guest gave no buffers.
        no_rx_avail_buffer: Counter,
        /// Turns that a kick for received frames began.
        rx_queue_event_count: Counter,
        /// Turns that the TAP or the stream began.
        rx_tap_event_count: Counter,
        /// System calls that read frames.
        rx_call_count: Counter,
        /// How often a frame for the guest had to wait for the limit.
        rx_rate_limiter_throttled: Counter,
        /// Frames that the guest sent.
        tx_packets_count: Counter,
        /// Bytes of them, without the headers of virtio.
        tx_bytes_count: Counter,
        /// Chains that they came in.
        tx_count: Counter,
        /// Frames that the host did not take.
        tx_fails: Counter,
        /// Chains that can be no frame.
        tx_malformed_frames: Counter,
        /// Turns that a kick for sent frames began.
        tx_queue_event_count: Counter,
        /// System calls that wrote frames.
        tx_call_count: Counter,
        /// How often a frame of the guest's had to wait for the limit.
        tx_rate_limiter_throttled: Counter,
    }
}
