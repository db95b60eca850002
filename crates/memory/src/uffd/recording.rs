//! In which order a VM first needed its pages.

use std::collections::HashSet;

use parking_lot::Mutex;

use crate::PageSize;

/// The most pages that a recording has.
pub const MAX_RECORDED: usize = 1 << 18;

const MAGIC: &[u8; 4] = b"NPFO";
const VERSION: u16 = 1;
const HEADER: usize = 4 + 2 + 4 + 8 + 4;

/// A page that was needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Recorded {
    /// Its number in the memory file.
    pub page: u32,
    /// Whether the first access was a write.
    pub write: bool,
}

/// The order in which a VM first needed its pages after it was resumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recording {
    page_size: PageSize,
    memory_size: u64,
    pages: Vec<Recorded>,
}

/// Why bytes are not a recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordingError {
    /// They are something else, or of another version.
    #[error("this is not a fault recording of version {VERSION}")]
    Unknown,
    /// They end too early or go on too long.
    #[error("the fault recording does not have the length that its header says")]
    Length,
    /// Something in them cannot be.
    #[error("the fault recording is damaged: {0}")]
    Damaged(&'static str),
}

impl Recording {
    /// A recording of these pages for a memory of this size. Pages beyond its end, second
    /// mentions and what exceeds [`MAX_RECORDED`] are left out.
    pub fn new(page_size: PageSize, memory_size: u64, pages: impl IntoIterator<Item = Recorded>) -> Self {
        let count = memory_size / page_size.bytes();
        let mut seen = HashSet::new();
        let pages = pages.into_iter();
        let pages = pages.filter(|r| u64::from(r.page) < count && seen.insert(r.page)).take(MAX_RECORDED);
        Self { page_size, memory_size, pages: pages.collect() }
    }

    /// The pages, in the order in which they were needed, each once.
    pub fn pages(&self) -> &[Recorded] {
        &self.pages
    }

    /// The size of a page.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The size of the memory in bytes.
    pub fn memory_size(&self) -> u64 {
        self.memory_size
    }

    /// The serialised form, numbers little-endian: the four letters `NPFO`, the version (2 bytes), the
    /// page size (4), the memory size (8), the number of pages (4); then for each page a LEB128
    /// number whose lowest bit says "write" and whose other bits are the distance to the page
    /// before (from 0 at first), zigzag-coded.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + 2 * self.pages.len());
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((self.page_size.bytes() as u32).to_le_bytes());
        out.extend(self.memory_size.to_le_bytes());
        out.extend((self.pages.len() as u32).to_le_bytes());
        let mut before = 0;
        for recorded in &self.pages {
            let page = i64::from(recorded.page);
            let distance = page - before;
            before = page;
            let zigzag = (distance << 1 ^ distance >> 63) as u64;
            let mut number = zigzag << 1 | u64::from(recorded.write);
            while number >= 0x80 {
                out.push(number as u8 | 0x80);
                number >>= 7;
            }
            out.push(number as u8);
        }
        out
    }

    /// Reads the serialised form. Takes no more memory than a small multiple of the input.
    pub fn parse(bytes: &[u8]) -> Result<Self, RecordingError> {
        let mut input = Input(bytes);
        if input.take::<4>() != Ok(*MAGIC) || input.take().map(u16::from_le_bytes) != Ok(VERSION) {
            return Err(RecordingError::Unknown);
        }
        let page_size = match u32::from_le_bytes(input.take()?) {
            0x1000 => PageSize::Small,
            0x20_0000 => PageSize::Huge,
            _ => return Err(RecordingError::Damaged("an unknown page size")),
        };
        let memory_size = u64::from_le_bytes(input.take()?);
        let count = u32::from_le_bytes(input.take()?) as usize;
        if count > MAX_RECORDED {
            return Err(RecordingError::Damaged("too many pages"));
        }
        if count > input.0.len() {
            return Err(RecordingError::Length);
        }
        let mut seen = HashSet::new();
        let mut pages = Vec::with_capacity(count);
        let mut before = 0i64;
        for _ in 0..count {
            let number = input.number()?;
            let (write, zigzag) = (number & 1 != 0, number >> 1);
            let distance = (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64);
            before = before.checked_add(distance).ok_or(RecordingError::Damaged("a page out of range"))?;
            let page = u32::try_from(before).ok();
            let Some(page) = page.filter(|page| u64::from(*page) < memory_size / page_size.bytes()) else {
                return Err(RecordingError::Damaged("a page out of range"));
            };
            if !seen.insert(page) {
                return Err(RecordingError::Damaged("a page that occurs twice"));
            }
            pages.push(Recorded { page, write });
        }
        if input.0.is_empty() {
            Ok(Self { page_size, memory_size, pages })
        } else {
            Err(RecordingError::Length)
        }
    }
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], RecordingError> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(RecordingError::Length)?;
        self.0 = tail;
        Ok(*head)
    }

    /// A LEB128 number of at most 6 bytes: 42 bits are enough for a distance of 33 and a sign.
    fn number(&mut self) -> Result<u64, RecordingError> {
        let mut number = 0;
        for shift in (0..42).step_by(7) {
            let [byte] = self.take()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(RecordingError::Damaged("a number that is too long"))
    }
}

/// Collects a recording, up to a limit.
#[derive(Debug)]
pub(super) struct Recorder {
    pages: Mutex<Vec<Recorded>>,
    limit: usize,
}

impl Recorder {
    pub(super) fn new(limit: usize) -> Self {
        Self { pages: Mutex::default(), limit: limit.min(MAX_RECORDED) }
    }

    pub(super) fn note(&self, page: usize, write: bool) {
        let mut pages = self.pages.lock();
        if pages.len() < self.limit
            && let Ok(page) = u32::try_from(page)
        {
            pages.push(Recorded { page, write });
        }
    }

    pub(super) fn pages(&self) -> Vec<Recorded> {
        self.pages.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn written_and_read_again(
            pages in prop::collection::vec((any::<u32>(), any::<bool>()), 0..200),
            small in any::<bool>(),
        ) {
            let page_size = if small { PageSize::Small } else { PageSize::Huge };
            let pages = pages.into_iter().map(|(page, write)| Recorded { page, write });
            let recording = Recording::new(page_size, u64::MAX, pages);
            prop_assert_eq!(Recording::parse(&recording.to_bytes()), Ok(recording));
        }

        #[test]
        fn any_bytes_are_answered(mut bytes in prop::collection::vec(any::<u8>(), 0..100), valid in any::<bool>()) {
            if valid {
                let mut head = Recording::new(PageSize::Small, 1 << 20, []).to_bytes();
                head[18] = bytes.len() as u8;
                head.append(&mut bytes);
                bytes = head;
            }
            if let Ok(recording) = Recording::parse(&bytes) {
                prop_assert!(recording.pages().iter().all(|r| u64::from(r.page) < recording.memory_size() / 4096));
            }
        }
    }

    #[test]
    fn pages_out_of_range_and_second_mentions_are_left_out() {
        let pages = [5, 2, 5, 16, 15].map(|page| Recorded { page, write: page == 2 });
        let recording = Recording::new(PageSize::Small, 16 << 12, pages);
        assert_eq!(recording.pages(), [5, 2, 15].map(|page| Recorded { page, write: page == 2 }));
        let mut bytes = recording.to_bytes();
        assert_eq!(bytes.len(), HEADER + 3);
        bytes.push(0);
        assert_eq!(Recording::parse(&bytes), Err(RecordingError::Length));
        bytes.truncate(HEADER + 2);
        assert_eq!(Recording::parse(&bytes), Err(RecordingError::Length));
        bytes[4] = 2;
        assert_eq!(Recording::parse(&bytes), Err(RecordingError::Unknown));
    }
}
