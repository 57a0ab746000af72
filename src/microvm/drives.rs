//! The disks of a restored microVM that are to be others than it was saved with.

use std::path::PathBuf;

use crate::config::Config;
use crate::devices::block;
use crate::error::{Context, Error, Result};
use crate::host::Host;

/// A disk that is to be another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// The disk's id.
    pub id: String,
    /// Where the disk's image is, or where an image over that which the disk has is made.
    pub path: PathBuf,
    /// The images beneath a qcow2 image, the next one first; None: those that the images name.
    pub backing: Option<Vec<block::Backing>>,
    /// An image over that which the disk has is made at `path`.
    pub is_overlay: bool,
}

/// Changes the disks of `config`, and returns the images that were made for that.
///
/// # Errors
/// There is no such disk, or one is named twice; no image can be made.
pub fn replace(config: &mut Config, drives: &[Drive], host: &mut Host) -> Result<Vec<block::Overlay>> {
    let mut made = Vec::new();
    for (index, drive) in drives.iter().enumerate() {
        if drives[..index].iter().any(|other| other.id == drive.id) {
            return Err(Error::config(format!("`drive_overrides`: `{}` is there twice", drive.id)));
        }
        let attempt = || format!("`drive_overrides` of `{}`", drive.id);
        let overlay = super::snapshots::change_device(config, "drives", Some(&drive.id), |told| {
            let was: block::Config =
                serde_json::from_value(told.take()).context("read the disk's configuration")?;
            let (overlay, is) = match (drive.is_overlay, &drive.backing) {
                (false, backing) => (None, was.with_image(drive.path.clone(), backing.clone())),
                (true, None) => {
                    let (overlay, over) = block::Overlay::make(&was, &drive.path, host)?;
                    (Some(overlay), over)
                }
                (true, Some(_)) => {
                    return Err(Error::config(
                        "`backing` is what is beneath an image that there is, and `overlay` makes one: leave one of both out",
                    ));
                }
            };
            *told = serde_json::to_value(is).context("write the disk's configuration")?;
            Ok(overlay)
        });
        made.extend(overlay.with_context(attempt)?);
    }
    Ok(made)
}
