//! What is in a directory.

use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;

use rustix::fs::{OFlags, RawDir, SeekFrom, seek};
use rustix::io::Errno;

use crate::attributes::{reopen, write_after};
use crate::export::Export;
use crate::status::{Result, Status};
use crate::xdr::Writer;

/// Bytes of an answer.
pub(crate) const MAX_LISTING: u32 = 64 << 10;
/// What is around the entries of an answer, at most: the call's front, the directory's attributes, the ends.
const AROUND: usize = 256;
/// Bytes that the kernel is asked for at a time.
const PIECE: usize = 16 << 10;

/// The entries after `cookie` as far as an answer of `bytes` has room, each with its attributes and handle if those
/// are wanted, and whether they are the last ones.
pub(crate) fn list(
    export: &Export,
    dir: BorrowedFd<'_>,
    cookie: u64,
    bytes: u32,
    with_attributes: bool,
) -> Result<Writer> {
    let room = (bytes.min(MAX_LISTING) as usize).saturating_sub(AROUND);
    let opened = reopen(dir, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let is_root = export.is_root(dir)?;
    if cookie != 0 {
        let at = i64::try_from(cookie).map_err(|_| Status::BadCookie)?;
        seek(&opened, SeekFrom::Start(at.cast_unsigned())).map_err(|_| Status::BadCookie)?;
    }
    let mut out = Writer::default();
    // Its verifier: a cookie is good for as long as the directory is there.
    out.u64(0);
    let mut buffer = vec![MaybeUninit::uninit(); PIECE];
    let mut entries = RawDir::new(&opened, &mut buffer);
    let mut is_last = true;
    let mut count = 0;
    while let Some(next) = entries.next() {
        let next = match next {
            Ok(e) => e,
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        };
        let name = next.file_name().to_bytes();
        let mut entry = Writer::default();
        let above = is_root && name == b"..";
        let inode = if above { export.root_inode() } else { next.ino() };
        entry.bool(true).u64(inode).opaque(name).u64(next.next_entry_cookie());
        if with_attributes {
            // What cannot be looked at, or has just gone, is listed without.
            let found = export.look_up(dir, name).ok();
            let handle = found.as_ref().and_then(|fd| export.handle_of(fd).ok());
            write_after(&mut entry, found.as_ref().map(std::os::fd::AsFd::as_fd), export.file_system);
            match handle {
                Some(h) => entry.bool(true).opaque(&h),
                None => entry.bool(false),
            };
        }
        if out.len() + entry.len() > room {
            is_last = false;
            break;
        }
        out.append(&entry);
        count += 1;
    }
    if count == 0 && !is_last {
        return Err(Status::TooSmall);
    }
    out.bool(false).bool(is_last);
    Ok(out)
}
