//! The bytes of versions 4 and 5. After the fixed part: flags (u8; bit 0: the build is still being
//! uploaded), the length of a block (u32), and the block as one LZ4 frame. The block begins with
//! how builds are stored: their number (u32), then of each its id (16 bytes), the artifact's size
//! (i64), its SHA-256 (32 bytes, zeros if not known), compression and number of frames (u32 each),
//! and of each frame its offset and stored offset (i64 each), length and stored length (i32 each).
//!
//! Then come the mappings. In version 4: their number (u32), and they as in version 3. In version 5
//! they count in pages of 4 KiB, and zeros are left out: the number of build ids (u32) and the ids,
//! the number of mappings (u32), and four columns of varints: how far each begins from where the one
//! before it began, lengths, build offsets as (signed) differences, and which of the ids.

use std::{
    collections::{BTreeMap, HashMap},
    io::{Read, Write},
};

use lz4_flex::frame::{BlockMode, BlockSize, FrameDecoder, FrameEncoder, FrameInfo};
use nidus_storage::BuildId;

use super::{
    Compression, Frame, FrameTable, GRANULE, Header, HeaderError, MAX_FRAMES, Mapping, StoredBuild, Version,
    extents,
    format::{Fields, MAPPING_LEN},
    padded,
};

/// The most bytes of a block before compression, as other readers have it.
const MAX_BLOCK: usize = 256 << 20;
/// The most mappings that are read from a block of version 5, where each may be of 4 bytes.
const MAX_MAPPINGS: usize = 4 << 20;
/// The most ids that version 5 has room for: they are numbered in 16 bits, one of which stands for zeros.
const MAX_IDS: usize = u16::MAX as usize;
/// The fewest bytes of a stored build: without frames.
const STORED_LEN: usize = 16 + 8 + 32 + 4 + 4;
const FRAME_LEN: usize = 24;
const PENDING: u8 = 1;

/// Reads what follows the fixed part, which `header` has, up to the end of `bytes`.
pub(super) fn read(header: &mut Header, version: Version, bytes: &[u8]) -> Result<(), HeaderError> {
    let cut = || HeaderError::Cut(bytes.len());
    let mut fields = Fields(bytes);
    let [flags] = fields.take::<1>().ok_or_else(cut)?;
    if flags & !PENDING != 0 {
        return Err(HeaderError::Flags(flags));
    }
    header.pending = flags & PENDING != 0;
    let len = fields.short().ok_or_else(cut)? as usize;
    let block = unpack(fields.0, len)?;
    let mut block = Fields(&block);
    header.stored = stored_builds(&mut block)?;
    header.mappings = match version {
        Version::V5 => columns(&mut block, padded(header.size, GRANULE)?)?,
        _ => {
            let count = count(&mut block, "mappings", MAPPING_LEN)?;
            (0..count).map(|_| block.mapping().ok_or(HeaderError::CutBlock)).collect::<Result<_, _>>()?
        }
    };
    match block.0.len() {
        0 => Ok(()),
        rest => Err(HeaderError::Trailing(rest)),
    }
}

/// Adds to `out`, which has the fixed part, all that follows it.
pub(super) fn write(header: &Header, version: Version, out: &mut Vec<u8>) -> Result<(), HeaderError> {
    let unwritable = |what| HeaderError::Unwritable { version, what };
    let mut block = Vec::new();
    put_stored_builds(&header.stored, &mut block);
    if version == Version::V5 {
        put_columns(header, &mut block)?;
    } else {
        let count = u32::try_from(header.mappings.len()).map_err(|_| unwritable("mappings"))?;
        block.extend(count.to_le_bytes());
        header.mappings.iter().for_each(|m| m.put(&mut block));
    }
    if block.len() > MAX_BLOCK {
        return Err(unwritable("bytes"));
    }
    out.push(if header.pending { PENDING } else { 0 });
    out.extend((block.len() as u32).to_le_bytes());
    let info = FrameInfo::new()
        .block_size(BlockSize::Max4MB)
        .block_mode(BlockMode::Independent)
        .block_checksums(true)
        .content_checksum(true);
    let mut encoder = FrameEncoder::with_frame_info(info, out);
    encoder.write_all(&block).map_err(|e| HeaderError::Lz4(e.to_string()))?;
    encoder.finish().map_err(|e| HeaderError::Lz4(e.to_string()))?;
    Ok(())
}

/// The content of the LZ4 frame that `bytes` are, which must have `len` bytes.
fn unpack(bytes: &[u8], len: usize) -> Result<Vec<u8>, HeaderError> {
    if len > MAX_BLOCK {
        return Err(HeaderError::Count { what: "bytes", count: len as u64 });
    }
    // No block begins like this: a frame that was cut between two blocks does not look whole.
    let mut source = bytes.chain(&[0xff; 4][..]);
    let mut block = Vec::new();
    // One more than there should be: the end, and the sum that follows it, are seen.
    let read = FrameDecoder::new(&mut source).take(len as u64 + 1).read_to_end(&mut block);
    read.map_err(|e| HeaderError::Lz4(e.to_string()))?;
    if block.len() != len {
        return Err(HeaderError::BlockLength(len));
    }
    match source.get_ref().0.len() {
        0 => Ok(block),
        rest => Err(HeaderError::Trailing(rest)),
    }
}

/// A number of things of at least `least` bytes each, for which what follows must suffice.
fn count(block: &mut Fields<'_>, what: &'static str, least: usize) -> Result<usize, HeaderError> {
    let count = block.short().ok_or(HeaderError::CutBlock)? as usize;
    if count > block.0.len() / least {
        return Err(HeaderError::Count { what, count: count as u64 });
    }
    Ok(count)
}

fn stored_builds(block: &mut Fields<'_>) -> Result<BTreeMap<BuildId, StoredBuild>, HeaderError> {
    let mut builds = BTreeMap::new();
    for _ in 0..count(block, "builds", STORED_LEN)? {
        let build = block.id().ok_or(HeaderError::CutBlock)?;
        let size = block.number().ok_or(HeaderError::CutBlock)?;
        let sha256 = Some(block.take::<32>().ok_or(HeaderError::CutBlock)?).filter(|sum| *sum != [0; 32]);
        let compression = block.short().ok_or(HeaderError::CutBlock)?;
        let frames = count(block, "frames", FRAME_LEN)?;
        if frames > MAX_FRAMES {
            return Err(HeaderError::Count { what: "frames", count: frames as u64 });
        }
        let frames = match (compression, Compression::from_wire(compression)) {
            (0, _) if frames == 0 => None,
            (_, Some(compression)) => {
                let frames = (0..frames).map(|_| block.frame().ok_or(HeaderError::CutBlock));
                Some(FrameTable { compression, frames: frames.collect::<Result<_, _>>()? })
            }
            _ => return Err(HeaderError::Compression { build, number: compression }),
        };
        let stored = StoredBuild { size, sha256, frames };
        stored.check(build)?;
        if builds.insert(build, stored).is_some() {
            return Err(HeaderError::Twice(build));
        }
    }
    Ok(builds)
}

fn put_stored_builds(builds: &BTreeMap<BuildId, StoredBuild>, out: &mut Vec<u8>) {
    out.extend((builds.len() as u32).to_le_bytes());
    for (build, stored) in builds {
        out.extend(build.as_bytes());
        out.extend(stored.size.to_le_bytes());
        out.extend(stored.sha256.unwrap_or_default());
        let (compression, frames) = match &stored.frames {
            None => (0, &[][..]),
            Some(table) => (table.compression.to_wire(), &table.frames[..]),
        };
        out.extend(compression.to_le_bytes());
        out.extend((frames.len() as u32).to_le_bytes());
        for frame in frames {
            out.extend(frame.offset.to_le_bytes());
            out.extend(frame.stored_offset.to_le_bytes());
            out.extend(frame.len.to_le_bytes());
            out.extend(frame.stored_len.to_le_bytes());
        }
    }
}

/// The mappings of version 5, and zeros in between and up to `end` (bytes).
fn columns(block: &mut Fields<'_>, end: u64) -> Result<Vec<Mapping>, HeaderError> {
    let ids = count(block, "build ids", 16)?;
    if ids > MAX_IDS {
        return Err(HeaderError::Count { what: "build ids", count: ids as u64 });
    }
    let ids = (0..ids).map(|_| block.id().ok_or(HeaderError::CutBlock)).collect::<Result<Vec<_>, _>>()?;
    // At least one byte in each column.
    let count = count(block, "mappings", 4)?;
    if count > MAX_MAPPINGS {
        return Err(HeaderError::Count { what: "mappings", count: count as u64 });
    }
    let mut stored = vec![Mapping { offset: 0, len: 0, build: BuildId::NIL, build_offset: 0 }; count];
    let mut page = 0;
    for (index, m) in stored.iter_mut().enumerate() {
        page = in_pages(index, block.varint()?.checked_add(page))?;
        m.offset = page * GRANULE;
    }
    for (index, m) in stored.iter_mut().enumerate() {
        m.len = in_pages(index, Some(block.varint()?))? * GRANULE;
    }
    let mut page = 0;
    for (index, m) in stored.iter_mut().enumerate() {
        page = in_pages(index, block.signed_varint()?.checked_add_unsigned(page).map(|p| p as u64))?;
        m.build_offset = page * GRANULE;
    }
    for (index, m) in stored.iter_mut().enumerate() {
        let id = usize::try_from(block.varint()?).ok().and_then(|i| ids.get(i));
        m.build = *id.ok_or(HeaderError::UnknownId { index })?;
    }
    with_zeros(&stored, end)
}

/// The mappings and zeros for what they leave out, up to `end` (bytes).
fn with_zeros(stored: &[Mapping], end: u64) -> Result<Vec<Mapping>, HeaderError> {
    let mut mappings = Vec::with_capacity(stored.len());
    let mut at = 0;
    let zeros = |from, to| Mapping { offset: from, len: to - from, build: BuildId::NIL, build_offset: 0 };
    for (index, m) in stored.iter().enumerate() {
        if m.offset < at {
            return Err(HeaderError::OutOfOrder { index });
        }
        if m.offset > at {
            mappings.push(zeros(at, m.offset));
        }
        mappings.push(*m);
        at = m.end();
    }
    if at < end {
        mappings.push(zeros(at, end));
    }
    Ok(mappings)
}

/// A number of pages of version 5, which has them in 32 bits.
fn in_pages(index: usize, number: Option<u64>) -> Result<u64, HeaderError> {
    number.filter(|n| *n <= u32::MAX.into()).ok_or(HeaderError::BadRange { index })
}

fn put_columns(header: &Header, out: &mut Vec<u8>) -> Result<(), HeaderError> {
    let unwritable = |what| HeaderError::Unwritable { version: Version::V5, what };
    let mut stored = Vec::new();
    // Other readers refuse what lies beyond the device's last page.
    for m in extents(&header.mappings, 0..padded(header.size, GRANULE)?).filter(|m| !m.build.is_nil()) {
        if [m.offset, m.len, m.build_offset].iter().any(|n| n / GRANULE > u32::MAX.into()) {
            return Err(unwritable("pages"));
        }
        stored.push(m);
    }
    if stored.len() > MAX_MAPPINGS {
        return Err(unwritable("mappings"));
    }
    let (mut ids, mut numbers) = (Vec::new(), HashMap::new());
    for m in &stored {
        numbers.entry(m.build).or_insert_with(|| {
            ids.push(m.build);
            ids.len() as u64 - 1
        });
    }
    if ids.len() > MAX_IDS {
        return Err(unwritable("builds"));
    }
    out.extend((ids.len() as u32).to_le_bytes());
    ids.iter().for_each(|id| out.extend(id.as_bytes()));
    out.extend((stored.len() as u32).to_le_bytes());
    let mut before = 0;
    for m in &stored {
        put_varint(out, (m.offset - before) / GRANULE);
        before = m.offset;
    }
    stored.iter().for_each(|m| put_varint(out, m.len / GRANULE));
    let mut before = 0;
    for m in &stored {
        let page = (m.build_offset / GRANULE) as i64;
        // Zigzag: the sign in the lowest bit.
        let difference = page - before;
        put_varint(out, ((difference << 1) ^ (difference >> 63)) as u64);
        before = page;
    }
    stored.iter().for_each(|m| put_varint(out, numbers[&m.build]));
    Ok(())
}

/// Seven bits a byte, the lowest first; the eighth says that more follow.
fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

impl Fields<'_> {
    fn frame(&mut self) -> Option<Frame> {
        let (offset, stored_offset) = (self.number()?, self.number()?);
        Some(Frame { offset, stored_offset, len: self.short()?, stored_len: self.short()? })
    }

    fn varint(&mut self) -> Result<u64, HeaderError> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let [byte] = self.take::<1>().ok_or(HeaderError::CutBlock)?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                break;
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(HeaderError::Varint)
    }

    fn signed_varint(&mut self) -> Result<i64, HeaderError> {
        let number = self.varint()?;
        Ok((number >> 1) as i64 ^ -((number & 1) as i64))
    }
}
