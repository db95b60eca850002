//! The manifest of a build: which artifacts it has, and where each frame of theirs lies.
//!
//! Written last, so it is what makes a build visible. Version 1, integers little-endian:
//!
//! ```text
//! magic "NIDUSMAN" | version u32 | build id 16 | artifacts u8
//! per artifact, by ascending code:
//!   code u8 | size u64 | frame size u32 | objects u32 | frames u32
//!   per object: frames u32 | checksum of the stored bytes 16
//!   per frame that is not all zeros, ascending: number u32 | stored length u32 | checksum of the content 16
//! BLAKE3 of all that 32
//! ```
//!
//! The frames of an artifact lie one after another in its objects, so a frame's place is the sum of
//! the lengths before it: there is nothing that could overlap or point elsewhere. Whoever wrote the
//! bytes is not trusted: what is accepted is within the limits below, and memory is reserved only
//! for what the input's length can hold.

use std::{collections::BTreeMap, sync::Arc};

use bytes::{Buf, BufMut};

use super::frame::{Checksum, stored_max};
use crate::{Artifact, BuildId};

const MAGIC: &[u8; 8] = b"NIDUSMAN";
const VERSION: u32 = 1;
const SUM: usize = 32;

/// The most bytes of a manifest: enough for 600 GiB in frames of 256 KiB.
pub const MAX_MANIFEST: usize = 64 << 20;
/// The smallest frame, in bytes of content.
pub const MIN_FRAME: u32 = 4 << 10;
/// The largest frame, in bytes of content.
pub const MAX_FRAME: u32 = 4 << 20;
/// The largest object, in stored bytes.
pub const MAX_OBJECT: u32 = 64 << 20;
/// The most frames of an artifact, zeros included: 4 TiB in frames of 256 KiB.
pub const MAX_FRAMES: u64 = 1 << 24;

/// Why bytes are not a manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// They do not begin like one.
    #[error("it is not a manifest")]
    Magic,
    /// A newer program wrote it.
    #[error("its version is {0}; this program reads version {VERSION}")]
    Version(u32),
    /// It ends too early or too late.
    #[error("its length is wrong")]
    Length,
    /// Something changed it.
    #[error("its checksum is wrong")]
    Checksum,
    /// It belongs to another build.
    #[error("it is the manifest of build {0}")]
    Build(BuildId),
    /// It contradicts itself or exceeds a limit.
    #[error("it is invalid: {0}")]
    Invalid(&'static str),
}

/// A stored frame of an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Its number: its offset in the artifact divided by the frame size.
    pub number: u32,
    /// The object that it lies in, an index into [`FrameMap::objects`].
    pub object: u32,
    /// Where it begins in the object, in bytes.
    pub offset: u32,
    /// How many bytes of the object it takes.
    pub len: u32,
    /// The checksum of its content.
    pub checksum: Checksum,
}

/// An object that holds frames of an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// How many frames it holds.
    pub frames: u32,
    /// Its length in bytes.
    pub len: u32,
    /// The checksum of its bytes, which is part of its name.
    pub checksum: Checksum,
}

/// Where the content of one artifact lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameMap {
    size: u64,
    frame_size: u32,
    objects: Vec<Object>,
    frames: Vec<Frame>,
}

impl FrameMap {
    /// An empty map of an artifact of `size` bytes; objects are appended to it.
    pub(crate) fn new(size: u64, frame_size: u32) -> Self {
        Self { size, frame_size, objects: Vec::new(), frames: Vec::new() }
    }

    /// Appends an object with its frames: their numbers, stored lengths and checksums.
    pub(crate) fn push(&mut self, checksum: Checksum, frames: &[(u32, u32, Checksum)]) {
        let object = self.objects.len() as u32;
        let mut offset = 0;
        for (number, len, checksum) in frames {
            self.frames.push(Frame { number: *number, object, offset, len: *len, checksum: *checksum });
            offset += len;
        }
        self.objects.push(Object { frames: frames.len() as u32, len: offset, checksum });
    }

    /// The artifact's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many bytes of content each frame has; the last one may have fewer.
    pub fn frame_size(&self) -> u32 {
        self.frame_size
    }

    /// How many frames it has, those that are zeros included.
    pub fn count(&self) -> u64 {
        self.size.div_ceil(u64::from(self.frame_size))
    }

    /// The objects, in the order of their frames.
    pub fn objects(&self) -> &[Object] {
        &self.objects
    }

    /// The frames that are stored, in ascending order. All others are zeros.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// How many bytes are stored for it.
    pub fn stored(&self) -> u64 {
        self.objects.iter().map(|o| u64::from(o.len)).sum()
    }

    /// The frame of this number; `None` if it is all zeros.
    pub fn frame(&self, number: u32) -> Option<&Frame> {
        self.frames.binary_search_by_key(&number, |f| f.number).ok().map(|n| &self.frames[n])
    }

    /// Whether the frame of this number is all zeros, and so is not stored.
    pub fn is_zero(&self, number: u32) -> bool {
        self.frame(number).is_none()
    }

    /// The frame of this number and the object that it lies in; `None` if it is all zeros.
    pub fn locate(&self, number: u32) -> Option<(&Frame, &Object)> {
        let frame = self.frame(number)?;
        Some((frame, self.objects.get(frame.object as usize)?))
    }

    /// How many bytes of content the frame of this number has.
    pub fn content_len(&self, number: u32) -> u32 {
        let start = u64::from(number) * u64::from(self.frame_size);
        self.size.saturating_sub(start).min(u64::from(self.frame_size)) as u32
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.put_u64_le(self.size);
        out.put_u32_le(self.frame_size);
        out.put_u32_le(self.objects.len() as u32);
        out.put_u32_le(self.frames.len() as u32);
        for object in &self.objects {
            out.put_u32_le(object.frames);
            out.put_slice(object.checksum.as_bytes());
        }
        for frame in &self.frames {
            out.put_u32_le(frame.number);
            out.put_u32_le(frame.len);
            out.put_slice(frame.checksum.as_bytes());
        }
    }

    fn read(input: &mut &[u8]) -> Result<Self, ManifestError> {
        use ManifestError::Invalid;
        const ENTRY_OBJECT: usize = 4 + Checksum::LEN;
        const ENTRY_FRAME: usize = 8 + Checksum::LEN;
        let size = u64(input)?;
        let frame_size = u32(input)?;
        if !frame_size.is_power_of_two() || !(MIN_FRAME..=MAX_FRAME).contains(&frame_size) {
            return Err(Invalid("a frame size is not allowed"));
        }
        let mut map = Self::new(size, frame_size);
        if map.count() > MAX_FRAMES {
            return Err(Invalid("an artifact is too large"));
        }
        let (objects, frames) = (u32(input)? as usize, u32(input)? as usize);
        if frames as u64 > map.count() || objects > frames {
            return Err(Invalid("there are more frames than the artifact has"));
        }
        let bytes = objects.saturating_mul(ENTRY_OBJECT).saturating_add(frames.saturating_mul(ENTRY_FRAME));
        if bytes > input.len() {
            return Err(ManifestError::Length);
        }
        let mut held = Vec::with_capacity(objects);
        for _ in 0..objects {
            held.push((u32(input)? as usize, checksum(input)?));
        }
        map.objects.reserve_exact(objects);
        map.frames.reserve_exact(frames);
        let mut next = 0;
        let mut of_object = Vec::new();
        for (count, sum) in held {
            if count == 0 || count > frames - map.frames.len() {
                return Err(Invalid("an object has no frames or too many"));
            }
            of_object.clear();
            let mut len: u32 = 0;
            for _ in 0..count {
                let (number, stored) = (u32(input)?, u32(input)?);
                if u64::from(number) < next || u64::from(number) * u64::from(frame_size) >= size {
                    return Err(Invalid("frames are out of order or beyond the end"));
                }
                if stored == 0 || stored > stored_max(frame_size) {
                    return Err(Invalid("a frame's stored length is not possible"));
                }
                // Neither summand exceeds a few MiB.
                len += stored;
                if len > MAX_OBJECT {
                    return Err(Invalid("an object is too large"));
                }
                next = u64::from(number) + 1;
                of_object.push((number, stored, checksum(input)?));
            }
            map.push(sum, &of_object);
        }
        if map.frames.len() != frames {
            return Err(Invalid("frames lie in no object"));
        }
        Ok(map)
    }
}

/// Everything that a build has in the object store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    build: BuildId,
    artifacts: BTreeMap<Artifact, Arc<FrameMap>>,
}

impl Manifest {
    pub(crate) fn new(build: BuildId, artifacts: BTreeMap<Artifact, Arc<FrameMap>>) -> Self {
        Self { build, artifacts }
    }

    /// The build.
    pub fn build(&self) -> BuildId {
        self.build
    }

    /// The artifacts that it has.
    pub fn artifacts(&self) -> impl Iterator<Item = (Artifact, &Arc<FrameMap>)> {
        self.artifacts.iter().map(|(a, m)| (*a, m))
    }

    /// Where an artifact lies; `None` if the build does not have it.
    pub fn artifact(&self, artifact: Artifact) -> Option<&Arc<FrameMap>> {
        self.artifacts.get(&artifact)
    }

    /// About how many bytes of memory it takes.
    pub(crate) fn memory(&self) -> u64 {
        let of_map = |m: &FrameMap| size_of_val(m.frames()) + size_of_val(m.objects());
        256 + self.artifacts.values().map(|m| of_map(m) as u64).sum::<u64>()
    }

    /// The manifest as it is stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_slice(MAGIC);
        out.put_u32_le(VERSION);
        out.put_slice(self.build.as_bytes());
        out.put_u8(self.artifacts.len() as u8);
        for (artifact, map) in &self.artifacts {
            out.put_u8(code(*artifact));
            map.write(&mut out);
        }
        let sum = blake3::hash(&out);
        out.put_slice(sum.as_bytes());
        out
    }

    /// Reads what [`Manifest::to_bytes`] wrote.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        use ManifestError::Invalid;
        if !bytes.starts_with(MAGIC) {
            return Err(ManifestError::Magic);
        }
        let mut input = &bytes[MAGIC.len()..];
        // Before the checksum: another version may have another one.
        let version = u32(&mut input)?;
        if version != VERSION {
            return Err(ManifestError::Version(version));
        }
        if input.len() < SUM || bytes.len() > MAX_MANIFEST {
            return Err(ManifestError::Length);
        }
        let (body, sum) = bytes.split_at(bytes.len() - SUM);
        if blake3::hash(body).as_bytes() != sum {
            return Err(ManifestError::Checksum);
        }
        let mut input = &body[MAGIC.len() + 4..];
        let mut id = [0; 16];
        input.try_copy_to_slice(&mut id).map_err(|_| ManifestError::Length)?;
        let build = BuildId::from_bytes(id);
        if build.is_nil() {
            return Err(Invalid("the nil id names no build"));
        }
        let mut artifacts = BTreeMap::new();
        for _ in 0..u8(&mut input)? {
            let artifact = from_code(u8(&mut input)?).ok_or(Invalid("an artifact is unknown"))?;
            if artifacts.last_key_value().is_some_and(|(last, _)| code(*last) >= code(artifact)) {
                return Err(Invalid("artifacts are out of order"));
            }
            artifacts.insert(artifact, Arc::new(FrameMap::read(&mut input)?));
        }
        if !artifacts.contains_key(&Artifact::Metadata) {
            return Err(Invalid("it lacks the metadata that every build has"));
        }
        if !input.is_empty() {
            return Err(ManifestError::Length);
        }
        Ok(Self { build, artifacts })
    }
}

/// How an artifact is called in manifests. Codes are never given twice.
const fn code(artifact: Artifact) -> u8 {
    match artifact {
        Artifact::Rootfs => 1,
        Artifact::RootfsHeader => 2,
        Artifact::Memfile => 3,
        Artifact::MemfileHeader => 4,
        Artifact::Snapfile => 5,
        Artifact::Metadata => 6,
        Artifact::Checksums => 7,
    }
}

fn from_code(number: u8) -> Option<Artifact> {
    Artifact::ALL.into_iter().find(|a| code(*a) == number)
}

fn u8(input: &mut &[u8]) -> Result<u8, ManifestError> {
    input.try_get_u8().map_err(|_| ManifestError::Length)
}

fn u32(input: &mut &[u8]) -> Result<u32, ManifestError> {
    input.try_get_u32_le().map_err(|_| ManifestError::Length)
}

fn u64(input: &mut &[u8]) -> Result<u64, ManifestError> {
    input.try_get_u64_le().map_err(|_| ManifestError::Length)
}

fn checksum(input: &mut &[u8]) -> Result<Checksum, ManifestError> {
    let mut sum = [0; Checksum::LEN];
    input.try_copy_to_slice(&mut sum).map_err(|_| ManifestError::Length)?;
    Ok(Checksum::from_bytes(sum))
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
