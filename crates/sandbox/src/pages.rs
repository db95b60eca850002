//! A build's memory, whichever builds store it: for VMMs that have it served page by page, and for those
//! that map a file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use nidus_block::{BlockError, MappedDevice, ReadDevice};
use nidus_memfs::Content;
use nidus_memory::uffd::{self, Cached, Fetched, Origin, PageSource, SourceError};
use nidus_memory::{Memfile, PageSize};
use nidus_storage::{StorageError, is_zero};

use crate::SaveError;

/// Memory is copied in pieces of this size.
pub const PIECE: u64 = 1 << 20;

/// A build's memory as the userfaultfd server wants it. A page that the header maps to nobody is
/// zeros without any reading.
#[derive(Debug)]
pub struct BuildPages {
    /// The memory.
    pub memory: Arc<MappedDevice>,
    /// Its pages' size.
    pub page: PageSize,
}

/// A build's memory as a file.
#[derive(Debug)]
pub struct BuildMemory(pub Arc<MappedDevice>);

impl Content for BuildMemory {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.0.read_blocking(offset, buf)?)
    }
}

#[async_trait]
impl PageSource for BuildPages {
    fn size(&self) -> u64 {
        self.memory.size()
    }

    fn cached<'a>(&'a self, at: u64, len: usize, buffer: &'a mut [u8]) -> Cached<'a> {
        let page = self.page.bytes() as usize;
        let one = len <= page;
        if self.memory.is_unstored(at..at + len as u64) {
            return if one { Cached::Zero } else { Cached::Miss };
        }
        let buffer = &mut buffer[..len];
        if !matches!(self.memory.try_read_at(at, buffer), Ok(true)) {
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
        self.memory.read_at(at, &mut bytes).await.map_err(|e| match e {
            BlockError::Io { source, .. } => SourceError::Read(source),
            BlockError::Storage(StorageError::Remote(e)) if e.is_passing() => {
                SourceError::Read(std::io::Error::other(e))
            }
            e => SourceError::Permanent(Box::new(e)),
        })?;
        let bytes = if is_zero(&bytes) { uffd::Content::Zero } else { uffd::Content::Bytes(bytes.into()) };
        Ok(Fetched { bytes, origin: Origin::Cache })
    }
}

/// The memory file that a process has mapped, checked.
pub fn base_memfile(path: &Path, memory: &MappedDevice) -> Result<Memfile, SaveError> {
    let wrong = |e| SaveError::Memfile(Box::new(e));
    Memfile::open(PathBuf::from(path), PageSize::Small, Some(memory.size())).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nidus_block::header::{Header, Mapping};
    use nidus_storage::{Artifact, BuildId, LocalStore};

    use super::*;

    const PAGE: u64 = 4096;

    #[tokio::test]
    async fn pages_come_from_the_builds_that_have_them() {
        let dir = tempfile::TempDir::new().unwrap();
        let store = LocalStore::open(dir.path()).unwrap();
        let (base, child) = (BuildId::random(), BuildId::random());
        // The base: ones, zeros, ones, ones. Its child stores page 2 and zeroes page 3.
        let page = |byte: u8| vec![byte; PAGE as usize];
        for (build, bytes) in [(base, [page(1), page(0), page(1), page(1)].concat()), (child, page(7))] {
            let staged = store.stage(build).await.unwrap();
            staged.write(Artifact::Memfile, bytes).await.unwrap();
            staged.write(Artifact::Metadata, "{}").await.unwrap();
            staged.commit().await.unwrap();
        }
        let stored = Mapping { offset: 2 * PAGE, len: PAGE, build: child, build_offset: 0 };
        let zeroed = Mapping { offset: 3 * PAGE, len: PAGE, build: BuildId::NIL, build_offset: 0 };
        let header = Header::identity(base, 4 * PAGE, PAGE).unwrap().child(child, &[stored, zeroed]).unwrap();
        let path = store.path(child, Artifact::Memfile);
        let device = MappedDevice::open(header, move |b| store.open_artifact(b, Artifact::Memfile));
        let device = device.await.unwrap();
        let source = BuildPages { memory: Arc::new(device), page: PageSize::Small };
        assert_eq!(source.size(), 4 * PAGE);
        let mut buffer = page(9);
        for (n, byte) in [(0, 1), (1, 0), (2, 7), (3, 0)] {
            let at = n * PAGE;
            match source.cached(at, PAGE as usize, &mut buffer) {
                Cached::Zero => assert_eq!(byte, 0, "page {n}"),
                Cached::Bytes(bytes) => assert!(byte != 0 && bytes == page(byte), "page {n}"),
                // A file system that cannot say what it has in its cache; never for what nobody stores.
                Cached::Miss => assert_ne!(n, 3),
            }
            match source.fetch(at, PAGE as usize).await.unwrap().bytes {
                uffd::Content::Zero => assert_eq!(byte, 0, "page {n}"),
                uffd::Content::Bytes(bytes) => assert!(byte != 0 && bytes == page(byte), "page {n}"),
            }
        }
        let mut two = vec![0; 2 * PAGE as usize];
        assert!(matches!(source.cached(0, two.len(), &mut two), Cached::Miss), "a zero page among two");
        std::fs::File::options().write(true).open(path).unwrap().write_at(&[8], 77).unwrap();
        assert!(matches!(source.cached(2 * PAGE, PAGE as usize, &mut buffer), Cached::Miss));
        let error = source.fetch(2 * PAGE, PAGE as usize).await.unwrap_err();
        assert!(matches!(error, SourceError::Permanent(_)), "{error}");
        assert!(error.to_string().contains("memfile") && error.to_string().contains(&child.to_string()));
    }
}
