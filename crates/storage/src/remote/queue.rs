//! Which builds are still to be uploaded: a directory with a file per build, `{number}-{build id}`.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;

use super::named;
use crate::{BuildId, StorageError, error::blocking};

/// Builds that are to be uploaded, in the order in which they were added: a build that others refer
/// to comes before those. One process at a time may use it; clones share it.
///
/// It survives `kill -9` and power failures: a build is in it from when [`UploadQueue::add`] returns
/// until [`UploadQueue::remove`] does.
#[derive(Debug, Clone)]
pub struct UploadQueue {
    dir: Arc<Path>,
    /// Held while a number is given.
    numbering: Arc<Mutex<()>>,
}

impl UploadQueue {
    /// Opens the queue in `dir`, which is made if it is absent. Blocks for a few system calls.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, StorageError> {
        let dir = dir.as_ref();
        fs::create_dir_all(dir).map_err(|e| StorageError::io("create the directory", dir, e))?;
        Ok(Self { dir: dir.into(), numbering: Arc::default() })
    }

    /// Adds a build at the end; nothing changes if it is there.
    pub async fn add(&self, build: BuildId) -> Result<(), StorageError> {
        let queue = self.clone();
        blocking("queue an upload", move || {
            let _numbering = queue.numbering.lock();
            let entries = entries(&queue.dir)?;
            if !entries.iter().any(|e| e.build == build) {
                let number = entries.last().map_or(0, |e| e.number + 1);
                let path = queue.dir.join(format!("{number:010}-{build}"));
                File::create_new(&path).map_err(|e| StorageError::io("create", &path, e))?;
            }
            sync(&queue.dir)
        })
        .await
    }

    /// Takes a build out; nothing changes if it is not there.
    pub async fn remove(&self, build: BuildId) -> Result<(), StorageError> {
        let dir = self.dir.clone();
        blocking("take an upload off the queue", move || {
            for entry in entries(&dir)?.into_iter().filter(|e| e.build == build) {
                match fs::remove_file(&entry.path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => {
                        return Err(StorageError::io("remove", &entry.path, e));
                    }
                    _ => {}
                }
            }
            sync(&dir)
        })
        .await
    }

    /// The builds in it, the one that was added first at the front.
    pub async fn list(&self) -> Result<Vec<BuildId>, StorageError> {
        let dir = self.dir.clone();
        let list = move || Ok(entries(&dir)?.into_iter().map(|e| e.build).collect());
        blocking("list the uploads", list).await
    }
}

struct Entry {
    number: u64,
    build: BuildId,
    path: PathBuf,
}

/// What is in the queue, in its order. Files of other names are none of ours.
fn entries(dir: &Path) -> Result<Vec<Entry>, StorageError> {
    let list = |e| StorageError::io("list", dir, e);
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir).map_err(list)? {
        let path = entry.map_err(list)?.path();
        let name = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.split_once('-'));
        let Some((number, build)) = name else { continue };
        if let (Ok(number), Some(build)) = (number.parse(), named(build)) {
            entries.push(Entry { number, build, path });
        }
    }
    entries.sort_unstable_by_key(|e| e.number);
    Ok(entries)
}

fn sync(dir: &Path) -> Result<(), StorageError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| StorageError::io("flush to the disk", dir, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn builds_stay_in_the_order_they_came_until_taken_out() {
        let dir = tempfile::TempDir::new().unwrap();
        let queue = UploadQueue::open(dir.path().join("uploads")).unwrap();
        let builds = [(); 3].map(|()| BuildId::random());
        for build in builds {
            queue.add(build).await.unwrap();
            queue.add(builds[0]).await.unwrap();
        }
        fs::write(dir.path().join("uploads/other"), "").unwrap();
        drop(queue);
        // As another process finds it.
        let queue = UploadQueue::open(dir.path().join("uploads")).unwrap();
        assert_eq!(queue.list().await.unwrap(), builds);
        queue.remove(builds[1]).await.unwrap();
        queue.remove(builds[1]).await.unwrap();
        queue.add(builds[1]).await.unwrap();
        assert_eq!(queue.list().await.unwrap(), [builds[0], builds[2], builds[1]]);
    }
}
