//! A template's memory file.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// The unit in which a memory file is stored and compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB: the guest's memory is backed by huge pages.
    Huge,
}

impl PageSize {
    /// The page size in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Small => 4 << 10,
            Self::Huge => 2 << 20,
        }
    }
}

/// Why a file cannot be a guest's memory.
#[derive(Debug, thiserror::Error)]
pub enum MemfileError {
    /// The file cannot be looked at.
    #[error("cannot inspect the memory file {}: {source}", path.display())]
    Inspect {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// It is a directory, a device or the like.
    #[error("the memory file {} is not a regular file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// It is empty or ends within a page.
    #[error("the memory file {} has {size} bytes, not a multiple of its {page} byte pages", path.display())]
    Ragged {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The page size in bytes.
        page: u64,
    },
    /// The guest's memory has another size.
    #[error("the memory file {} has {size} bytes, the guest needs {expected}", path.display())]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The size of the guest's memory in bytes.
        expected: u64,
    },
}

/// A checked memory file: a regular file of whole pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memfile {
    path: PathBuf,
    size: u64,
    page_size: PageSize,
    dev: u64,
    ino: u64,
}

impl Memfile {
    /// Looks at the file and checks that it is regular, of whole pages, and `expected_size` bytes
    /// long if that is given. Blocks for one system call.
    pub fn open(
        path: impl Into<PathBuf>,
        page_size: PageSize,
        expected_size: Option<u64>,
    ) -> Result<Self, MemfileError> {
        let path = path.into();
        let meta = match fs::metadata(&path) {
            Ok(meta) => meta,
            Err(source) => return Err(MemfileError::Inspect { path, source }),
        };
        let (size, page) = (meta.len(), page_size.bytes());
        if !meta.is_file() {
            return Err(MemfileError::NotAFile { path });
        }
        if size == 0 || !size.is_multiple_of(page) {
            return Err(MemfileError::Ragged { path, size, page });
        }
        match expected_size {
            Some(expected) if expected != size => Err(MemfileError::WrongSize { path, size, expected }),
            _ => Ok(Self { path, size, page_size, dev: meta.dev(), ino: meta.ino() }),
        }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size in bytes: a multiple of the page size, not zero.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its page size.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The device and inode that identify the file.
    pub(crate) fn id(&self) -> (u64, u64) {
        (self.dev, self.ino)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_of_the_right_number_will_do() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("memfile");
        let open = |page, expected| Memfile::open(&path, page, expected);
        assert!(matches!(open(PageSize::Small, None), Err(MemfileError::Inspect { .. })));
        fs::File::create(&path).unwrap();
        assert!(matches!(open(PageSize::Small, None), Err(MemfileError::Ragged { size: 0, .. })));
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(4097).unwrap();
        assert!(matches!(open(PageSize::Small, None), Err(MemfileError::Ragged { size: 4097, .. })));
        file.set_len(8192).unwrap();
        assert!(matches!(open(PageSize::Huge, None), Err(MemfileError::Ragged { .. })));
        assert!(matches!(open(PageSize::Small, Some(4096)), Err(MemfileError::WrongSize { .. })));
        assert_eq!(open(PageSize::Small, Some(8192)).unwrap().size(), 8192);
        file.set_len(4 << 20).unwrap();
        assert_eq!(open(PageSize::Huge, None).unwrap().size(), 4 << 20);
        assert!(matches!(
            Memfile::open(dir.path(), PageSize::Small, None),
            Err(MemfileError::NotAFile { .. })
        ));
    }
}
