//! What a header of version 4 or 5 says about the builds that it refers to.

use nidus_storage::BuildId;

use super::HeaderError;

/// The most frames of one build. At the usual 2 MiB of content each, they hold 2 TiB.
pub const MAX_FRAMES: usize = 1 << 20;

/// How the artifact of a build is stored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoredBuild {
    /// The artifact's size in bytes, before compression; 0 if it is not known.
    pub size: u64,
    /// The SHA-256 of the artifact before compression, if it is known.
    pub sha256: Option<[u8; 32]>,
    /// The compressed frames that it is stored in; none if it is stored as it is.
    pub frames: Option<FrameTable>,
}

/// Frames of an artifact, each compressed on its own. Those that nobody needs may be left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameTable {
    /// How they are compressed.
    pub compression: Compression,
    /// Ascending and apart, both before and after compression.
    pub frames: Vec<Frame>,
}

/// One frame. All numbers are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Where its content begins in the artifact.
    pub offset: u64,
    /// The length of its content.
    pub len: u32,
    /// Where it begins in what is stored.
    pub stored_offset: u64,
    /// Its length there.
    pub stored_len: u32,
}

/// A method of compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Zstandard.
    Zstd,
    /// LZ4 frames.
    Lz4,
}

impl Compression {
    pub(super) fn from_wire(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Zstd),
            2 => Some(Self::Lz4),
            _ => None,
        }
    }

    pub(super) fn to_wire(self) -> u32 {
        match self {
            Self::Zstd => 1,
            Self::Lz4 => 2,
        }
    }
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
        })
    }
}

impl StoredBuild {
    /// Fails unless its numbers are those of an artifact. Sizes and offsets are signed for other readers.
    pub(super) fn check(&self, build: BuildId) -> Result<(), HeaderError> {
        if self.size > i64::MAX as u64 {
            return Err(HeaderError::StoredSize { build, size: self.size });
        }
        let frames = self.frames.as_ref().map_or(&[][..], |t| &t.frames);
        if frames.len() > MAX_FRAMES {
            return Err(HeaderError::Count { what: "frames", count: frames.len() as u64 });
        }
        let (mut end, mut stored_end) = (0, 0);
        for (index, frame) in frames.iter().enumerate() {
            let ordered = frame.offset >= end && frame.stored_offset >= stored_end;
            let sizes = [frame.len, frame.stored_len].map(|len| (1..=i32::MAX as u32).contains(&len));
            let ends = (
                frame.offset.checked_add(frame.len.into()),
                frame.stored_offset.checked_add(frame.stored_len.into()),
            );
            match ends {
                (Some(e), Some(s)) if ordered && sizes == [true; 2] && e.max(s) <= i64::MAX as u64 => {
                    (end, stored_end) = (e, s);
                }
                _ => return Err(HeaderError::BadFrame { build, index }),
            }
        }
        Ok(())
    }
}
