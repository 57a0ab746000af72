//! What is done to the file of an image by one request, or by none.

use super::medium::record;
use super::model::{CLUSTER, PLAIN, image, open, walk};
use crate::devices::block::config::CacheType;
use crate::host::Local;
use crate::virtio::buffers::Buffers;

#[test]
fn a_sync_that_failed_in_a_write_fails_every_flush_after_it() {
    let opened = open(&image(PLAIN), CacheType::Writeback);
    opened.write(1, 0, 4);
    opened.qcow2.flush(true).unwrap();
    // Acknowledged, and not yet flushed.
    opened.write(2, 0, 1);
    // What is given back must be durable before a cluster is allocated: the next write syncs.
    opened.qcow2.discard(2 * CLUSTER as u64, CLUSTER as u64).unwrap();
    record::fail_next_sync();
    let mut buffers = Buffers::new(opened.memory.clone());
    buffers.add_piece(0, CLUSTER as u32).unwrap();
    opened.qcow2.write(&mut buffers, 300 * CLUSTER as u64).unwrap_err();
    for _ in 0..3 {
        opened.qcow2.flush(true).expect_err("the host has told of the loss, and only once");
    }
    // The image that is opened anew is written whole, and flushed again.
    let again = opened.qcow2.again(&opened.config, &mut Local::default()).unwrap();
    again.flush(true).unwrap();
    let content = walk(&opened.content()).unwrap();
    assert_eq!(content[..4], [2, 1, 0, 1]);
}
