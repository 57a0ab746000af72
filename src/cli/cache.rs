//! `alula cache`: the images that folders were packed into.

use std::time::UNIX_EPOCH;

use crate::clock::Utc;
use crate::error::Result;
use crate::guest::images::Images;

fn mib(size: u64) -> u64 {
    size.div_ceil(1 << 20)
}

/// Removes the images that no guest uses, and returns what to tell.
pub fn clear() -> Result<String> {
    let removed = Images::of_user().clear(|line| eprintln!("alula: {line}"))?;
    let in_use = if removed.in_use > 0 { format!("; guests use {}", removed.in_use) } else { String::new() };
    Ok(format!("removed {} images, {} MiB{in_use}\n", removed.count, mib(removed.size)))
}

/// Describes the images that there are.
pub fn show() -> String {
    let images = Images::of_user();
    let list = images.list();
    let mut text = String::new();
    for image in &list {
        let used = Utc(image.used_last.duration_since(UNIX_EPOCH).unwrap_or_default());
        let when = if image.is_in_use { format!("{:24}", "in use") } else { used.to_string() };
        // A name can have line breaks.
        let origin = crate::log::in_one_line(image.origin.display());
        text += &format!("{:6} MiB  {when}  {origin}\n", mib(image.size));
    }
    let total = list.iter().map(|image| image.size).sum();
    text + &format!("{} images, {} MiB, in `{}`\n", list.len(), mib(total), images.folder.display())
}
