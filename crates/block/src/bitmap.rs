//! Bitmaps over the blocks of a device.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// A bitmap whose bits are only ever set, from any number of threads.
#[derive(Debug)]
pub(crate) struct AtomicBitmap {
    words: Box<[AtomicU64]>,
    bits: u64,
}

impl AtomicBitmap {
    pub(crate) fn new(bits: u64) -> Self {
        Self { words: (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), bits }
    }

    /// Sets the bits of `range`. Who sees one of them set also sees what this thread wrote before.
    pub(crate) fn set(&self, range: Range<u64>) {
        debug_assert!(range.end <= self.bits);
        let mut bit = range.start;
        while bit < range.end {
            let in_word = bit % 64;
            let count = (64 - in_word).min(range.end - bit);
            let mask = (u64::MAX >> (64 - count)) << in_word;
            self.words[(bit / 64) as usize].fetch_or(mask, Ordering::Release);
            bit += count;
        }
    }

    pub(crate) fn get(&self, bit: u64) -> bool {
        self.words[(bit / 64) as usize].load(Ordering::Acquire) >> (bit % 64) & 1 == 1
    }

    /// The value of the first bit of `range`, and where the run of bits with that value ends.
    pub(crate) fn run(&self, range: Range<u64>) -> (bool, u64) {
        let value = self.get(range.start);
        let mut bit = range.start;
        while bit < range.end {
            let word = self.words[(bit / 64) as usize].load(Ordering::Acquire);
            // Ones where the value differs from the run's.
            let other = (if value { !word } else { word }) >> (bit % 64);
            if other != 0 {
                return (value, (bit + u64::from(other.trailing_zeros())).min(range.end));
            }
            bit = (bit / 64 + 1) * 64;
        }
        (value, range.end)
    }

    pub(crate) fn snapshot(&self) -> DirtyBlocks {
        let words = self.words.iter().map(|w| AtomicU64::new(w.load(Ordering::Acquire))).collect();
        DirtyBlocks { bitmap: Self { words, bits: self.bits } }
    }
}

/// The blocks of an overlay that were written, at one point in time.
#[derive(Debug)]
pub struct DirtyBlocks {
    bitmap: AtomicBitmap,
}

impl DirtyBlocks {
    /// What any of several bitmaps over one device has, of which there is at least one.
    pub(crate) fn union<'a>(mut all: impl Iterator<Item = &'a AtomicBitmap>) -> Self {
        let first = all.next().map_or_else(|| AtomicBitmap::new(0).snapshot(), AtomicBitmap::snapshot);
        all.fold(first, |union, next| {
            for (word, more) in union.bitmap.words.iter().zip(&next.words) {
                word.fetch_or(more.load(Ordering::Acquire), Ordering::Relaxed);
            }
            union
        })
    }

    /// How many blocks the device has.
    pub fn blocks(&self) -> u64 {
        self.bitmap.bits
    }

    /// How many of them were written.
    pub fn count(&self) -> u64 {
        self.bitmap.words.iter().map(|w| u64::from(w.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// Whether the block was written.
    pub fn contains(&self, block: u64) -> bool {
        block < self.bitmap.bits && self.bitmap.get(block)
    }

    /// The written blocks as ranges of block numbers, ascending, none touching the next.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let end = self.bitmap.bits;
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < end {
                let start = at;
                let (set, run_end) = self.bitmap.run(start..end);
                at = run_end;
                if set {
                    return Some(start..run_end);
                }
            }
            None
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set_of_numbers(bits in 1u64..300, spans in prop::collection::vec((0u64..300, 0u64..150), 0..8)) {
            let bitmap = AtomicBitmap::new(bits);
            let mut model = vec![false; bits as usize];
            for (start, len) in spans {
                let range = start.min(bits)..(start + len).min(bits);
                model[range.start as usize..range.end as usize].fill(true);
                bitmap.set(range);
            }
            let dirty = bitmap.snapshot();
            prop_assert_eq!(dirty.count(), model.iter().filter(|b| **b).count() as u64);
            let mut from_ranges = vec![false; bits as usize];
            let mut last_end = None;
            for range in dirty.ranges() {
                prop_assert!(range.start < range.end && last_end < Some(range.start));
                last_end = Some(range.end);
                from_ranges[range.start as usize..range.end as usize].fill(true);
            }
            prop_assert_eq!(&from_ranges, &model);
            for bit in 0..bits {
                prop_assert_eq!(dirty.contains(bit), model[bit as usize]);
                let (value, end) = bitmap.run(bit..bits);
                prop_assert_eq!(value, model[bit as usize]);
                prop_assert!(end > bit && model[bit as usize..end as usize].iter().all(|b| *b == value));
                prop_assert!(end == bits || model[end as usize] != value);
            }
        }
    }
}
