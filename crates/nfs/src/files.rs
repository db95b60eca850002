//! What is done to a single file, or makes one. All as the thread's user.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{FileType, Mode, OFlags, fstat, mkdirat, mknodat, openat, readlinkat, symlinkat};
use rustix::io::Errno;

use crate::attributes::{self, NEW_DIRECTORY, NEW_FILE, expect_file, kind, reopen};
use crate::credentials::Acting;
use crate::export::Export;
use crate::request::{How, MAX_TRANSFER, SetAttributes, SetTime, Special};
use crate::status::{Result, Status};

/// Opens a file for its content. Its owner always may: the guest has checked when a program opened it, and the mode
/// may have changed since (RFC 1813, 4.4).
fn open_content(fd: BorrowedFd<'_>, acting: &Acting, flags: OFlags) -> Result<File> {
    let stat = expect_file(fd)?;
    match reopen(fd, flags) {
        Err(Status::Acces) if stat.st_uid == acting.uid => acting.as_root(|| reopen(fd, flags)),
        opened => opened,
    }
}

/// faccessat2(2), which asks for the file system's user as access(2) does for the real one.
fn may(fd: BorrowedFd<'_>, access: i32) -> bool {
    let flags = libc::AT_EACCESS | libc::AT_EMPTY_PATH;
    // SAFETY: the path is a C string, and nothing is written.
    let r = unsafe { libc::syscall(libc::SYS_faccessat2, fd.as_raw_fd(), c"".as_ptr(), access, flags) };
    r == 0
}

/// Which of the asked-for accesses the user has (`ACCESS3`).
pub(crate) fn access(fd: BorrowedFd<'_>, asked: u32) -> Result<u32> {
    const READ: u32 = 0x01;
    const LOOKUP: u32 = 0x02;
    const MODIFY: u32 = 0x04;
    const EXTEND: u32 = 0x08;
    const DELETE: u32 = 0x10;
    const EXECUTE: u32 = 0x20;
    let is_directory = kind(&fstat(fd)?) == FileType::Directory;
    let mut granted = 0;
    if may(fd, libc::R_OK) {
        granted |= READ;
    }
    if may(fd, libc::W_OK) {
        granted |= MODIFY | EXTEND | if is_directory { DELETE } else { 0 };
    }
    if may(fd, libc::X_OK) {
        granted |= if is_directory { LOOKUP } else { EXECUTE };
    }
    Ok(granted & asked)
}

/// Content, and whether it is the last.
pub(crate) fn read(fd: BorrowedFd<'_>, acting: &Acting, offset: u64, count: u32) -> Result<(Vec<u8>, bool)> {
    let file = open_content(fd, acting, OFlags::RDONLY)?;
    let mut data = vec![0; count.min(MAX_TRANSFER) as usize];
    let mut read = 0;
    // What is beyond the kernel's own offsets is beyond the end.
    while read < data.len() && i64::try_from(offset.saturating_add(data.len() as u64)).is_ok() {
        match file.read_at(&mut data[read..], offset + read as u64) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    data.truncate(read);
    let size = fstat(&file)?.st_size.cast_unsigned();
    Ok((data, offset.saturating_add(read as u64) >= size))
}

pub(crate) fn write(
    export: &Export,
    fd: BorrowedFd<'_>,
    acting: &Acting,
    (offset, data): (u64, &[u8]),
    stable: bool,
) -> Result<()> {
    let end = offset.checked_add(data.len() as u64);
    end.filter(|e| *e <= export.limits.file_bytes).ok_or(Status::FBig)?;
    export.expect_room()?;
    let file = open_content(fd, acting, OFlags::WRONLY)?;
    file.write_all_at(data, offset)?;
    if stable { Ok(file.sync_data()?) } else { Ok(()) }
}

pub(crate) fn commit(fd: BorrowedFd<'_>, acting: &Acting) -> Result<()> {
    Ok(open_content(fd, acting, OFlags::WRONLY)?.sync_data()?)
}

fn set_size(export: &Export, fd: BorrowedFd<'_>, acting: &Acting, size: u64) -> Result<()> {
    if size > export.limits.file_bytes {
        return Err(Status::FBig);
    }
    Ok(open_content(fd, acting, OFlags::WRONLY)?.set_len(size)?)
}

/// `SETATTR3`. With `guard`, only if it was last changed then.
pub(crate) fn set_attributes(
    export: &Export,
    fd: BorrowedFd<'_>,
    acting: &Acting,
    asked: &SetAttributes,
    guard: Option<(u32, u32)>,
) -> Result<()> {
    if guard.is_some_and(|g| fstat(fd).map_or(true, |s| attributes::changed(&s) != g)) {
        return Err(Status::NotSync);
    }
    if let Some(size) = asked.size {
        set_size(export, fd, acting, size)?;
    }
    attributes::set(fd, asked)
}

/// The attributes of something new, whatever the process's umask is.
fn finished(fd: OwnedFd, asked: &SetAttributes, default: u32) -> Result<OwnedFd> {
    let mode = Some(asked.mode.unwrap_or(default));
    attributes::set(fd.as_fd(), &SetAttributes { mode, ..*asked })?;
    Ok(fd)
}

/// The verifier of an exclusive creation is kept as the file's times (RFC 1813, 3.3.8).
fn as_times(verifier: [u8; 8]) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = verifier;
    // Below 2038, for file systems that have 32 bits.
    [[a, b, c, d], [e, f, g, h]].map(|half| u32::from_be_bytes(half) & 0x7fff_ffff)
}

pub(crate) fn create(
    export: &Export,
    dir: BorrowedFd<'_>,
    acting: &Acting,
    name: &[u8],
    how: How,
) -> Result<OwnedFd> {
    export.expect_room()?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = openat(dir, name, flags, Mode::from_raw_mode(0o600));
    match (made, how) {
        (Ok(fd), How::Unchecked(asked) | How::Guarded(asked)) => {
            let fd = finished(fd, &asked, NEW_FILE)?;
            if let Some(size) = asked.size.filter(|s| *s > 0) {
                set_size(export, fd.as_fd(), acting, size)?;
            }
            Ok(fd)
        }
        (Ok(fd), How::Exclusive(verifier)) => {
            let [accessed, modified] = as_times(verifier).map(|seconds| SetTime::To { seconds, nanos: 0 });
            finished(fd, &SetAttributes { accessed, modified, ..Default::default() }, NEW_FILE)
        }
        (Err(Errno::EXIST), How::Unchecked(asked)) => {
            let there = export.look_up(dir, name)?;
            expect_file(&there).map_err(|_| Status::Exist)?;
            // Of one that is there, its length alone is changed.
            if let Some(size) = asked.size {
                set_size(export, there.as_fd(), acting, size)?;
            }
            Ok(there)
        }
        (Err(Errno::EXIST), How::Exclusive(verifier)) => {
            let there = export.look_up(dir, name)?;
            let stat = expect_file(&there).map_err(|_| Status::Exist)?;
            let [accessed, modified] = as_times(verifier).map(i64::from);
            let same = (stat.st_atime, stat.st_mtime) == (accessed, modified);
            if same { Ok(there) } else { Err(Status::Exist) }
        }
        (Err(e), _) => Err(e.into()),
    }
}

pub(crate) fn make_directory(
    export: &Export,
    dir: BorrowedFd<'_>,
    name: &[u8],
    asked: &SetAttributes,
) -> Result<OwnedFd> {
    export.expect_room()?;
    mkdirat(dir, name, Mode::from_raw_mode(0o700))?;
    finished(export.look_up(dir, name)?, asked, NEW_DIRECTORY)
}

pub(crate) fn make_link(
    export: &Export,
    dir: BorrowedFd<'_>,
    name: &[u8],
    target: &[u8],
    asked: &SetAttributes,
) -> Result<OwnedFd> {
    export.expect_room()?;
    symlinkat(target, dir, name)?;
    let made = export.look_up(dir, name)?;
    attributes::set(made.as_fd(), &SetAttributes { mode: None, ..*asked })?;
    Ok(made)
}

pub(crate) fn make_special(
    export: &Export,
    dir: BorrowedFd<'_>,
    name: &[u8],
    what: Special,
    asked: &SetAttributes,
) -> Result<OwnedFd> {
    let kind = match what {
        Special::Pipe => FileType::Fifo,
        Special::Socket => FileType::Socket,
        // Whoever opens a device opens the node's.
        Special::Device => return Err(Status::NotSupp),
    };
    export.expect_room()?;
    mknodat(dir, name, kind, Mode::from_raw_mode(0o600), 0)?;
    finished(export.look_up(dir, name)?, asked, NEW_FILE)
}

pub(crate) fn read_link(fd: BorrowedFd<'_>) -> Result<Vec<u8>> {
    if kind(&fstat(fd)?) != FileType::Symlink {
        return Err(Status::Inval);
    }
    Ok(readlinkat(fd, "", Vec::new())?.into_bytes())
}
