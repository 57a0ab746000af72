//! The images beneath a qcow2 image. What an image names is its author's word, and the author may
//! be anybody: it is followed only where the configuration names the same, or within the folder
//! where the topmost image lies. Nor is a configuration followed to a file that the image does not mean.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use imago::FormatAccess;
use imago::qcow2::Qcow2;
use imago::raw::Raw;

use super::header::Header;
use super::layer::Layer;
use crate::devices::block::config::{Backing, Format};
use crate::devices::block::image::measure;
use crate::devices::lock::lock;
use crate::error::{Context, Error, Result};
use crate::host::{Access, Host, Sharing};

/// Each image beneath costs descriptors, caches, and a step for what none above it has.
const DEPTH_MAX: usize = 16;

/// Opens the images of a chain, one after the other.
pub struct Chain<'a> {
    what: &'a str,
    host: &'a mut Host,
    sharing: Sharing,
    /// The folder of the topmost image, without symbolic links: other images lie within it...
    folder: PathBuf,
    /// ...unless the configuration names them.
    named: Option<std::slice::Iter<'a, Backing>>,
    seen: Vec<(u64, u64)>,
    /// The images beneath the topmost one, in the order in which they were found.
    beneath: Vec<Backing>,
}

impl<'a> Chain<'a> {
    /// A chain whose topmost image is at `path`.
    pub fn new(
        what: &'a str,
        host: &'a mut Host,
        lock: bool,
        path: &Path,
        named: Option<&'a [Backing]>,
    ) -> Result<Self> {
        let path = path.canonicalize().context("find its folder")?;
        let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
        let sharing = host.sharing(lock);
        let named = named.map(<[_]>::iter);
        Ok(Self { what, host, sharing, folder, named, seen: Vec::new(), beneath: Vec::new() })
    }

    /// Opens the topmost image, in `layer`, with all images beneath it, and returns which these are, too.
    pub fn open(
        mut self,
        layer: Layer,
        path: &Path,
        access: Access,
    ) -> Result<(FormatAccess<Layer>, Vec<Backing>)> {
        self.enter(layer.file())?;
        let image = self.image(layer, path, access)?;
        match self.named.as_mut().and_then(Iterator::next) {
            Some(left) => Err(Error::config(format!(
                "`backing` names `{}`, but no image says that something is beneath it",
                left.path_on_host.display()
            ))),
            None => Ok((image, self.beneath)),
        }
    }

    fn image(&mut self, layer: Layer, path: &Path, access: Access) -> Result<FormatAccess<Layer>> {
        let mut image = Qcow2::<Layer>::open_image(layer, access == Access::ReadWrite)
            .map_err(|error| Error::config(error.to_string()))?;
        image.set_data_file(None);
        let name = image.implicit_backing_file().cloned();
        let format = image.implicit_backing_format().cloned();
        let beneath = match name {
            Some(name) => {
                let attempt = || format!("use the image beneath it, `{name}`");
                Some(self.beneath(&name, format.as_deref(), path).with_context(attempt)?)
            }
            None => None,
        };
        image.set_backing(beneath);
        Ok(FormatAccess::new(image))
    }

    /// Notes that a file is part of the chain.
    fn enter(&mut self, file: &File) -> Result<()> {
        let metadata = file.metadata().context("look at it")?;
        let identity = (metadata.dev(), metadata.ino());
        if self.seen.contains(&identity) {
            return Err(Error::config("it is beneath itself: the images form a loop"));
        }
        if self.seen.len() > DEPTH_MAX {
            return Err(Error::config(format!(
                "more than {DEPTH_MAX} images are beneath: `qemu-img rebase`"
            )));
        }
        self.seen.push(identity);
        Ok(())
    }

    fn beneath(&mut self, name: &str, format: Option<&str>, above: &Path) -> Result<FormatAccess<Layer>> {
        let (path, format) = match &mut self.named {
            Some(named) => {
                let backing =
                    named.next().ok_or_else(|| Error::config("`backing` does not name it: add it"))?;
                check_same(name, above, &backing.path_on_host)?;
                check_format(format, backing)?;
                (backing.path_on_host.clone(), backing.format)
            }
            None => (self.within_folder(name, above)?, told(format)?),
        };
        let file = self.host.file(self.what, &path, Access::Read, self.sharing)?;
        self.enter(&file)?;
        lock(&file, Access::Read, self.sharing, self.what, &path)?;
        self.beneath.push(Backing { path_on_host: path.clone(), format });
        match format {
            Format::Qcow2 => {
                let header = Header::read(&file, measure(&file, &path)?, Access::Read)?;
                header.warn(&path);
                self.image(Layer::image(file, header.mark.is_some()), &path, Access::Read)
            }
            Format::Raw => {
                let raw = Raw::open_image(Layer::raw(file), false).context("measure it")?;
                Ok(FormatAccess::new(raw))
            }
        }
    }

    /// The place that `name`, in the image at `above`, means, if that is in the folder.
    fn within_folder(&self, name: &str, above: &Path) -> Result<PathBuf> {
        let path = place(name, above).ok_or_else(|| Error::config("it is not the path of a file"))?;
        let path = path.canonicalize().context("find it")?;
        if !path.starts_with(&self.folder) {
            return Err(Error::config(format!(
                "it is at `{}`, outside the image's folder: name it in `backing`, if it is to be used",
                path.display()
            )));
        }
        Ok(path)
    }
}

/// The place that `name`, in the image at `above`, means; None: that is no file.
fn place(name: &str, above: &Path) -> Option<PathBuf> {
    // `json:`, `nbd://`: QEMU's ways to name what is no file.
    let is_file = !name.split('/').next().is_some_and(|first| first.contains(':'));
    is_file.then(|| above.parent().unwrap_or(Path::new("/")).join(name))
}

/// Refuses an image that is listed as the one beneath the image at `above`, if that names another one: what is above has
/// only the clusters that differ from its own base, and over another one it is no sound disk. A name at which there is
/// nothing any more says nothing: the image beneath was moved.
fn check_same(name: &str, above: &Path, listed: &Path) -> Result<()> {
    let look = |path: &Path| std::fs::metadata(path).ok();
    let own = place(name, above).and_then(|path| look(&path));
    let Some((own, other)) = own.zip(look(listed)) else { return Ok(()) };
    let are_devices = own.file_type().is_block_device() && other.file_type().is_block_device();
    if (own.dev(), own.ino()) == (other.dev(), other.ino()) || are_devices && own.rdev() == other.rdev() {
        return Ok(());
    }
    Err(Error::config(format!(
        "`backing` has `{}` there, which is another file: have it name what the image names, or leave it out; an image \
         that was copied to another one gets that by `qemu-img rebase -u -b`",
        listed.display()
    )))
}

/// Refuses an image that is listed with another format than the image above it says: the guest would read a qcow2 image's
/// tables as its own disk, or what a guest wrote into a raw image as tables.
fn check_format(format: Option<&str>, listed: &Backing) -> Result<()> {
    match format.map(|format| (format, told(Some(format)))) {
        Some((format, Ok(known))) if known != listed.format => Err(Error::config(format!(
            "`backing` has `{}` there with another format than `{format}`, which the image says: have it say the same, or \
             `qemu-img rebase -u -F FORMAT`",
            listed.path_on_host.display()
        ))),
        // A format that is told in the list alone, or that the list puts right, is the list's.
        _ => Ok(()),
    }
}

fn told(format: Option<&str>) -> Result<Format> {
    match format {
        Some("raw" | "file") => Ok(Format::Raw),
        Some("qcow2") => Ok(Format::Qcow2),
        Some(other) => Err(Error::config(format!("its format `{other}` is not supported"))),
        None => Err(Error::config(
            "its format is not told, and never guessed: name it in `backing`, or `qemu-img rebase -u -F FORMAT`",
        )),
    }
}
