//! One watched folder, over inotify(7).

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};

use nidus_envd_protocol::connect::{Code, ConnectError};
use nidus_envd_protocol::filesystem::{EventType, FilesystemEvent};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::unix::AsyncFd;

use super::{entry, failed, io_error};
use crate::rpc::blocking;
use crate::users::Names;

/// Folders that one recursive watch may have.
const MAX_FOLDERS: usize = 20_000;

/// File systems whose changes from elsewhere inotify does not see (statfs(2)): NFS, SMB, CIFS,
/// SMB2, FUSE, 9p.
const NETWORK: &[i64] = &[0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42, 0x6573_5546, 0x0102_1997];

/// How to watch.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub recursive: bool,
    pub entries: bool,
    pub network_mounts: bool,
}

/// The kernel's queue of changes.
struct Queue(Inotify);

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Queue {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// A watch that collects in the kernel until it is asked.
pub struct Watch {
    inotify: AsyncFd<Queue>,
    root: PathBuf,
    folders: HashMap<WatchDescriptor, PathBuf>,
    options: Options,
}

fn flags() -> AddWatchFlags {
    AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF
        | AddWatchFlags::IN_ONLYDIR
}

impl Watch {
    /// Watches a folder from now on.
    pub async fn start(path: PathBuf, options: Options) -> Result<Self, ConnectError> {
        let prepared = blocking(move || prepare(path, options)).await?;
        let (inotify, root, folders) = prepared;
        // SAFETY: the queue owns its descriptor, which stays the same until it is dropped.
        let inotify = unsafe { AsyncFd::register(Queue(inotify)) }
            .map_err(|e| failed(Code::Internal, format!("cannot wait for changes: {e}")))?;
        Ok(Self { inotify, root, folders, options })
    }

    /// The next changes, at least one.
    pub async fn next(&mut self) -> Result<Vec<FilesystemEvent>, ConnectError> {
        loop {
            let lost = |e: std::io::Error| failed(Code::Internal, format!("cannot read changes: {e}"));
            let mut ready = self.inotify.readable().await.map_err(lost)?;
            let read = ready.try_io(|i| i.get_ref().0.read_events().map_err(std::io::Error::from));
            let raw = match read {
                Ok(r) => r.map_err(lost)?,
                Err(_would_block) => continue,
            };
            drop(ready);
            let mut events = Vec::new();
            for e in raw {
                self.translate(e, &mut events);
            }
            if !events.is_empty() {
                return Ok(events);
            }
        }
    }

    fn translate(&mut self, raw: nix::sys::inotify::InotifyEvent, out: &mut Vec<FilesystemEvent>) {
        use AddWatchFlags as F;
        let Some(folder) = self.folders.get(&raw.wd).cloned() else { return };
        if raw.mask.contains(F::IN_IGNORED) {
            self.folders.remove(&raw.wd);
            return;
        }
        let path = match &raw.name {
            Some(name) => folder.join(name),
            // A folder below the root is told of by the one that holds it.
            None if folder != self.root => return,
            None => folder,
        };
        let kind = if raw.mask.intersects(F::IN_CREATE | F::IN_MOVED_TO) {
            EventType::Create
        } else if raw.mask.contains(F::IN_MODIFY) {
            EventType::Write
        } else if raw.mask.intersects(F::IN_DELETE | F::IN_DELETE_SELF) {
            EventType::Remove
        } else if raw.mask.intersects(F::IN_MOVED_FROM | F::IN_MOVE_SELF) {
            EventType::Rename
        } else if raw.mask.contains(F::IN_ATTRIB) {
            EventType::Chmod
        } else {
            return;
        };
        out.push(self.event(&path, kind));
        if self.options.recursive && raw.mask.contains(F::IN_ISDIR) && kind == EventType::Create {
            // What was put into the new folder before it was watched is told as new too.
            let before = self.folders.len();
            let _ = add_below(&self.inotify.get_ref().0, &path, &mut self.folders);
            if self.folders.len() > before {
                self.tell_below(&path, out);
            }
        }
    }

    fn tell_below(&self, folder: &Path, out: &mut Vec<FilesystemEvent>) {
        for e in fs::read_dir(folder).into_iter().flatten().flatten() {
            out.push(self.event(&e.path(), EventType::Create));
            if e.file_type().is_ok_and(|t| t.is_dir()) && out.len() < MAX_FOLDERS {
                self.tell_below(&e.path(), out);
            }
        }
    }

    fn event(&self, path: &Path, kind: EventType) -> FilesystemEvent {
        let name = path.strip_prefix(&self.root).unwrap_or(path).to_string_lossy().into_owned();
        let entry = if self.options.entries { entry::read(path, &Names::read()).ok() } else { None };
        FilesystemEvent { name, r#type: kind.into(), entry }
    }
}

type Prepared = (Inotify, PathBuf, HashMap<WatchDescriptor, PathBuf>);

fn prepare(path: PathBuf, options: Options) -> Result<Prepared, ConnectError> {
    let m = fs::metadata(&path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => failed(Code::NotFound, format!("path not found: {}", path.display())),
        _ => io_error("look at", &path, &e),
    })?;
    if !m.is_dir() {
        return Err(failed(Code::InvalidArgument, format!("path is not a directory: {}", path.display())));
    }
    if !options.network_mounts && is_network(&path) {
        let text = format!("path is on a network mount, whose changes may not be seen: {}", path.display());
        return Err(failed(Code::InvalidArgument, text));
    }
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
        .map_err(|e| failed(Code::ResourceExhausted, format!("cannot start a watch: {e}")))?;
    let mut folders = HashMap::new();
    if options.recursive {
        add_below(&inotify, &path, &mut folders)?;
    } else {
        let wd = inotify.add_watch(&path, flags()).map_err(|e| io_error("watch", &path, &e.into()))?;
        folders.insert(wd, path.clone());
    }
    Ok((inotify, path, folders))
}

fn is_network(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|s| NETWORK.contains(&s.f_type))
}

/// Watches a folder and those below it. One that vanishes meanwhile is left out.
fn add_below(
    inotify: &Inotify,
    path: &Path,
    folders: &mut HashMap<WatchDescriptor, PathBuf>,
) -> Result<(), ConnectError> {
    let mut stack = vec![path.to_owned()];
    while let Some(folder) = stack.pop() {
        if folders.len() >= MAX_FOLDERS {
            let text = format!("there are more than {MAX_FOLDERS} folders to watch");
            return Err(failed(Code::ResourceExhausted, text));
        }
        match inotify.add_watch(&folder, flags()) {
            Ok(wd) => {
                folders.insert(wd, folder.clone());
            }
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR) if folder != path => continue,
            Err(e) => return Err(io_error("watch", &folder, &e.into())),
        }
        for e in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if e.file_type().is_ok_and(|t| t.is_dir()) {
                stack.push(e.path());
            }
        }
    }
    Ok(())
}
