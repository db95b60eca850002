//! Artifacts of published builds, open for reading with the sums of their blocks.

use std::{
    fs::File,
    io::{self, Read},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    Artifact, BuildId, CHECKED_BLOCK, Damaged, StorageError,
    checksums::{Checksums, Sums, sum},
    error::blocking,
};

/// Artifacts are copied in pieces of this size.
const COPY_PIECE: usize = 1 << 20;

/// An artifact whose bytes are to be checked when they are read.
///
/// Each read is checked, not the first alone: a block may go bad, or be read from the disk anew, at
/// any time, and its sum costs less than the copy of its bytes.
#[derive(Debug)]
pub struct ArtifactFile {
    file: File,
    path: PathBuf,
    artifact: Artifact,
    sums: Arc<Checksums>,
    /// Which of the sums are this artifact's.
    index: usize,
}

impl ArtifactFile {
    /// Opens an artifact, whose length must be as it was. Blocks.
    pub(crate) fn open(
        path: PathBuf,
        artifact: Artifact,
        sums: Arc<Checksums>,
    ) -> Result<Self, StorageError> {
        let build = sums.build;
        let Some(index) = sums.artifacts.iter().position(|(a, _)| *a == artifact) else {
            return Err(StorageError::NoArtifact { build, artifact });
        };
        let file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Damaged::missing(build, artifact).into());
            }
            file => file.map_err(|e| StorageError::io("open", &path, e))?,
        };
        let found = file.metadata().map_err(|e| StorageError::io("inspect", &path, e))?.len();
        let expected = sums.artifacts[index].1.len;
        if found != expected {
            return Err(Damaged::length(build, artifact, found, expected).into());
        }
        Ok(Self { file, path, artifact, sums, index })
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.sums().len
    }

    /// The build that it belongs to.
    pub fn build(&self) -> BuildId {
        self.sums.build
    }

    /// Which artifact of the build.
    pub fn artifact(&self) -> Artifact {
        self.artifact
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file, which must not be written. What is read of it is to be given to
    /// [`ArtifactFile::check`].
    pub fn file(&self) -> &File {
        &self.file
    }

    fn sums(&self) -> &Sums {
        &self.sums.artifacts[self.index].1
    }

    /// Fails unless `bytes`, read from `offset` on, are those that were published. They are whole
    /// blocks of [`CHECKED_BLOCK`] bytes, of which the artifact's last may be short.
    pub fn check(&self, offset: u64, bytes: &[u8]) -> Result<(), Damaged> {
        let blocks = bytes.chunks(CHECKED_BLOCK as usize);
        let (first, count) = ((offset / CHECKED_BLOCK) as usize, blocks.len());
        let expected = self.sums().blocks.get(first..first + count).unwrap_or_default();
        let good = blocks.zip(expected).take_while(|(block, expected)| sum(block) == **expected).count();
        if good == count {
            return Ok(());
        }
        Err(Damaged::block(self.build(), self.artifact, offset + good as u64 * CHECKED_BLOCK))
    }

    /// What was there when the bytes from `offset` on were to be read: the end of the file.
    pub fn cut(&self) -> Damaged {
        let found = self.file.metadata().map_or(0, |m| m.len());
        Damaged::length(self.build(), self.artifact, found, self.size())
    }

    /// Fills `bytes` with whole blocks, and checks them. Blocks.
    pub(crate) fn read_blocks(&self, offset: u64, bytes: &mut [u8]) -> Result<(), StorageError> {
        match self.file.read_exact_at(bytes, offset) {
            Ok(()) => Ok(self.check(offset, bytes)?),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(self.cut().into()),
            Err(e) => Err(StorageError::io("read", &self.path, e)),
        }
    }

    /// All of it, checked. For artifacts that are small. Blocks.
    pub fn read_all(&self) -> Result<Vec<u8>, StorageError> {
        let mut bytes = vec![0; self.size() as usize];
        self.read_blocks(0, &mut bytes)?;
        Ok(bytes)
    }

    /// The bytes of a range, checked. What lies beyond the artifact is left out.
    pub async fn read_range(self: &Arc<Self>, range: Range<u64>) -> Result<Vec<u8>, StorageError> {
        let file = self.clone();
        blocking("read an artifact", move || {
            let end = range.end.min(file.size());
            let start = range.start.min(end);
            let first = start / CHECKED_BLOCK * CHECKED_BLOCK;
            let last = end.next_multiple_of(CHECKED_BLOCK).min(file.size());
            let mut bytes = vec![0; (last - first) as usize];
            file.read_blocks(first, &mut bytes)?;
            bytes.truncate((end - first) as usize);
            bytes.drain(..(start - first) as usize);
            Ok(bytes)
        })
        .await
    }

    /// Copies all of it, checked, to the beginning of a file. Blocks.
    pub fn copy_to(&self, to: &File, path: &Path) -> Result<(), StorageError> {
        let mut piece = vec![0; COPY_PIECE];
        let mut at = 0;
        while at < self.size() {
            let part = &mut piece[..(self.size() - at).min(COPY_PIECE as u64) as usize];
            self.read_blocks(at, part)?;
            to.write_all_at(part, at).map_err(|e| StorageError::io("write", path, e))?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Checks all of it and gives the file away, for those that read it themselves. Blocks.
    pub fn into_checked(self) -> Result<File, StorageError> {
        self.read_all()?;
        Ok(self.file)
    }
}

/// Reads the sums of a published build. Blocks.
pub(crate) fn load(build: BuildId, path: &Path) -> Result<Checksums, StorageError> {
    let mut file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(StorageError::Unchecked(build)),
        file => file.map_err(|e| StorageError::io("open", path, e))?,
    };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|e| StorageError::io("read", path, e))?;
    Ok(Checksums::parse(build, &bytes)?)
}
