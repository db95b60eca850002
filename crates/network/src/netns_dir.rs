//! The directory of named namespaces as a shared mount of its own.
//!
//! ip-netns(8) makes it one at its first `add`, by binding the directory over itself with all that is
//! in it. Namespaces that were there before would then be mounted twice, and the hidden mount could
//! not be undone. So it is made one before the first namespace, and undone after the last.

use std::io;
use std::path::Path;

use crate::NetworkError;
use crate::namespace::NETNS_DIR;

/// Says that the mount is ours to undo; lost with the mount when the machine is booted again.
const MARKER: &str = "/run/nidus-netns";

fn mount(source: Option<&str>, flags: libc::c_ulong) -> io::Result<()> {
    let c = |s: &str| std::ffi::CString::new(s).map_err(io::Error::from);
    let target = c(NETNS_DIR)?;
    let source = c(source.unwrap_or(""))?;
    // SAFETY: three strings that live across the call, and no data.
    let r =
        unsafe { libc::mount(source.as_ptr(), target.as_ptr(), c"none".as_ptr(), flags, std::ptr::null()) };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes the directory a shared mount, unless it is one.
pub fn prepare() -> Result<(), NetworkError> {
    let wrap = |e| NetworkError::io(format!("make {NETNS_DIR} a mount of its own"), e);
    std::fs::create_dir_all(NETNS_DIR).map_err(wrap)?;
    // EINVAL: it is not the root of a mount (mount(2)).
    match mount(None, libc::MS_SHARED | libc::MS_REC) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
        done => return done.map_err(wrap),
    }
    std::fs::write(MARKER, "").map_err(wrap)?;
    mount(Some(NETNS_DIR), libc::MS_BIND | libc::MS_REC).map_err(wrap)?;
    mount(None, libc::MS_SHARED | libc::MS_REC).map_err(wrap)
}

/// Undoes that, if a daemon of ours did it and no namespace is left, whoever made it.
pub fn release() {
    let empty = std::fs::read_dir(NETNS_DIR).is_ok_and(|mut d| d.next().is_none());
    if !Path::new(MARKER).exists() || !empty {
        return;
    }
    if let Ok(target) = std::ffi::CString::new(NETNS_DIR) {
        // SAFETY: a path that lives across the call.
        if unsafe { libc::umount2(target.as_ptr(), 0) } != 0 {
            // Busy, or a namespace was made meanwhile: the next one undoes it.
            return;
        }
    }
    let _ = std::fs::remove_file(MARKER);
}
