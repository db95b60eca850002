//! A build on its way into the store: written aside, made durable, renamed into place.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
    libc::O_NOFOLLOW,
    unistd::{getegid, geteuid},
};
use tracing::warn;

use crate::{
    Artifact, BuildId, StorageError,
    checksums::{Checksums, Sums},
    error::blocking,
    remote::{RemoteTask, Uploader},
};

/// A build that is being written. Dropping it without [`StagedBuild::commit`] removes what was
/// written.
#[derive(Debug)]
pub struct StagedBuild {
    build: BuildId,
    dir: PathBuf,
    target: PathBuf,
    published: bool,
    /// Told when it is published.
    uploader: Option<Uploader>,
}

impl StagedBuild {
    pub(crate) fn new(build: BuildId, dir: PathBuf, target: PathBuf) -> Self {
        Self { build, dir, target, published: false, uploader: None }
    }

    /// Has the build queued for the object store when it is published.
    pub(crate) fn then_upload(mut self, uploader: Uploader) -> Self {
        self.uploader = Some(uploader);
        self
    }

    /// The build's id.
    pub fn build(&self) -> BuildId {
        self.build
    }

    /// The staging directory. Its mode is 0700: whoever lets another user's process write into it
    /// widens that; the commit takes the files back.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where to write an artifact.
    pub fn path(&self, artifact: Artifact) -> PathBuf {
        self.dir.join(artifact.file_name())
    }

    /// Writes a small artifact as a whole; it must not exist yet.
    pub async fn write(&self, artifact: Artifact, contents: impl Into<Vec<u8>>) -> Result<(), StorageError> {
        let path = self.path(artifact);
        let contents = contents.into();
        blocking("write an artifact", move || create(&path, &contents)).await
    }

    /// Publishes the build: files become read-only (0444) and ours, everything is flushed to the
    /// disk, then the directory is renamed into place, all or nothing.
    ///
    /// Writers must have closed their files: the mode does not stop those who have one open.
    /// Fails with [`StorageError::AlreadyExists`] if another was first, with
    /// [`StorageError::Incomplete`] without a `metadata.json`, with [`StorageError::Unexpected`] if
    /// the directory holds anything that is not an artifact. The sums of all artifacts are published
    /// with them. On failure the staging directory is
    /// removed. Once begun it runs to its end even if the returned future is dropped.
    pub async fn commit(self) -> Result<(), StorageError> {
        blocking("publish a build", move || self.commit_blocking()).await
    }

    /// The artifacts that a build's maker writes.
    fn writable(&self) -> impl Iterator<Item = Artifact> + use<> {
        Artifact::ALL.into_iter().filter(|a| *a != Artifact::Checksums)
    }

    fn write_sums(&self, sums: &Checksums) -> Result<(), StorageError> {
        let path = self.path(Artifact::Checksums);
        create(&path, &sums.to_bytes())?;
        seal(&path).map(drop)
    }

    fn commit_blocking(mut self) -> Result<(), StorageError> {
        self.seal_all()?;
        match rename(&self.dir, &self.target, RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => self.published = true,
            Err(Errno::EEXIST | Errno::ENOTEMPTY) => return Err(StorageError::AlreadyExists(self.build)),
            Err(e) => return Err(StorageError::io("publish", &self.target, e.into())),
        }
        self.sync_root()?;
        self.queue(RemoteTask::Upload);
        Ok(())
    }

    /// Puts the build in the place of the published one with its id, at once for everyone, while
    /// `swap` is held. What it replaces is removed; files of it that are open stay readable. Blocks.
    pub(crate) fn replace<T>(self, swap: impl FnOnce() -> T) -> Result<(), StorageError> {
        self.seal_all()?;
        let held = swap();
        match rename(&self.dir, &self.target, RenameFlags::RENAME_EXCHANGE) {
            Ok(()) => {}
            Err(Errno::ENOENT) => return Err(StorageError::NotFound(self.build)),
            Err(e) => return Err(StorageError::io("replace", &self.target, e.into())),
        }
        drop(held);
        // What was published is in the staging directory now, and goes with it.
        self.sync_root()?;
        self.queue(RemoteTask::Again);
        Ok(())
    }

    /// The build is published whether or not this succeeds.
    fn queue(&self, task: RemoteTask) {
        if let Some(Err(error)) = self.uploader.as_ref().map(|u| u.add_blocking(self.build, task)) {
            warn!(build = %self.build, %error, "a build cannot be queued for the object store; the next start will");
        }
    }

    /// Makes all that was written durable and adds the sums.
    fn seal_all(&self) -> Result<(), StorageError> {
        for entry in fs::read_dir(&self.dir).map_err(|e| StorageError::io("list", &self.dir, e))? {
            let name = entry.map_err(|e| StorageError::io("list", &self.dir, e))?.file_name();
            if !self.writable().any(|a| name == *a.file_name()) {
                return Err(StorageError::Unexpected { build: self.build, name });
            }
        }
        let mut sums = Checksums { build: self.build, artifacts: Vec::new() };
        for artifact in self.writable() {
            let path = self.path(artifact);
            match fs::symlink_metadata(&path) {
                // A link would let whoever made it change the artifact later, from outside.
                Ok(meta) if meta.is_file() && meta.nlink() == 1 => {
                    sums.artifacts.push((artifact, seal(&path)?));
                }
                Ok(_) => {
                    return Err(StorageError::Unexpected {
                        build: self.build,
                        name: artifact.file_name().into(),
                    });
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound && artifact != Artifact::Metadata => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    return Err(StorageError::Incomplete { build: self.build, artifact });
                }
                Err(e) => return Err(StorageError::io("inspect", &path, e)),
            }
        }
        self.write_sums(&sums)?;
        fs::set_permissions(&self.dir, Permissions::from_mode(0o755))
            .map_err(|e| StorageError::io("set the mode of", &self.dir, e))?;
        sync_dir(&self.dir)
    }

    fn sync_root(&self) -> Result<(), StorageError> {
        match self.target.parent() {
            Some(root) => sync_dir(root),
            None => Ok(()),
        }
    }
}

impl Drop for StagedBuild {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(%error, dir = %self.dir.display(), "cannot remove a staging directory; the next start will");
        }
    }
}

/// Writes a file that must not exist yet.
fn create(path: &Path, contents: &[u8]) -> Result<(), StorageError> {
    let file = OpenOptions::new().write(true).create_new(true).open(path);
    let mut file = file.map_err(|e| StorageError::io("create", path, e))?;
    file.write_all(contents).map_err(|e| StorageError::io("write", path, e))
}

/// Makes a file ours, read-only and durable; returns the sums of its blocks.
fn seal(path: &Path) -> Result<Sums, StorageError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(O_NOFOLLOW)
        .open(path)
        .map_err(|e| StorageError::io("open", path, e))?;
    let owner = file.metadata().map_err(|e| StorageError::io("inspect", path, e))?;
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    if (owner.uid(), owner.gid()) != (uid, gid) {
        // An owner could make the file writable again.
        fchown(&file, Some(uid), Some(gid)).map_err(|e| StorageError::io("take ownership of", path, e))?;
    }
    file.set_permissions(Permissions::from_mode(0o444))
        .map_err(|e| StorageError::io("set the mode of", path, e))?;
    // Before the disk is waited for: what was just written is still in the page cache.
    let sums = Sums::of(&file).map_err(|e| StorageError::io("read", path, e))?;
    file.sync_all().map_err(|e| StorageError::io("flush to the disk", path, e))?;
    Ok(sums)
}

fn sync_dir(dir: &Path) -> Result<(), StorageError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| StorageError::io("flush to the disk", dir, e))
}

/// Renames a directory, never onto another.
fn rename(from: &Path, to: &Path, how: RenameFlags) -> Result<(), Errno> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, how) {
        // The file system lacks the flag. A plain rename replaces an empty directory at most,
        // which no build is.
        Err(Errno::EINVAL) if how == RenameFlags::RENAME_NOREPLACE => {
            fs::rename(from, to).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or_default()))
        }
        result => result,
    }
}
