//! The memory of a build whose header names several builds: for VMMs that have it served page by
//! page, and for those that map the base's file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use nidus_block::{BlockError, MappedDevice, ReadDevice};
use nidus_memory::uffd::{Cached, Content, Fetched, Origin, PageSource, SourceError};
use nidus_memory::{Memfile, PageSize, ProcessMemory};

use crate::SaveError;

/// Memory is copied in pieces of this size.
pub const PIECE: u64 = 1 << 20;

/// A build's memory as the userfaultfd server wants it. A page that the header maps to nobody is
/// zeros without any reading.
#[derive(Debug)]
pub struct BuildPages(pub Arc<MappedDevice>);

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| *b == 0)
}

#[async_trait]
impl PageSource for BuildPages {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn cached<'a>(&'a self, at: u64, len: usize, buffer: &'a mut [u8]) -> Cached<'a> {
        let page = PageSize::Small.bytes() as usize;
        let one = len <= page;
        if self.0.is_unstored(at..at + len as u64) {
            return if one { Cached::Zero } else { Cached::Miss };
        }
        let buffer = &mut buffer[..len];
        if !matches!(self.0.try_read_at(at, buffer), Ok(true)) {
            return Cached::Miss;
        }
        // Of several pages none may be zeros: those are better off alone.
        match buffer.chunks(page).any(is_zero) {
            true if one => Cached::Zero,
            true => Cached::Miss,
            false => Cached::Bytes(buffer),
        }
    }

    async fn fetch(&self, at: u64, len: usize) -> Result<Fetched, SourceError> {
        let mut bytes = vec![0; len];
        self.0.read_at(at, &mut bytes).await.map_err(|e| match e {
            BlockError::Io { source, .. } => SourceError::Read(source),
            e => SourceError::Permanent(Box::new(e)),
        })?;
        let bytes = if is_zero(&bytes) { Content::Zero } else { Content::Bytes(bytes.into()) };
        Ok(Fetched { bytes, origin: Origin::Cache })
    }
}

/// The memory file that a process has mapped, checked.
pub fn base_memfile(path: &Path, memory: &MappedDevice) -> Result<Memfile, SaveError> {
    let wrong = |e| SaveError::Memfile(Box::new(e));
    Memfile::open(PathBuf::from(path), PageSize::Small, Some(memory.size())).map_err(wrong)
}

/// Writes the pages in which `memory` differs from its base into the private mapping that a stopped
/// process has of the base's file. Blocks. Returns how many bytes that were.
pub fn patch(pid: u32, memfile: &Memfile, memory: &MappedDevice) -> Result<u64, SaveError> {
    let header = memory.header();
    let process = ProcessMemory::open(pid, memfile)?;
    let (mut patched, mut piece) = (0, vec![0; PIECE as usize]);
    let changed = |m: &&nidus_block::header::Mapping| m.build != header.base() || m.build_offset != m.offset;
    for m in header.mappings().iter().filter(changed) {
        let end = (m.offset + m.len).min(header.size());
        let mut at = m.offset;
        while at < end {
            let part = &mut piece[..(end - at).min(PIECE) as usize];
            memory.read_blocking(at, part)?;
            process.write_at(at, part)?;
            at += part.len() as u64;
            patched += part.len() as u64;
        }
    }
    Ok(patched)
}

#[cfg(test)]
mod tests {
    use nidus_block::header::{Header, Mapping};
    use nidus_storage::BuildId;

    use super::*;

    const PAGE: u64 = 4096;

    #[tokio::test]
    async fn pages_come_from_the_builds_that_have_them() {
        let dir = tempfile::TempDir::new().unwrap();
        let (base, child) = (BuildId::random(), BuildId::random());
        // The base: ones, zeros, ones, ones. Its child stores page 2 and zeroes page 3.
        let page = |byte: u8| vec![byte; PAGE as usize];
        let bytes = [page(1), page(0), page(1), page(1)].concat();
        std::fs::write(dir.path().join(base.to_string()), bytes).unwrap();
        std::fs::write(dir.path().join(child.to_string()), page(7)).unwrap();
        let stored = Mapping { offset: 2 * PAGE, len: PAGE, build: child, build_offset: 0 };
        let zeroed = Mapping { offset: 3 * PAGE, len: PAGE, build: BuildId::NIL, build_offset: 0 };
        let header = Header::identity(base, 4 * PAGE, PAGE).unwrap().child(child, &[stored, zeroed]).unwrap();
        let path = dir.path().to_owned();
        let device = MappedDevice::open(header, move |b| path.join(b.to_string())).await.unwrap();
        let source = BuildPages(Arc::new(device));
        assert_eq!(source.size(), 4 * PAGE);
        let mut buffer = page(9);
        for (n, byte) in [(0, 1), (1, 0), (2, 7), (3, 0)] {
            let at = n * PAGE;
            match source.cached(at, PAGE as usize, &mut buffer) {
                Cached::Zero => assert_eq!(byte, 0, "page {n}"),
                Cached::Bytes(bytes) => assert!(byte != 0 && bytes == page(byte), "page {n}"),
                // A file system that cannot say what it has in its cache; never for what nobody stores.
                Cached::Miss => assert_ne!(n, 3),
                Cached::Mapped(_) => panic!("nothing is mapped"),
            }
            match source.fetch(at, PAGE as usize).await.unwrap().bytes {
                Content::Zero => assert_eq!(byte, 0, "page {n}"),
                Content::Bytes(bytes) => assert!(byte != 0 && bytes == page(byte), "page {n}"),
            }
        }
        let mut two = vec![0; 2 * PAGE as usize];
        assert!(matches!(source.cached(0, two.len(), &mut two), Cached::Miss), "a zero page among two");
        std::fs::File::options()
            .write(true)
            .open(dir.path().join(child.to_string()))
            .unwrap()
            .set_len(10)
            .unwrap();
        assert!(matches!(source.cached(2 * PAGE, PAGE as usize, &mut buffer), Cached::Miss));
        assert!(matches!(source.fetch(2 * PAGE, PAGE as usize).await, Err(SourceError::Permanent(_))));
    }
}
