//! Sets of pages.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// A set of pages that several threads change at once. Single bits are changed atomically; who
/// needs more order than that holds a lock.
#[derive(Debug)]
pub(super) struct AtomicPages {
    words: Box<[AtomicU64]>,
    len: usize,
}

impl AtomicPages {
    /// An empty set of pages below `len`.
    pub(super) fn new(len: usize) -> Self {
        Self { words: (0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), len }
    }

    pub(super) fn contains(&self, page: usize) -> bool {
        self.words.get(page / 64).is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 != 0)
    }

    /// Adds a page; whether it was new.
    pub(super) fn insert(&self, page: usize) -> bool {
        let bit = 1 << (page % 64);
        self.words[page / 64].fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    /// Takes a page out; whether it was there.
    pub(super) fn remove(&self, page: usize) -> bool {
        let bit = 1 << (page % 64);
        self.words[page / 64].fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }

    pub(super) fn insert_range(&self, pages: Range<usize>) {
        for (word, mask) in masks(pages.start..pages.end.min(self.len)) {
            self.words[word].fetch_or(mask, Ordering::AcqRel);
        }
    }

    pub(super) fn remove_range(&self, pages: Range<usize>) {
        for (word, mask) in masks(pages.start..pages.end.min(self.len)) {
            self.words[word].fetch_and(!mask, Ordering::AcqRel);
        }
    }

    /// What is in it now.
    pub(super) fn snapshot(&self) -> PageSet {
        PageSet { words: self.words.iter().map(|w| w.load(Ordering::Acquire)).collect(), len: self.len }
    }
}

/// The words of a range, each with the bits that belong to it.
fn masks(pages: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let Range { start, end } = pages;
    let words = if start < end { start / 64..end.div_ceil(64) } else { 0..0 };
    words.map(move |word| {
        let low = start.saturating_sub(word * 64);
        let high = (end - word * 64).min(64);
        (word, (u64::MAX << low) & (u64::MAX >> (64 - high)))
    })
}

/// A set of pages of a guest's memory, numbered by their place in the memory file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    len: usize,
}

impl PageSet {
    /// Whether it has this page.
    pub fn contains(&self, page: usize) -> bool {
        self.words.get(page / 64).is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// How many pages it has.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    pub(super) fn remove_range(&mut self, pages: Range<usize>) {
        for (word, mask) in masks(pages.start..pages.end.min(self.len)) {
            self.words[word] &= !mask;
        }
    }

    /// The pages that are not in `other`.
    pub(super) fn without(mut self, other: &Self) -> Self {
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word &= !other);
        self
    }

    /// The first run of consecutive pages at or after `from`, of at most `max` pages.
    pub(super) fn next_run(&self, from: usize, max: usize) -> Option<Range<usize>> {
        let mut word = from / 64;
        let mut bits = self.words.get(word)? & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.words.get(word)?;
        }
        let start = word * 64 + bits.trailing_zeros() as usize;
        let mut end = start + 1;
        while end - start < max && self.contains(end) {
            end += 1;
        }
        Some(start..end)
    }

    /// Its runs of consecutive pages, ascending and apart.
    pub fn runs(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(from, usize::MAX)?;
            from = run.end;
            Some(run)
        })
    }

    /// Its pages as byte ranges of the memory file, for pages of this many bytes; ascending and apart.
    pub fn byte_ranges(&self, page_bytes: u64) -> Vec<Range<u64>> {
        self.runs().map(|run| run.start as u64 * page_bytes..run.end as u64 * page_bytes).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(
            steps in prop::collection::vec((0..4u8, 0..300usize, 0..300usize), 0..40)
        ) {
            let pages = AtomicPages::new(300);
            let mut model = BTreeSet::new();
            for (kind, a, b) in steps {
                match kind {
                    0 => assert_eq!(pages.insert(a), model.insert(a)),
                    1 => assert_eq!(pages.remove(a), model.remove(&a)),
                    2 => {
                        pages.insert_range(a..b);
                        model.extend(a..b);
                    }
                    _ => {
                        pages.remove_range(a..b);
                        model.retain(|page| !(a..b).contains(page));
                    }
                }
            }
            let set = pages.snapshot();
            assert_eq!(set.count(), model.len());
            assert!((0..310).all(|page| set.contains(page) == model.contains(&page)));
            assert_eq!(set.runs().flatten().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            let runs: Vec<_> = set.runs().collect();
            assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }

    #[test]
    fn runs_are_cut_to_a_length() {
        let pages = AtomicPages::new(200);
        pages.insert_range(60..130);
        let mut set = pages.snapshot();
        assert_eq!(set.next_run(0, 16), Some(60..76));
        assert_eq!(set.next_run(76, 100), Some(76..130));
        assert_eq!(set.next_run(130, 1), None);
        set.remove_range(61..129);
        assert_eq!(set.byte_ranges(4096), vec![60 * 4096..61 * 4096, 129 * 4096..130 * 4096]);
    }
}
