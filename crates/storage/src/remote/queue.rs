//! What is still to be done in the object store: a directory with a file per build,
//! `{number}-{build id}`, which ends in `.again` or `.remove` if it is not a first upload.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;

use super::named;
use crate::{BuildId, StorageError};

/// What is to be done with a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemoteTask {
    /// Upload it, unless it is there.
    Upload,
    /// Upload it in the place of what is there: it is stored here in another way now.
    Again,
    /// Remove it from the object store.
    Remove,
}

impl RemoteTask {
    const ALL: [Self; 3] = [Self::Upload, Self::Again, Self::Remove];

    const fn suffix(self) -> &'static str {
        match self {
            Self::Upload => "",
            Self::Again => ".again",
            Self::Remove => ".remove",
        }
    }
}

/// Builds that are to be uploaded or removed, in the order in which they were added: a build that
/// others refer to comes before those. One process at a time may use it; clones share it.
///
/// It survives `kill -9` and power failures: a task is in it from when [`RemoteQueue::add`] returns
/// until [`RemoteQueue::done`] does. All of it blocks on the disk.
#[derive(Debug, Clone)]
pub struct RemoteQueue {
    dir: Arc<Path>,
    /// Held while entries are changed.
    changing: Arc<Mutex<()>>,
}

impl RemoteQueue {
    /// Opens the queue in `dir`, which is made if it is absent.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, StorageError> {
        let dir = dir.as_ref();
        fs::create_dir_all(dir).map_err(|e| StorageError::io("create the directory", dir, e))?;
        Ok(Self { dir: dir.into(), changing: Arc::default() })
    }

    /// Adds a task at the end, in place of another one of the same build; nothing changes if it is
    /// there.
    pub fn add(&self, build: BuildId, task: RemoteTask) -> Result<(), StorageError> {
        self.change(|dir, entries| {
            let mut of_build = entries.iter().filter(|e| e.build == build);
            if !of_build.any(|e| e.task == task) {
                let number = entries.last().map_or(0, |e| e.number + 1);
                let path = dir.join(format!("{number:010}-{build}{}", task.suffix()));
                File::create_new(&path).map_err(|e| StorageError::io("create", &path, e))?;
            }
            entries.iter().filter(|e| e.build == build && e.task != task).try_for_each(remove)
        })
    }

    /// Takes a task out; nothing changes if it is not there.
    pub fn done(&self, build: BuildId, task: RemoteTask) -> Result<(), StorageError> {
        self.change(|_, entries| {
            entries.iter().filter(|e| e.build == build && e.task == task).try_for_each(remove)
        })
    }

    /// What is in it, the task that was added first at the front.
    pub fn list(&self) -> Result<Vec<(BuildId, RemoteTask)>, StorageError> {
        Ok(entries(&self.dir)?.into_iter().map(|e| (e.build, e.task)).collect())
    }

    /// Changes entries, durably.
    fn change(
        &self,
        change: impl FnOnce(&Path, &[Entry]) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let _changing = self.changing.lock();
        change(&self.dir, &entries(&self.dir)?)?;
        let sync = File::open(&self.dir).and_then(|d| d.sync_all());
        sync.map_err(|e| StorageError::io("flush to the disk", &self.dir, e))
    }
}

struct Entry {
    number: u64,
    build: BuildId,
    task: RemoteTask,
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
        let task =
            RemoteTask::ALL.into_iter().find_map(|t| Some((t, named(build.strip_suffix(t.suffix())?)?)));
        if let (Ok(number), Some((task, build))) = (number.parse(), task) {
            entries.push(Entry { number, build, task, path });
        }
    }
    entries.sort_unstable_by_key(|e| e.number);
    Ok(entries)
}

fn remove(entry: &Entry) -> Result<(), StorageError> {
    match fs::remove_file(&entry.path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StorageError::io("remove", &entry.path, e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::{RemoteTask::*, *};

    #[test]
    fn tasks_stay_in_the_order_they_came_until_done() {
        let dir = tempfile::TempDir::new().unwrap();
        let queue = RemoteQueue::open(dir.path().join("uploads")).unwrap();
        let [a, b, c] = [(); 3].map(|()| BuildId::random());
        for build in [a, b, c] {
            queue.add(build, Upload).unwrap();
            queue.add(a, Upload).unwrap();
        }
        fs::write(dir.path().join("uploads/other"), "").unwrap();
        drop(queue);
        // As another process finds it.
        let queue = RemoteQueue::open(dir.path().join("uploads")).unwrap();
        assert_eq!(queue.list().unwrap(), [(a, Upload), (b, Upload), (c, Upload)]);
        queue.done(b, Upload).unwrap();
        queue.done(b, Upload).unwrap();
        queue.done(c, Remove).unwrap();
        queue.add(b, Upload).unwrap();
        assert_eq!(queue.list().unwrap(), [(a, Upload), (c, Upload), (b, Upload)]);
        // What is to be removed need not be uploaded any more.
        queue.add(a, Remove).unwrap();
        assert_eq!(queue.list().unwrap(), [(c, Upload), (b, Upload), (a, Remove)]);
        queue.add(c, Again).unwrap();
        assert_eq!(queue.list().unwrap(), [(b, Upload), (a, Remove), (c, Again)]);
    }
}
