//! One frame: a fixed-size piece of an artifact, compressed on its own and known by a checksum.

use std::{fmt, io};

/// The first 16 bytes of the BLAKE3 hash of some bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Checksum([u8; 16]);

impl Checksum {
    /// The checksum's size in bytes.
    pub const LEN: usize = 16;

    /// Computes it.
    pub fn of(bytes: &[u8]) -> Self {
        let mut sum = [0; Self::LEN];
        sum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..Self::LEN]);
        Self(sum)
    }

    /// The checksum with these bytes.
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why the stored bytes of a frame are not its content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// They are no zstd frame of at most the content's length.
    #[error("cannot be decompressed: {0}")]
    Compression(String),
    /// They decompress to another length.
    #[error("has {is} bytes instead of {expected}")]
    Length {
        /// What came out.
        is: usize,
        /// What should have.
        expected: usize,
    },
    /// They decompress to something else.
    #[error("has a wrong checksum")]
    Checksum,
}

/// Compresses frames one after another with one context.
pub(crate) struct Encoder(zstd::bulk::Compressor<'static>);

impl Encoder {
    pub fn new(level: i32) -> io::Result<Self> {
        zstd::bulk::Compressor::new(level).map(Self)
    }

    pub fn encode(&mut self, content: &[u8]) -> io::Result<Vec<u8>> {
        self.0.compress(content)
    }
}

/// The most bytes that a frame of `content` bytes is stored in.
pub(crate) fn stored_max(content: u32) -> u32 {
    u32::try_from(zstd::zstd_safe::compress_bound(content as usize)).unwrap_or(u32::MAX)
}

/// The content of a frame, if that is what `stored` holds. Never allocates more than `len`.
pub(crate) fn decode(stored: &[u8], len: usize, checksum: Checksum) -> Result<Vec<u8>, FrameError> {
    let content = zstd::bulk::decompress(stored, len).map_err(|e| FrameError::Compression(e.to_string()))?;
    if content.len() != len {
        return Err(FrameError::Length { is: content.len(), expected: len });
    }
    if Checksum::of(&content) != checksum {
        return Err(FrameError::Checksum);
    }
    Ok(content)
}

/// Whether all bytes are zero.
pub fn is_zero(content: &[u8]) -> bool {
    // Words first: this runs over whole memory files.
    let (words, rest) = content.as_chunks::<16>();
    words.iter().all(|w| u128::from_ne_bytes(*w) == 0) && rest.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_encoded_is_decoded_and_nothing_else() {
        let content: Vec<u8> = (0..4_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let sum = Checksum::of(&content);
        let stored = Encoder::new(1).unwrap().encode(&content).unwrap();
        assert!(stored.len() < content.len() / 2);
        assert_eq!(decode(&stored, content.len(), sum).unwrap(), content);
        assert!(decode(&stored, content.len() - 1, sum).is_err());
        assert!(matches!(decode(&stored, content.len() + 1, sum), Err(FrameError::Length { .. })));
        assert_eq!(decode(&stored, content.len(), Checksum::of(b"other")), Err(FrameError::Checksum));
        for at in 0..stored.len() {
            let mut flipped = stored.clone();
            flipped[at] ^= 1 << (at % 8);
            // A bit of the frame's header may say the same thing twice.
            if let Ok(same) = decode(&flipped, content.len(), sum) {
                assert_eq!(same, content);
            }
        }
    }

    #[test]
    fn zeros_are_seen_at_every_length() {
        for len in 0..100 {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }
}
