//! From an artifact's file to objects full of frames.

use std::mem;

use super::{
    frame::{Checksum, Encoder, is_zero},
    manifest::{FrameMap, MAX_FRAMES},
};
use crate::{ArtifactFile, StorageError};

/// An object that is ready to be sent.
pub(super) struct Packed {
    pub checksum: Checksum,
    pub bytes: Vec<u8>,
}

/// How an artifact is cut up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// Bytes of content per frame.
    pub frame_size: u32,
    /// An object is full once it has this many bytes.
    pub object_size: u32,
    /// zstd's level.
    pub level: i32,
}

/// Reads all of an artifact, checked, and gives each object to `send` when it is full; ends early,
/// with `None`, when that says `false`. Blocks.
///
/// Equal content makes equal objects, so a second run finds by name what a first one sent.
pub(super) fn pack(
    artifact: &ArtifactFile,
    cut: Cut,
    mut send: impl FnMut(Packed) -> bool,
) -> Result<Option<FrameMap>, StorageError> {
    let path = artifact.path();
    let mut map = FrameMap::new(artifact.size(), cut.frame_size);
    if map.count() > MAX_FRAMES {
        let reason = "more frames than a manifest may have";
        return Err(StorageError::io("pack", path, std::io::Error::other(reason)));
    }
    let mut encoder = Encoder::new(cut.level).map_err(|e| StorageError::io("compress", path, e))?;
    let mut frame = vec![0; cut.frame_size as usize];
    let (mut bytes, mut frames) = (Vec::new(), Vec::new());
    for number in 0..map.count() as u32 {
        let frame = &mut frame[..map.content_len(number) as usize];
        // A frame is whole blocks of what is checked.
        artifact.read_blocks(u64::from(number) * u64::from(cut.frame_size), frame)?;
        if !is_zero(frame) {
            let stored = encoder.encode(frame).map_err(|e| StorageError::io("compress", path, e))?;
            frames.push((number, stored.len() as u32, Checksum::of(frame)));
            bytes.extend_from_slice(&stored);
        }
        let last = u64::from(number) + 1 == map.count();
        if bytes.len() >= cut.object_size as usize || (last && !bytes.is_empty()) {
            let checksum = Checksum::of(&bytes);
            map.push(checksum, &mem::take(&mut frames));
            if !send(Packed { checksum, bytes: mem::take(&mut bytes) }) {
                return Ok(None);
            }
        }
    }
    Ok(Some(map))
}
