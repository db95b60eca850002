//! Where things are in a jail. A snapshot remembers these paths: they do not change.

use std::ffi::CStr;

use crate::jail::Inside;

/// The program.
pub const PROGRAM: Inside = c"firecracker";
/// Kernel of a cold boot.
pub const KERNEL: Inside = c"kernel";
/// Initial ram disk of a cold boot.
pub const INITRD: Inside = c"initrd";
/// Node of the root disk's block device.
pub const DISK: Inside = c"disk";
/// State, to be loaded or just saved.
pub const STATE: Inside = c"snapfile";
/// Memory file, to be loaded from or saved to.
pub const MEMORY: Inside = c"memfile";
/// Socket of the memory server during a load.
pub const UFFD: Inside = c"uffd.sock";
/// Pipe of the log.
pub const LOG: Inside = c"log";
/// The one directory that the process can make something in, until the API socket is there.
pub const RUN: Inside = c"run";
/// The API's socket.
pub const API: Inside = c"run/api.sock";

/// A place as the process sees it.
pub fn path(inside: &CStr) -> String {
    format!("/{}", inside.to_string_lossy())
}
