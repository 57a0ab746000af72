//! Where the pages of guest memory come from.

use std::fs::File;

use super::Range;
use super::faults::Faults;
use super::mapping::{HUGE_PAGE, page_size};
use crate::error::{Context, Error, Result};

/// Where the pages of guest memory come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'s> {
    /// Zeros. They are this process's own.
    Anonymous,
    /// Zeros in huge pages of 2 MiB of the host's pool (hugetlbfs), all of which are set aside for this process when
    /// they are mapped.
    Huge,
    /// Zeros, in a file without a name for each region ([`super::Region::file`]), which another process can map, too.
    Shared,
    /// Pages that another process gives, each when it is first touched.
    Served(&'s Faults),
    /// Huge pages as of `Huge` that another process gives, each as a whole when it is first touched.
    ServedHuge(&'s Faults),
    /// The content of a file, as a copy that this process changes for itself: a page is read when it is first
    /// touched. What no piece is for is zeros. Nobody may make the file shorter meanwhile: a page
    /// that is gone from it would end the process (SIGBUS).
    Private {
        /// A regular file, open for reading.
        file: &'s File,
        /// What is where in it.
        pieces: &'s [Piece],
    },
}

impl<'s> Source<'s> {
    /// The content of this source, in files that another process can map, too.
    ///
    /// # Errors
    /// The content is not zeros, and what of it is written is this process's own.
    pub fn to_share(self) -> Result<Self> {
        match self {
            Self::Anonymous | Self::Shared => Ok(Self::Shared),
            _ => Err(Error::config(
                "the memory of a guest that is restored cannot be shared with a vhost-user backend (`socket` of a disk)",
            )),
        }
    }

    /// The content of this source, in huge pages of 2 MiB of the host's pool.
    ///
    /// # Errors
    /// The pages are those of a file, of the size that its file system has.
    pub fn in_huge_pages(self) -> Result<Self> {
        match self {
            Self::Anonymous | Self::Huge => Ok(Self::Huge),
            Self::Served(faults) | Self::ServedHuge(faults) => Ok(Self::ServedHuge(faults)),
            Self::Shared => Err(Error::config(
                "memory that is shared with a vhost-user backend (`socket` of a disk) cannot be of huge pages of 2 MiB: \
                 say `None` for its pages (`huge_pages`)",
            )),
            Self::Private { .. } => Err(Error::config(
                "memory that is mapped from a file cannot be of huge pages of 2 MiB: have a page-fault handler give \
                 it (`mem_backend` of the type `Uffd`), or say `None` for its pages (`huge_pages`)",
            )),
        }
    }

    /// Whether its pages are huge ones of the host's pool.
    pub(super) fn is_huge(self) -> bool {
        matches!(self, Self::Huge | Self::ServedHuge(_))
    }

    /// By what another process gives its pages, if one does.
    pub(super) fn faults(self) -> Option<&'s Faults> {
        match self {
            Self::Served(faults) | Self::ServedHuge(faults) => Some(faults),
            _ => None,
        }
    }

    /// Whether it can be a source for memory at `ranges`.
    pub(super) fn check(self, ranges: &[Range]) -> Result<()> {
        match self {
            Self::Huge | Self::ServedHuge(_) => match ranges.iter().find(|range| !is_whole_huge_pages(range))
            {
                Some(range) => {
                    Err(Error::config(format!("{range} of guest memory is not whole huge pages of 2 MiB")))
                }
                None => Ok(()),
            },
            Self::Anonymous | Self::Shared | Self::Served(_) => Ok(()),
            Self::Private { file, pieces } => {
                check_pieces(ranges, file, pieces).context("map guest memory from its file")
            }
        }
    }
}

fn is_whole_huge_pages(range: &Range) -> bool {
    (range.start | range.size).is_multiple_of(HUGE_PAGE as u64)
}

/// A part of guest memory that a file has the content of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The part, in one region.
    pub range: Range,
    /// Where it begins in the file, in bytes.
    pub position: u64,
}

/// Whether every piece is in one of `ranges` and in the file, and is whole pages, and none overlaps another.
fn check_pieces(ranges: &[Range], file: &File, pieces: &[Piece]) -> Result<()> {
    let metadata = file.metadata().context("look at it")?;
    if !metadata.is_file() {
        return Err(Error::config("it is not a regular file"));
    }
    let (page, length) = (page_size(), metadata.len());
    for Piece { range, position } in pieces {
        if range.size == 0 || !(range.start | range.size | position).is_multiple_of(page) {
            return Err(Error::config(format!(
                "{range}, from byte {position:#x} on, is not whole pages of {page} bytes"
            )));
        }
        if !ranges.iter().any(|whole| whole.contains(*range)) {
            return Err(Error::config(format!("{range} is not in one region of the guest's memory")));
        }
        if position.checked_add(range.size).is_none_or(|end| end > length) {
            return Err(Error::config(format!(
                "{range}, from byte {position:#x} on, goes beyond its {length:#x} bytes: it was cut short"
            )));
        }
    }
    let mut sorted: Vec<Range> = pieces.iter().map(|piece| piece.range).collect();
    sorted.sort_by_key(|range| range.start);
    match sorted.windows(2).find(|pair| pair[0].end() > pair[1].start) {
        Some(pair) => Err(Error::config(format!("two pieces of it overlap: {} and {}", pair[0], pair[1]))),
        None => Ok(()),
    }
}
