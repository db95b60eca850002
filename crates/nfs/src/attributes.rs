//! What a file is like, as NFSv3 says it, and how it is changed.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, chmod,
    chownat, fstat, utimensat,
};
use rustix::io::Errno;

use crate::request::{SetAttributes, SetTime};
use crate::status::{Result, Status};
use crate::xdr::Writer;

/// Bits of a mode that are kept: a file of a volume never lends its owner's rights.
const MODE_BITS: u32 = 0o1777;
pub(crate) const NEW_FILE: u32 = 0o644;
pub(crate) const NEW_DIRECTORY: u32 = 0o755;

pub(crate) fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// A path of the process that leads to what a descriptor stands for, whatever its name is now.
pub(crate) fn path_of(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Opens what a descriptor without rights stands for, as the thread's user. Never waits for a pipe's other end.
pub(crate) fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> Result<File> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    Ok(rustix::fs::open(path_of(fd), flags, Mode::empty())?.into())
}

/// The protocol has 32 bits; what is before 1970 or after 2106 is told as the nearest.
fn told(seconds: i64) -> u32 {
    u32::try_from(seconds.max(0)).unwrap_or(u32::MAX)
}

fn time(w: &mut Writer, seconds: i64, nanos: u32) {
    w.u32(told(seconds)).u32(nanos);
}

#[expect(clippy::unnecessary_cast, reason = "the types of stat differ between architectures")]
fn times(s: &Stat) -> [(i64, u32); 3] {
    [
        (s.st_atime as i64, s.st_atime_nsec as u32),
        (s.st_mtime as i64, s.st_mtime_nsec as u32),
        (s.st_ctime as i64, s.st_ctime_nsec as u32),
    ]
}

/// When it was last changed in any way, as the protocol has it.
pub(crate) fn changed(s: &Stat) -> (u32, u32) {
    let (seconds, nanos) = times(s)[2];
    (told(seconds), nanos)
}

/// `fattr3`.
pub(crate) fn write(w: &mut Writer, s: &Stat, file_system: u64) {
    let kind = match kind(s) {
        FileType::Directory => 2,
        FileType::BlockDevice => 3,
        FileType::CharacterDevice => 4,
        FileType::Symlink => 5,
        FileType::Socket => 6,
        FileType::Fifo => 7,
        _ => 1,
    };
    w.u32(kind).u32(s.st_mode & 0o7777).u32(u32::try_from(s.st_nlink).unwrap_or(u32::MAX));
    w.u32(s.st_uid).u32(s.st_gid).u64(s.st_size.cast_unsigned()).u64(s.st_blocks.cast_unsigned() * 512);
    w.u32(0).u32(0).u64(file_system).u64(s.st_ino);
    for (seconds, nanos) in times(s) {
        time(w, seconds, nanos);
    }
}

/// `post_op_attr`.
pub(crate) fn write_after(w: &mut Writer, fd: Option<BorrowedFd<'_>>, file_system: u64) {
    match fd.and_then(|fd| fstat(fd).ok()) {
        Some(s) => {
            w.bool(true);
            write(w, &s, file_system);
        }
        None => {
            w.bool(false);
        }
    }
}

/// What a file was like before a call, so that its answer can say that nobody else has changed it (`wcc_data`).
pub(crate) struct Before(Option<Stat>);

impl Before {
    pub fn of(fd: BorrowedFd<'_>) -> Self {
        Self(fstat(fd).ok())
    }

    pub fn write(&self, w: &mut Writer, fd: BorrowedFd<'_>, file_system: u64) {
        match &self.0 {
            Some(s) => {
                w.bool(true).u64(s.st_size.cast_unsigned());
                for (seconds, nanos) in &times(s)[1..] {
                    time(w, *seconds, *nanos);
                }
            }
            None => {
                w.bool(false);
            }
        }
        write_after(w, Some(fd), file_system);
    }
}

fn stamp(t: SetTime) -> Timespec {
    match t {
        SetTime::Keep => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        SetTime::Now => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        SetTime::To { seconds, nanos } => {
            Timespec { tv_sec: seconds.into(), tv_nsec: nanos.min(999_999_999).into() }
        }
    }
}

/// Changes all that is asked for but the size, as the thread's user. What else is changed comes before the times.
pub(crate) fn set(fd: BorrowedFd<'_>, asked: &SetAttributes) -> Result<()> {
    if asked.uid.is_some() || asked.gid.is_some() {
        // All ones is "as it is" to the kernel.
        let uid = asked.uid.filter(|u| *u != u32::MAX).map(Uid::from_raw);
        let gid = asked.gid.filter(|g| *g != u32::MAX).map(Gid::from_raw);
        chownat(fd, "", uid, gid, AtFlags::EMPTY_PATH)?;
    }
    if let Some(mode) = asked.mode {
        match chmod(path_of(fd), Mode::from_raw_mode(mode & MODE_BITS)) {
            // Links have no mode.
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
    }
    if asked.accessed != SetTime::Keep || asked.modified != SetTime::Keep {
        let times =
            Timestamps { last_access: stamp(asked.accessed), last_modification: stamp(asked.modified) };
        utimensat(fd, "", &times, AtFlags::EMPTY_PATH)?;
    }
    Ok(())
}

/// The type that a call wants: files are read and written, and nothing else.
pub(crate) fn expect_file(fd: impl AsFd) -> Result<Stat> {
    let stat = fstat(fd)?;
    match kind(&stat) {
        FileType::RegularFile => Ok(stat),
        FileType::Directory => Err(Status::IsDir),
        _ => Err(Status::Inval),
    }
}
