//! What the artifacts of a build must add up to: a CRC-32C for each block of each of them.
//!
//! The sums of a build are an artifact of their own, made when it is published. Its bytes, numbers
//! little-endian: a magic, version, block size and number of artifacts (u32 each), the build's id;
//! for each artifact the length of its name (u32), its name, its length in bytes (u64) and a u32 for
//! each of its blocks; at the end the CRC-32C of all that. The last block of an artifact may be short.

use std::{fs::File, io, os::unix::fs::FileExt};

use nix::{errno::Errno, unistd};

use crate::{Artifact, BuildId, Damaged};

/// The unit that is checked, in bytes.
pub const CHECKED_BLOCK: u64 = 4096;

const MAGIC: &[u8; 8] = b"NIDUSCRC";
const VERSION: u32 = 1;

/// Files are summed in pieces of this size.
const PIECE: usize = 1 << 20;

/// The sums of one artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sums {
    /// The artifact's length in bytes.
    pub len: u64,
    /// One for each block.
    pub blocks: Vec<u32>,
}

/// The sums of all artifacts of a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checksums {
    pub build: BuildId,
    pub artifacts: Vec<(Artifact, Sums)>,
}

pub(crate) fn sum(block: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(block)
}

impl Sums {
    /// Those of a file as it is now. What the file system stores as holes is not read. Blocks.
    pub fn of(file: &File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        let count = len.div_ceil(CHECKED_BLOCK) as usize;
        let mut blocks = vec![sum(&[0; CHECKED_BLOCK as usize]); count];
        let mut piece = vec![0; PIECE];
        let mut at = 0;
        while let Some(data) = seek(file, at, unistd::Whence::SeekData)?.filter(|data| *data < len) {
            let end = seek(file, data, unistd::Whence::SeekHole)?.unwrap_or(len).min(len);
            at = data / CHECKED_BLOCK * CHECKED_BLOCK;
            while at < end {
                let part = &mut piece[..(len - at).min(PIECE as u64) as usize];
                file.read_exact_at(part, at)?;
                let first = (at / CHECKED_BLOCK) as usize;
                for (block, bytes) in blocks[first..].iter_mut().zip(part.chunks(CHECKED_BLOCK as usize)) {
                    *block = sum(bytes);
                }
                at += part.len() as u64;
            }
        }
        // A short last block that is a hole.
        let tail = (len % CHECKED_BLOCK) as usize;
        if let Some(last) = blocks.last_mut().filter(|_| tail > 0 && at < len) {
            *last = sum(&[0; CHECKED_BLOCK as usize][..tail]);
        }
        Ok(Self { len, blocks })
    }
}

/// The next data or hole; none where there is nothing beyond.
fn seek(file: &File, at: u64, whence: unistd::Whence) -> io::Result<Option<u64>> {
    match unistd::lseek64(file, at as i64, whence) {
        Ok(found) => Ok(Some(found as u64)),
        Err(Errno::ENXIO) => Ok(None),
        // The file system cannot tell: everything is data.
        Err(Errno::EINVAL) => Ok(matches!(whence, unistd::Whence::SeekData).then_some(at)),
        Err(e) => Err(e.into()),
    }
}

impl Checksums {
    pub fn to_bytes(&self) -> Vec<u8> {
        let blocks: usize = self.artifacts.iter().map(|(_, s)| s.blocks.len()).sum();
        let mut out = Vec::with_capacity(4 * blocks + 512);
        out.extend(MAGIC);
        for number in [VERSION, CHECKED_BLOCK as u32, self.artifacts.len() as u32] {
            out.extend(number.to_le_bytes());
        }
        out.extend(self.build.as_bytes());
        for (artifact, sums) in &self.artifacts {
            let name = artifact.file_name();
            out.extend((name.len() as u32).to_le_bytes());
            out.extend(name.as_bytes());
            out.extend(sums.len.to_le_bytes());
            sums.blocks.iter().for_each(|sum| out.extend(sum.to_le_bytes()));
        }
        out.extend(sum(&out).to_le_bytes());
        out
    }

    /// Reads what [`Checksums::to_bytes`] wrote for `build`.
    pub fn parse(build: BuildId, bytes: &[u8]) -> Result<Self, Damaged> {
        let damaged = |why| Damaged::sums(build, why);
        let (content, own) = bytes.split_last_chunk::<4>().ok_or_else(|| damaged("it is cut short"))?;
        if sum(content) != u32::from_le_bytes(*own) {
            return Err(damaged("its own checksum is wrong"));
        }
        let artifacts = Fields(content).checksums(build);
        Ok(Self { build, artifacts: artifacts.ok_or_else(|| damaged("it is not what this nidus writes"))? })
    }
}

/// What of a file is not read yet.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn checksums(mut self, build: BuildId) -> Option<Vec<(Artifact, Sums)>> {
        let known = self.bytes(MAGIC.len())? == MAGIC
            && self.number()? == VERSION
            && u64::from(self.number()?) == CHECKED_BLOCK;
        let count = self.number()?;
        if !known || self.bytes(16)? != build.as_bytes() {
            return None;
        }
        let mut artifacts = Vec::new();
        for _ in 0..count {
            let name_len = self.number()? as usize;
            let name = self.bytes(name_len)?;
            let artifact = Artifact::ALL.into_iter().find(|a| a.file_name().as_bytes() == name)?;
            let len = u64::from_le_bytes(self.bytes(8)?.try_into().ok()?);
            let size = usize::try_from(len.div_ceil(CHECKED_BLOCK)).ok()?.checked_mul(4)?;
            let blocks = self.bytes(size)?.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b));
            artifacts.push((artifact, Sums { len, blocks: blocks.collect() }));
        }
        self.0.is_empty().then_some(artifacts)
    }

    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<u32> {
        self.bytes(4)?.try_into().ok().map(u32::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCK: usize = CHECKED_BLOCK as usize;

    #[test]
    fn the_sum_is_castagnolis() {
        // The check value of the catalogue of CRCs.
        assert_eq!(sum(b"123456789"), 0xe306_9283);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_files_sums_are_those_of_its_bytes_holes_or_not(
            len in 0usize..12 * BLOCK,
            data in prop::collection::vec((0usize..12 * BLOCK, 1usize..3 * BLOCK, any::<u8>()), 0..4),
        ) {
            let file = tempfile::tempfile().unwrap();
            file.set_len(len as u64).unwrap();
            let mut model = vec![0; len];
            for (at, count, byte) in data {
                let end = (at + count).min(len);
                if at < end {
                    model[at..end].fill(byte);
                    file.write_all_at(&model[at..end], at as u64).unwrap();
                }
            }
            let sums = Sums::of(&file).unwrap();
            prop_assert_eq!(sums.len, len as u64);
            prop_assert_eq!(sums.blocks, model.chunks(BLOCK).map(sum).collect::<Vec<_>>());
        }

        #[test]
        fn what_is_written_is_read_and_nothing_else_is(
            sums in prop::collection::vec((0u64..3 * CHECKED_BLOCK, any::<u32>()), 7),
            flip in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>(),
            other in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let sums = sums.into_iter().map(|(len, sum)| {
                Sums { len, blocks: vec![sum; len.div_ceil(CHECKED_BLOCK) as usize] }
            });
            let build = BuildId::random();
            let all = Checksums { build, artifacts: Artifact::ALL.into_iter().zip(sums).collect() };
            let bytes = all.to_bytes();
            prop_assert_eq!(&Checksums::parse(build, &bytes).unwrap(), &all);
            prop_assert!(Checksums::parse(BuildId::random(), &bytes).is_err());
            let mut flipped = bytes.clone();
            flipped[flip.index(bytes.len())] ^= 1 << bit;
            prop_assert!(Checksums::parse(build, &flipped).is_err());
            prop_assert!(Checksums::parse(build, &bytes[..cut.index(bytes.len())]).is_err());
            // Bytes whose own sum is right are not trusted either.
            let mut other = other;
            other.extend(sum(&other).to_le_bytes());
            prop_assert!(Checksums::parse(build, &other).is_err());
            let mut longer = bytes[..bytes.len() - 4].to_vec();
            longer.extend([0; 8]);
            longer.extend(sum(&longer).to_le_bytes());
            prop_assert!(Checksums::parse(build, &longer).is_err());
        }
    }
}
