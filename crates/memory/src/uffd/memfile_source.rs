//! Memory that is whole in a local file.

use std::{
    fs::File,
    io::{self, IoSliceMut},
    os::unix::fs::{FileExt, MetadataExt},
    sync::Arc,
};

use async_trait::async_trait;
use rustix::{
    fs::{SeekFrom, seek},
    io::ReadWriteFlags,
};

use super::{
    bitmap::AtomicPages,
    mapping::FileMapping,
    source::{Cached, Content, Fetched, Origin, PageSource, SourceError},
};
use crate::Memfile;

/// A memory file, mapped once for all VMs of its template.
///
/// The first time that any of them needs a page, it is read with a call that tells short reads and
/// says when it would have to wait for the disk, and looked at: is it all zeros? From then on its
/// bytes go to the VMs straight from the mapping (see [`FileMapping`] for what that asks of the
/// file: nobody may change it). If the page cache has lost such a page meanwhile, the copy waits
/// for the local disk; that holds up the VM concerned and no other.
#[derive(Debug)]
pub struct MappedMemfile {
    file: Arc<File>,
    mapping: FileMapping,
    size: u64,
    page: usize,
    /// Pages of which it is known whether they are zero.
    known: AtomicPages,
    zero: AtomicPages,
}

impl MappedMemfile {
    /// Opens and maps the file, and looks for holes in it. Blocks for a system call for each data
    /// extent of the file.
    pub fn open(memfile: &Memfile) -> io::Result<Self> {
        let file = File::open(memfile.path())?;
        let meta = file.metadata()?;
        if (meta.dev(), meta.ino()) != memfile.id() || meta.len() != memfile.size() {
            return Err(io::Error::other("the memory file has been replaced since it was checked"));
        }
        let (size, page) = (memfile.size(), memfile.page_size().bytes());
        let pages = (size / page) as usize;
        let mapping = FileMapping::new(&file, size as usize)?;
        let (known, zero) = (AtomicPages::new(pages), AtomicPages::new(pages));
        for_each_hole(&file, size, |start, end| {
            let holes = start.div_ceil(page) as usize..(end / page) as usize;
            zero.insert_range(holes.clone());
            known.insert_range(holes);
        })?;
        Ok(Self { file: Arc::new(file), mapping, size, page: page as usize, known, zero })
    }

    fn learn(&self, page: usize, zero: bool) {
        if zero {
            self.zero.insert(page);
        }
        self.known.insert(page);
    }
}

#[async_trait]
impl PageSource for MappedMemfile {
    fn size(&self) -> u64 {
        self.size
    }

    fn cached<'a>(&'a self, at: u64, len: usize, buffer: &'a mut [u8]) -> Cached<'a> {
        let first = (at / self.page as u64) as usize;
        let pages = first..first + len / self.page;
        // Neighbours are asked for together; a zero page among them is better off alone.
        let zero = if pages.len() == 1 { Cached::Zero } else { Cached::Miss };
        if pages.clone().any(|page| self.zero.contains(page)) {
            return zero;
        }
        if pages.clone().all(|page| self.known.contains(page)) {
            return self.mapping.bytes(at, len).map_or(Cached::Miss, Cached::Mapped);
        }
        let buffer = &mut buffer[..len];
        match rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(buffer)], at, ReadWriteFlags::NOWAIT) {
            Ok(got) if got == len => {
                let mut any_zero = false;
                for (page, bytes) in pages.zip(buffer.chunks(self.page)) {
                    let zero = is_zero(bytes);
                    self.learn(page, zero);
                    any_zero |= zero;
                }
                if any_zero { zero } else { Cached::Bytes(buffer) }
            }
            // Not in the page cache, not whole, or not to be had without waiting: `fetch` finds out.
            _ => Cached::Miss,
        }
    }

    async fn fetch(&self, at: u64, len: usize) -> Result<Fetched, SourceError> {
        let file = self.file.clone();
        let bytes = tokio::task::spawn_blocking(move || read_up_to(&file, at, len))
            .await
            .map_err(|error| SourceError::Permanent(error.into()))??;
        let content = if bytes.len() == len {
            let zero = is_zero(&bytes);
            self.learn((at / self.page as u64) as usize, zero);
            if zero { Content::Zero } else { Content::Bytes(bytes.into()) }
        } else {
            Content::Bytes(bytes.into())
        };
        Ok(Fetched { bytes: content, origin: Origin::Cache })
    }
}

/// Reads `len` bytes, or fewer at the end of the file.
fn read_up_to(file: &File, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut got = 0;
    while got < len {
        match file.read_at(&mut bytes[got..], at + got as u64) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(got);
    Ok(bytes)
}

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(512).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

fn for_each_hole(file: &File, size: u64, mut hole: impl FnMut(u64, u64)) -> io::Result<()> {
    let mut at = 0;
    while at < size {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(size),
            // No data from here on.
            Err(rustix::io::Errno::NXIO) => size,
            // The file system does not tell: everything counts as data.
            Err(rustix::io::Errno::INVAL) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if data > at {
            hole(at, data);
        }
        if data >= size {
            return Ok(());
        }
        at = match seek(file, SeekFrom::Hole(data)) {
            Ok(end) => end,
            // It was cut meanwhile: reading will tell.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::PageSize;

    const PAGE: usize = 4096;

    #[tokio::test]
    async fn holes_zeros_and_data_are_told_apart() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        // A hole, data, written zeros, data.
        file.as_file().set_len(5 * PAGE as u64).unwrap();
        file.as_file().write_all_at(&[7; PAGE], PAGE as u64).unwrap();
        file.as_file().write_all_at(&[0; PAGE], 2 * PAGE as u64).unwrap();
        file.as_file().write_all_at(&[9; PAGE], 3 * PAGE as u64).unwrap();
        file.flush().unwrap();
        let memfile = Memfile::open(file.path(), PageSize::Small, None).unwrap();
        let source = MappedMemfile::open(&memfile).unwrap();
        let mut buffer = vec![0; 4 * PAGE];
        for round in 0..3 {
            let zero =
                |page: usize, buffer: &mut [u8]| match source.cached((page * PAGE) as u64, PAGE, buffer) {
                    Cached::Zero => Some(true),
                    Cached::Miss => None,
                    Cached::Mapped(bytes) => {
                        assert!(round > 0 && bytes.len() == PAGE);
                        Some(false)
                    }
                    Cached::Bytes(bytes) => {
                        assert_eq!(bytes, [page as u8 * 2 + 5 - (page as u8 / 3) * 2; PAGE]);
                        Some(false)
                    }
                };
            // A file system without reads that do not wait answers "miss" at first.
            for (page, expected) in [(0, true), (1, false), (2, true), (3, false), (4, true)] {
                let answer = zero(page, &mut buffer);
                assert!(answer == Some(expected) || (round == 0 && answer.is_none()), "page {page}");
                let fetched = source.fetch((page * PAGE) as u64, PAGE).await.unwrap();
                assert_eq!(matches!(fetched.bytes, Content::Zero), expected);
            }
        }
        for at in [0, 2] {
            let two = source.cached((at * PAGE) as u64, PAGE * 2, &mut buffer);
            assert!(matches!(two, Cached::Miss), "a zero page among two");
        }
    }

    #[tokio::test]
    async fn a_cut_file_gives_short_reads() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[1; 2 * PAGE]).unwrap();
        let memfile = Memfile::open(file.path(), PageSize::Small, None).unwrap();
        let source = MappedMemfile::open(&memfile).unwrap();
        file.as_file().set_len(PAGE as u64 + 10).unwrap();
        assert!(matches!(source.cached(PAGE as u64, PAGE, &mut [0; PAGE]), Cached::Miss));
        let fetched = source.fetch(PAGE as u64, PAGE).await.unwrap();
        assert!(matches!(fetched.bytes, Content::Bytes(bytes) if bytes.len() == 10));
        assert!(MappedMemfile::open(&memfile).is_err());
    }
}
