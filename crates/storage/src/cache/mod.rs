//! Frames of builds on the local disk, bounded in bytes: `{directory}/{build id}/{artifact}.{frame}`.
//!
//! Frames are kept compressed, as the object store has them, and are checked whenever they are
//! read: whatever happened to the file, a wrong byte is never served. So nothing here is flushed to
//! the disk, and a cache that is lost costs time alone.

mod lru;

use std::{
    collections::HashMap,
    fs, io,
    ops::RangeInclusive,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;
use tracing::warn;
use uuid::Uuid;

pub(crate) use lru::Lru;

use crate::{Artifact, BuildId, StorageError};

/// Holds files that are being written.
const TEMPORARY: &str = ".tmp";
/// What a file takes on the disk is counted in blocks of this many bytes.
const BLOCK: u64 = 4096;

/// Which frame of which artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct FrameKey {
    pub build: BuildId,
    pub artifact: Artifact,
    pub frame: u32,
}

impl FrameKey {
    /// All keys of a build.
    pub fn of(build: BuildId) -> RangeInclusive<Self> {
        let [first, .., last] = Artifact::ALL;
        Self { build, artifact: first, frame: 0 }..=Self { build, artifact: last, frame: u32::MAX }
    }
}

/// A cache of frames in a directory that one process at a time may use. Clones share it.
#[derive(Debug, Clone)]
pub struct FrameCache {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    limit: u64,
    state: Mutex<State>,
    /// Whether a full disk was reported since something could be written.
    full: AtomicBool,
}

#[derive(Debug)]
struct State {
    frames: Lru<FrameKey, ()>,
    /// How often each build is pinned.
    pins: HashMap<BuildId, usize>,
    /// Bytes that are being written.
    reserved: u64,
}

impl FrameCache {
    /// Opens the cache in `dir` and makes it if it is absent, for at most `limit` bytes of files.
    ///
    /// Takes up what an earlier process cached, removes what it was writing, and removes frames
    /// until the rest is within the limit. Blocks: it lists the directory.
    pub fn open(dir: impl AsRef<Path>, limit: u64) -> Result<Self, StorageError> {
        let dir = dir.as_ref().to_owned();
        let temporary = dir.join(TEMPORARY);
        match fs::remove_dir_all(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(StorageError::io("remove", &temporary, e));
            }
            _ => {}
        }
        fs::create_dir_all(&temporary)
            .map_err(|e| StorageError::io("create the directory", &temporary, e))?;
        // What guests had in their memory is nobody else's to read.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))
            .map_err(|e| StorageError::io("set the mode of", &dir, e))?;
        let mut frames = Lru::new();
        for found in scan(&dir)? {
            frames.insert(found.key, (), found.size, false);
        }
        let state = Mutex::new(State { frames, pins: HashMap::new(), reserved: 0 });
        let cache = Self { shared: Arc::new(Shared { dir, limit, state, full: AtomicBool::new(false) }) };
        cache.make_room(0);
        Ok(cache)
    }

    /// How many bytes its files take.
    pub fn used(&self) -> u64 {
        self.shared.state.lock().frames.used()
    }

    /// Keeps the frames of a build that are there or are added, until the pin is dropped.
    pub fn pin(&self, build: BuildId) -> BuildPin {
        let mut state = self.shared.state.lock();
        let pins = state.pins.entry(build).or_default();
        *pins += 1;
        if *pins == 1 {
            state.frames.hold(FrameKey::of(build), true);
        }
        BuildPin { cache: self.clone(), build }
    }

    /// Removes all frames of a build, such as one that was deleted. Blocks.
    pub fn forget(&self, build: BuildId) {
        let keys: Vec<_> = {
            let mut state = self.shared.state.lock();
            let keys: Vec<_> = state.frames.keys(FrameKey::of(build)).collect();
            for key in &keys {
                state.frames.remove(key);
            }
            keys
        };
        keys.iter().for_each(|k| self.unlink(k));
        // It stays if a frame came meanwhile.
        let _ = fs::remove_dir(self.shared.dir.join(build.to_string()));
    }

    pub(crate) fn contains(&self, key: &FrameKey) -> bool {
        self.shared.state.lock().frames.contains(key)
    }

    /// The stored bytes of a frame, if they are here. Blocks.
    pub(crate) fn get(&self, key: &FrameKey) -> Option<Vec<u8>> {
        self.shared.state.lock().frames.get(key)?;
        match fs::read(self.path(key)) {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                // Someone removed it, or evicted it just now.
                if error.kind() != io::ErrorKind::NotFound {
                    warn!(%error, path = %self.path(key).display(), "cannot read a cached frame");
                }
                self.discard(key);
                None
            }
        }
    }

    /// Removes a frame that is no good. Blocks.
    pub(crate) fn discard(&self, key: &FrameKey) {
        if self.shared.state.lock().frames.remove(key).is_some() {
            self.unlink(key);
        }
    }

    /// Keeps the stored bytes of a frame if there is room, or can be made. Says whether it did.
    /// Blocks.
    pub(crate) fn put(&self, key: &FrameKey, bytes: &[u8]) -> bool {
        let size = on_disk(bytes.len() as u64);
        if !self.make_room(size) {
            return false;
        }
        let written = self.write(key, bytes);
        let mut state = self.shared.state.lock();
        state.reserved -= size;
        match written {
            Ok(()) => {
                let held = state.pins.contains_key(&key.build);
                state.frames.insert(*key, (), size, held);
                self.shared.full.store(false, Ordering::Relaxed);
                true
            }
            Err(error) => {
                drop(state);
                // Once, not for every frame until there is room again.
                if !error.is_disk_full() || !self.shared.full.swap(true, Ordering::Relaxed) {
                    warn!(%error, "cannot cache a frame; frames are served without");
                }
                false
            }
        }
    }

    /// Reserves `size` bytes, and removes frames that nobody uses until they fit; `false` if they
    /// cannot.
    fn make_room(&self, size: u64) -> bool {
        let mut evicted = Vec::new();
        let fits = {
            let mut state = self.shared.state.lock();
            loop {
                if state.frames.used() + state.reserved + size <= self.shared.limit {
                    state.reserved += size;
                    break true;
                }
                // What is too large for all of the cache must not empty it first.
                match (size <= self.shared.limit).then(|| state.frames.evict()).flatten() {
                    Some((key, ())) => evicted.push(key),
                    None => break false,
                }
            }
        };
        evicted.iter().for_each(|k| self.unlink(k));
        fits
    }

    fn write(&self, key: &FrameKey, bytes: &[u8]) -> Result<(), StorageError> {
        let path = self.path(key);
        let temporary = self.shared.dir.join(TEMPORARY).join(Uuid::new_v4().simple().to_string());
        let written = fs::write(&temporary, bytes)
            .map_err(|e| StorageError::io("write", &temporary, e))
            .and_then(|()| rename_into(&temporary, &path));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    /// Removes the file of a frame that the index no longer has. If the frame comes back just now,
    /// its file may go with it: then it is fetched once more.
    fn unlink(&self, key: &FrameKey) {
        let path = self.path(key);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(%error, path = %path.display(), "cannot remove a cached frame; the next start will");
        }
    }

    fn path(&self, key: &FrameKey) -> PathBuf {
        self.shared.dir.join(key.build.to_string()).join(format!("{}.{:08x}", key.artifact, key.frame))
    }
}

/// Keeps the frames of a build in the cache until it is dropped.
#[derive(Debug)]
pub struct BuildPin {
    cache: FrameCache,
    build: BuildId,
}

impl Drop for BuildPin {
    fn drop(&mut self) {
        let mut state = self.cache.shared.state.lock();
        let Some(pins) = state.pins.get_mut(&self.build) else { return };
        *pins -= 1;
        if *pins == 0 {
            state.pins.remove(&self.build);
            state.frames.hold(FrameKey::of(self.build), false);
        }
    }
}

fn on_disk(len: u64) -> u64 {
    len.next_multiple_of(BLOCK)
}

fn rename_into(temporary: &Path, path: &Path) -> Result<(), StorageError> {
    match fs::rename(temporary, path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if let Some(dir) = path.parent() {
                fs::create_dir_all(dir).map_err(|e| StorageError::io("create the directory", dir, e))?;
            }
            fs::rename(temporary, path).map_err(|e| StorageError::io("write", path, e))
        }
        result => result.map_err(|e| StorageError::io("write", path, e)),
    }
}

/// A cached frame's file.
struct Found {
    /// Seconds and nanoseconds.
    written: (i64, i64),
    key: FrameKey,
    /// What it takes on the disk, in bytes.
    size: u64,
}

/// The frames in a cache's directory, the oldest first. Removes
/// directories that have become empty.
fn scan(dir: &Path) -> Result<Vec<Found>, StorageError> {
    let list = |dir: &Path| {
        let entries = fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        entries.map_err(|e| StorageError::io("list", dir, e))
    };
    let mut frames = Vec::new();
    for entry in list(dir)? {
        let name = entry.file_name();
        let Some(build) = name.to_str().and_then(|n| n.parse::<BuildId>().ok()) else { continue };
        let files = list(&entry.path())?;
        if files.is_empty() {
            let _ = fs::remove_dir(entry.path());
        }
        for file in files {
            let Some(key) = file.file_name().to_str().and_then(|n| parse_name(build, n)) else { continue };
            let meta = file.metadata().map_err(|e| StorageError::io("inspect", file.path(), e))?;
            let written = (meta.mtime(), meta.mtime_nsec());
            frames.push(Found { written, key, size: on_disk(meta.len()) });
        }
    }
    frames.sort_unstable_by_key(|f| f.written);
    Ok(frames)
}

fn parse_name(build: BuildId, name: &str) -> Option<FrameKey> {
    let (artifact, frame) = name.rsplit_once('.')?;
    let artifact = Artifact::ALL.into_iter().find(|a| a.file_name() == artifact)?;
    let key = FrameKey { build, artifact, frame: u32::from_str_radix(frame, 16).ok()? };
    (format!("{:08x}", key.frame) == frame).then_some(key)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
