//! The header of an artifact: which build stores which range of a logical device.
//!
//! A build stores only the blocks that it changed and refers to its parents' builds for the rest;
//! its header maps all of the device. The layouts on disk are E2B's: see [`Version`].

mod error;
mod format;
mod merge;
mod packed;
#[cfg(test)]
mod packed_tests;
mod stored;

use std::{collections::BTreeMap, ops::Range};

use nidus_storage::BuildId;

pub use error::HeaderError;
pub use stored::{Compression, Frame, FrameTable, MAX_FRAMES, StoredBuild};

/// Mappings begin and end at multiples of this, whatever the block size.
pub const GRANULE: u64 = 4096;

/// A layout of a header's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// Plain mappings.
    V3 = 3,
    /// Compressed as a whole, with [`StoredBuild`]s.
    V4 = 4,
    /// The same with mappings in columns of small numbers, for maps of very many pieces.
    V5 = 5,
}

impl Version {
    fn from_wire(number: u64) -> Option<Self> {
        [Self::V3, Self::V4, Self::V5].into_iter().find(|v| *v as u64 == number)
    }
}

/// The map of a device of `size` bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    block_size: u64,
    size: u64,
    generation: u64,
    build: BuildId,
    base: BuildId,
    /// Ascending, without gaps, from 0 to `size` or up to a block beyond; never empty.
    mappings: Vec<Mapping>,
    stored: BTreeMap<BuildId, StoredBuild>,
    pending: bool,
}

/// Where a range of the device is stored. All numbers are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Where the range begins in the device.
    pub offset: u64,
    /// Its length.
    pub len: u64,
    /// The build that stores it; the nil id for zeros, which nobody stores.
    pub build: BuildId,
    /// Where it begins in that build's artifact.
    pub build_offset: u64,
}

impl Mapping {
    fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// The part of the mapping that lies within `range`; the two must overlap.
    fn part(&self, range: &Range<u64>) -> Self {
        let offset = self.offset.max(range.start);
        let len = self.end().min(range.end) - offset;
        let skipped = if self.build.is_nil() { 0 } else { offset - self.offset };
        Self { offset, len, build: self.build, build_offset: self.build_offset + skipped }
    }
}

impl Header {
    /// The header of a build that stores all of a device of `size` bytes itself, block by block.
    pub fn identity(build: BuildId, size: u64, block_size: u64) -> Result<Self, HeaderError> {
        let whole = Mapping { offset: 0, len: padded(size, GRANULE)?, build, build_offset: 0 };
        let (mappings, stored) = (vec![whole], BTreeMap::new());
        Self { block_size, size, generation: 0, build, base: build, mappings, stored, pending: false }
            .checked()
    }

    /// The header of a device of `size` bytes that nobody has written to: all zeros, of no build.
    pub fn empty(size: u64, block_size: u64) -> Result<Self, HeaderError> {
        Self::identity(BuildId::NIL, size, block_size)
    }

    /// Whether its build stores all of the device itself, block by block.
    pub fn is_identity(&self) -> bool {
        matches!(self.mappings[..], [Mapping { build, build_offset: 0, .. }] if build == self.build)
    }

    /// The device's block size, in bytes.
    pub fn block_size(&self) -> u64 {
        self.block_size
    }

    /// The device's size, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many builds lie between this one and the one it began with.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The build that the header belongs to.
    pub fn build(&self) -> BuildId {
        self.build
    }

    /// The build that the line of builds began with.
    pub fn base(&self) -> BuildId {
        self.base
    }

    /// All mappings, ascending and without gaps.
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// How builds that it refers to are stored, as far as it says so: only versions 4 and 5 can.
    pub fn stored_builds(&self) -> &BTreeMap<BuildId, StoredBuild> {
        &self.stored
    }

    /// The same header with that said.
    pub fn with_stored_builds(self, stored: BTreeMap<BuildId, StoredBuild>) -> Result<Self, HeaderError> {
        stored.iter().try_for_each(|(build, stored)| stored.check(*build))?;
        Ok(Self { stored, ..self })
    }

    /// Whether it says that its build was still being uploaded when it was written. Peers send such
    /// headers; none is stored.
    pub fn is_upload_pending(&self) -> bool {
        self.pending
    }

    /// Where the device's range is stored, piece by piece in ascending order. What lies beyond the
    /// device is left out.
    pub fn extents(&self, range: Range<u64>) -> impl Iterator<Item = Mapping> + '_ {
        extents(&self.mappings, range.start..range.end.min(self.size))
    }

    /// Fails unless all that the type promises holds.
    fn checked(self) -> Result<Self, HeaderError> {
        if !self.block_size.is_power_of_two() || self.block_size < GRANULE {
            return Err(HeaderError::BlockSize(self.block_size));
        }
        let limit = padded(self.size, self.block_size)?;
        check_order(&self.mappings, limit)?;
        let mut at = 0;
        for mapping in &self.mappings {
            if mapping.offset != at {
                return Err(HeaderError::Gap(at));
            }
            at = mapping.end();
        }
        if at < self.size { Err(HeaderError::Gap(at)) } else { Ok(self) }
    }
}

/// `size` rounded up to whole units; fails where that or zero would result in no usable size.
fn padded(size: u64, unit: u64) -> Result<u64, HeaderError> {
    match size.checked_next_multiple_of(unit) {
        Some(padded) if (1..=i64::MAX as u64).contains(&padded) => Ok(padded),
        _ => Err(HeaderError::Size(size)),
    }
}

/// Fails unless the mappings are ranges of whole granules, ascending, apart, and end by `limit`.
fn check_order(mappings: &[Mapping], limit: u64) -> Result<(), HeaderError> {
    let mut at = 0;
    for (index, m) in mappings.iter().enumerate() {
        let aligned = (m.offset | m.len | m.build_offset) % GRANULE == 0;
        let bounded = m.offset.checked_add(m.len).is_some() && m.build_offset.checked_add(m.len).is_some();
        if m.len == 0 || !aligned || !bounded {
            return Err(HeaderError::BadRange { index });
        }
        if m.offset < at {
            return Err(HeaderError::OutOfOrder { index });
        }
        at = m.end();
        if at > limit {
            return Err(HeaderError::BeyondEnd { index });
        }
    }
    Ok(())
}

fn extents(mappings: &[Mapping], range: Range<u64>) -> impl Iterator<Item = Mapping> + '_ {
    let first = mappings.partition_point(|m| m.end() <= range.start);
    mappings[first..].iter().map_while(move |m| {
        let overlaps = m.offset < range.end && !range.is_empty();
        overlaps.then(|| m.part(&range))
    })
}
