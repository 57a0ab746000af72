//! Some of the pages of guest memory: those that were written, or those that are to be saved.

use super::Range;
use super::mapping::page_size;

/// Pages of guest memory, of the host's page size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    /// The pages of each region: a bit for each page, the first of them in the lowest bit of the first word.
    regions: Vec<(Range, Vec<u64>)>,
}

impl PageSet {
    /// The pages whose bits are set, by region: a bit for each page, the first of them in the lowest bit of the first
    /// word. What is beyond the end of a region does not count.
    pub fn new(mut regions: Vec<(Range, Vec<u64>)>) -> Self {
        for (range, words) in &mut regions {
            let pages = (range.size / page_size()) as usize;
            words.truncate(pages.div_ceil(64));
            if let (Some(last), 1..) = (words.get_mut(pages / 64), pages % 64) {
                *last &= (1 << (pages % 64)) - 1;
            }
        }
        Self { regions }
    }

    /// Adds all pages of `other`.
    pub fn add(&mut self, other: &Self) {
        for (range, words) in &other.regions {
            match self.regions.iter_mut().find(|(own, _)| own == range) {
                Some((_, own)) => {
                    own.resize(own.len().max(words.len()), 0);
                    own.iter_mut().zip(words).for_each(|(own, word)| *own |= word);
                }
                None => self.regions.push((*range, words.clone())),
            }
        }
    }

    /// How many pages these are.
    pub fn count(&self) -> u64 {
        self.regions.iter().flat_map(|(_, words)| words).map(|word| u64::from(word.count_ones())).sum()
    }

    /// How many bytes they have.
    pub fn bytes(&self) -> u64 {
        self.count() * page_size()
    }

    /// The pages as ranges of guest addresses: each is as long as pages follow one another in a region.
    pub fn runs(&self) -> impl Iterator<Item = Range> {
        self.regions.iter().flat_map(|(range, words)| {
            let mut next = 0;
            std::iter::from_fn(move || {
                let first = find(words, next, true)?;
                next = find(words, first, false).unwrap_or(words.len() * 64);
                let (start, pages) = (range.start + first as u64 * page_size(), (next - first) as u64);
                Some(Range { start, size: pages * page_size() })
            })
        })
    }
}

/// The first bit from `from` on that is set, or is not.
fn find(words: &[u64], from: usize, is_set: bool) -> Option<usize> {
    let seen = |word: u64| if is_set { word } else { !word };
    let first = seen(*words.get(from / 64)?) & (u64::MAX << (from % 64));
    if first != 0 {
        return Some(from / 64 * 64 + first.trailing_zeros() as usize);
    }
    let later = (from / 64 + 1..words.len()).find(|index| seen(words[*index]) != 0)?;
    Some(later * 64 + seen(words[later]).trailing_zeros() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_added_and_told_as_runs() {
        let page = page_size();
        let ranges = [(0, 130), (4 << 30, 64)].map(|(start, pages)| Range { start, size: pages * page });
        // The last bits of the first region are beyond its end.
        let mut set = PageSet::new(vec![(ranges[0], vec![3 << 62, 1, u64::MAX])]);
        let run = |start, pages| Range { start, size: pages * page };
        assert_eq!(set.runs().collect::<Vec<_>>(), [run(62 * page, 3), run(128 * page, 2)]);
        set.add(&PageSet::new(vec![(ranges[1], vec![u64::MAX]), (ranges[0], vec![1 << 61])]));
        let runs: Vec<_> = set.runs().collect();
        assert_eq!(runs, [run(61 * page, 4), run(128 * page, 2), run(4 << 30, 64)]);
        assert_eq!((set.count(), set.bytes()), (70, 70 * page));
        set.add(&set.clone());
        assert_eq!(set.count(), 70);
        assert_eq!(PageSet::default().runs().count(), 0);
        assert_eq!(PageSet::new(vec![(ranges[1], vec![0])]).runs().count(), 0);
    }
}
