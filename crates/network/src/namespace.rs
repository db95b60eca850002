//! Named network namespaces, as `ip netns` keeps them: a bind mount of the namespace's file
//! under /run/netns (ip-netns(8)).

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::NetworkError;

/// Directory of named namespaces.
pub const NETNS_DIR: &str = "/run/netns";

/// A namespace; a named one is unmounted and removed with its last owner.
#[derive(Debug, Clone)]
pub struct Namespace {
    file: Arc<OwnedFd>,
    name: Arc<Name>,
}

#[derive(Debug)]
struct Name(Option<PathBuf>);

impl Drop for Name {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            remove(path);
        }
    }
}

/// Unmounts and removes a named namespace; the kernel destroys it, and every interface in it,
/// when no process and no open file holds it.
pub fn remove(path: &Path) {
    if let Ok(c) = CString::new(path.as_os_str().as_encoded_bytes()) {
        // SAFETY: `c` is a path that lives across the call.
        unsafe { libc::umount2(c.as_ptr(), libc::MNT_DETACH) };
    }
    if let Err(e) = std::fs::remove_file(path)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("cannot remove {}: {e}", path.display());
    }
}

impl Namespace {
    /// The calling process's own.
    pub fn current() -> Result<Self, NetworkError> {
        let file = File::open("/proc/self/ns/net")
            .map_err(|e| NetworkError::io("open the host's network namespace", e))?;
        Ok(Self { file: Arc::new(file.into()), name: Arc::new(Name(None)) })
    }

    /// Makes a new one under `name`, which must be free.
    pub fn create(name: &str) -> Result<Self, NetworkError> {
        std::fs::create_dir_all(NETNS_DIR).map_err(|e| NetworkError::io(format!("make {NETNS_DIR}"), e))?;
        let path = Path::new(NETNS_DIR).join(name);
        let wrap = |e| NetworkError::io(format!("make the network namespace {name}"), e);
        File::create_new(&path).map_err(wrap)?;
        // From here on the file is removed if anything fails.
        let owned = Name(Some(path.clone()));
        let target = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| wrap(e.into()))?;
        let made = std::thread::scope(|s| {
            s.spawn(|| {
                // SAFETY: moves this thread, which ends right after, into a new namespace.
                if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                // SAFETY: constant and owned strings that live across the call.
                let r = unsafe {
                    libc::mount(
                        c"/proc/thread-self/ns/net".as_ptr(),
                        target.as_ptr(),
                        c"none".as_ptr(),
                        libc::MS_BIND,
                        std::ptr::null(),
                    )
                };
                if r != 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
            })
            .join()
        });
        made.unwrap_or_else(|_| Err(std::io::Error::other("the thread panicked"))).map_err(wrap)?;
        let file = File::open(&path).map_err(wrap)?;
        Ok(Self { file: Arc::new(file.into()), name: Arc::new(owned) })
    }

    /// Its path, when it is a named one.
    pub fn path(&self) -> &Path {
        self.name.0.as_deref().unwrap_or(Path::new("/proc/self/ns/net"))
    }

    /// An open file of it.
    pub fn open(&self) -> Result<OwnedFd, NetworkError> {
        self.file.try_clone().map_err(|e| NetworkError::io("duplicate a namespace's file", e))
    }

    /// Its number, for netlink.
    pub fn as_raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// Runs `work` on a thread of its own inside the namespace; no thread of a runtime is ever
    /// left in the wrong one.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NetworkError> {
        let file = self.file.clone();
        let thread = std::thread::Builder::new()
            .name("netns".into())
            .spawn(move || {
                // SAFETY: the file is open; only this thread, which ends with the work, moves.
                if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                    return Err(NetworkError::last("enter a network namespace"));
                }
                Ok(work())
            })
            .map_err(|e| NetworkError::io("start a thread", e))?;
        thread
            .join()
            .unwrap_or_else(|_| Err(NetworkError::io("work in a namespace", std::io::Error::other("panic"))))
    }
}
