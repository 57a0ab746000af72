//! The frames of the agent's protocol, and its requests: the same wherever the stream is cut, and never more kept
//! than one of them.

use alula::protocol::frame::{CONTENT_MAX, HEAD, Inbox, REQUEST_MAX, Type, put};
use alula::protocol::request::Request;

/// All frames of a stream that comes in pieces of this size, and whether it broke off.
fn frames(stream: &[u8], piece: usize) -> (Vec<(Type, Vec<u8>)>, bool) {
    let (mut inbox, mut seen) = (Inbox::default(), Vec::new());
    for bytes in stream.chunks(piece) {
        inbox.push(bytes);
        loop {
            match inbox.pop() {
                Ok(Some((kind, content))) => seen.push((kind, content.to_vec())),
                Ok(None) => break,
                Err(_) => return (seen, true),
            }
        }
        inbox.shrink();
    }
    (seen, false)
}

pub fn run(bytes: &[u8]) {
    let whole = frames(bytes, bytes.len().max(1));
    for piece in [1, 3, 7, 64] {
        assert!(frames(bytes, piece) == whole, "cut into {piece}");
    }
    let mut again = Vec::new();
    for (kind, content) in &whole.0 {
        let most = if matches!(kind, Type::Request | Type::Greeting) { REQUEST_MAX } else { CONTENT_MAX };
        assert!(content.len() <= most);
        put(&mut again, *kind, content);
        if let Ok(request) = serde_json::from_slice::<Request>(content) {
            let text = serde_json::to_vec(&request).unwrap();
            let same: Request = serde_json::from_slice(&text).unwrap();
            assert!(serde_json::to_vec(&same).unwrap() == text);
        }
    }
    assert!(bytes.starts_with(&again) && (whole.1 || bytes.len() - again.len() < HEAD + REQUEST_MAX));
}
