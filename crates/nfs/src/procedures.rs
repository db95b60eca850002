//! NFSv3's procedures (RFC 1813, 3.3): each as an answer's results.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, fstat, fstatvfs, linkat, renameat, unlinkat};

use crate::attributes::{self, Before, path_of, write_after};
use crate::credentials::{Acting, Credentials};
use crate::directory;
use crate::export::Export;
use crate::files;
use crate::request::{Handle, MAX_TRANSFER, Place, Request, check_target};
use crate::status::{Result, Status};
use crate::xdr::Writer;

pub(crate) const PROGRAM: u32 = 100_003;
const MAX_LINKS: u32 = 32_000;
const MAX_NAME: u32 = 255;
const PREFERRED_LISTING: u32 = 32 << 10;
/// Hard links, symbolic links, the same limits everywhere, times that can be set.
const PROPERTIES: u32 = 0x01 | 0x02 | 0x08 | 0x10;

/// What an answer says of the file that it is about: what it is like now, or before and now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Say {
    After,
    Change,
    /// After the results, not in front of them.
    AfterLast,
    ChangeLast,
}

/// One call's way through the procedures.
pub(crate) struct Procedures<'a> {
    pub exports: &'a [Export],
    pub credentials: &'a Credentials,
    /// Changes when what was not yet on the disk may be lost.
    pub verifier: [u8; 8],
}

fn status(done: std::result::Result<(), Status>) -> u32 {
    done.map_or_else(|s| s as u32, |()| 0)
}

impl Procedures<'_> {
    fn open(&self, handle: Handle<'_>) -> Result<(&Export, OwnedFd)> {
        let mut found = Err(Status::Stale);
        for export in self.exports {
            found = export.open(handle).map(|fd| (export, fd));
            if !matches!(found, Err(Status::Stale)) {
                break;
            }
        }
        found
    }

    /// Does something to what a handle names, as the caller, and says what that is like then.
    fn on(
        &self,
        handle: Handle<'_>,
        say: Say,
        work: impl FnOnce(&Export, BorrowedFd<'_>, &Acting) -> Result<Writer>,
    ) -> Writer {
        let mut w = Writer::default();
        let change = matches!(say, Say::Change | Say::ChangeLast);
        let (export, fd) = match self.open(handle) {
            Ok(found) => found,
            Err(s) => {
                w.u32(s as u32).bool(false);
                if change {
                    w.bool(false);
                }
                return w;
            }
        };
        let fd = fd.as_fd();
        let before = change.then(|| Before::of(fd));
        let done = Acting::of(self.credentials).and_then(|acting| work(export, fd, &acting));
        let mut about = Writer::default();
        match before {
            Some(before) => before.write(&mut about, fd, export.file_system),
            None => write_after(&mut about, Some(fd), export.file_system),
        }
        match done {
            Ok(results) if matches!(say, Say::AfterLast | Say::ChangeLast) => {
                w.u32(0).append(&results).append(&about)
            }
            Ok(results) => w.u32(0).append(&about).append(&results),
            Err(s) => w.u32(s as u32).append(&about),
        };
        w
    }

    /// Makes something, whose handle and attributes are the results.
    fn make(
        &self,
        at: Place<'_>,
        work: impl FnOnce(&Export, BorrowedFd<'_>, &Acting, &[u8]) -> Result<OwnedFd>,
    ) -> Writer {
        self.on(at.dir, Say::ChangeLast, |export, dir, acting| {
            let made = work(export, dir, acting, at.changed()?)?;
            let mut w = Writer::default();
            w.bool(true).opaque(&export.handle_of(&made)?);
            write_after(&mut w, Some(made.as_fd()), export.file_system);
            Ok(w)
        })
    }

    fn remove(&self, at: Place<'_>, flags: AtFlags) -> Writer {
        self.on(at.dir, Say::Change, |_, dir, _| {
            unlinkat(dir, at.changed()?, flags)?;
            Ok(Writer::default())
        })
    }

    pub fn answer(&self, request: &Request<'_>) -> Writer {
        match *request {
            Request::Null => Writer::default(),
            Request::GetAttributes(file) => self.get_attributes(file),
            Request::SetAttributes(file, ref asked, guard) => {
                self.on(file, Say::Change, |export, fd, acting| {
                    files::set_attributes(export, fd, acting, asked, guard).map(|()| Writer::default())
                })
            }
            Request::Lookup(at) => self.on(at.dir, Say::AfterLast, |export, dir, _| {
                let found = export.look_up(dir, at.looked_up()?)?;
                let mut w = Writer::default();
                w.opaque(&export.handle_of(&found)?);
                write_after(&mut w, Some(found.as_fd()), export.file_system);
                Ok(w)
            }),
            Request::Access(file, asked) => self.on(file, Say::After, |_, fd, _| {
                let mut w = Writer::default();
                w.u32(files::access(fd, asked)?);
                Ok(w)
            }),
            Request::ReadLink(file) => self.on(file, Say::After, |_, fd, _| {
                let mut w = Writer::default();
                w.opaque(&files::read_link(fd)?);
                Ok(w)
            }),
            Request::Read { file, offset, count } => self.on(file, Say::After, |_, fd, acting| {
                let (data, is_last) = files::read(fd, acting, offset, count)?;
                let mut w = Writer::default();
                w.u32(data.len() as u32).bool(is_last).opaque(&data);
                Ok(w)
            }),
            Request::Write { file, offset, stable, data } => {
                self.on(file, Say::Change, |export, fd, acting| {
                    files::write(export, fd, acting, (offset, data), stable)?;
                    let mut w = Writer::default();
                    // FILE_SYNC or UNSTABLE.
                    w.u32(data.len() as u32).u32(if stable { 2 } else { 0 }).fixed(&self.verifier);
                    Ok(w)
                })
            }
            Request::Create(at, how) => {
                self.make(at, |export, dir, acting, name| files::create(export, dir, acting, name, how))
            }
            Request::MakeDirectory(at, ref asked) => {
                self.make(at, |export, dir, _, name| files::make_directory(export, dir, name, asked))
            }
            Request::Link { at, target, attributes: ref asked } => self.make(at, |export, dir, _, name| {
                files::make_link(export, dir, name, check_target(target)?, asked)
            }),
            Request::MakeSpecial(at, what, ref asked) => {
                self.make(at, |export, dir, _, name| files::make_special(export, dir, name, what, asked))
            }
            Request::Remove(at) => self.remove(at, AtFlags::empty()),
            Request::RemoveDirectory(at) => self.remove(at, AtFlags::REMOVEDIR),
            Request::Rename(from, to) => self.rename(from, to),
            Request::HardLink(file, at) => self.hard_link(file, at),
            Request::ReadDirectory { dir, cookie, bytes, with_attributes } => {
                self.on(dir, Say::After, |export, fd, _| {
                    directory::list(export, fd, cookie, bytes, with_attributes)
                })
            }
            Request::FileSystemUse(file) => self.on(file, Say::After, |export, _, _| {
                let s = fstatvfs(export.root())?;
                // What stays free is nobody's.
                let bytes = |blocks: u64| blocks.saturating_mul(s.f_frsize);
                let usable = |blocks| bytes(blocks).saturating_sub(export.limits.free_bytes);
                let mut w = Writer::default();
                w.u64(bytes(s.f_blocks)).u64(usable(s.f_bfree)).u64(usable(s.f_bavail));
                w.u64(s.f_files).u64(s.f_ffree).u64(s.f_favail).u32(0);
                Ok(w)
            }),
            Request::FileSystemLimits(file) => self.on(file, Say::After, |export, _, _| {
                let mut w = Writer::default();
                // Reads and writes: the most, the best, and of what they are a multiple.
                for _ in 0..2 {
                    w.u32(MAX_TRANSFER).u32(MAX_TRANSFER).u32(4096);
                }
                // Times are kept to the nanosecond.
                w.u32(PREFERRED_LISTING).u64(export.limits.file_bytes).u32(0).u32(1).u32(PROPERTIES);
                Ok(w)
            }),
            Request::PathLimits(file) => self.on(file, Say::After, |_, _, _| {
                let mut w = Writer::default();
                // Longer names are refused, owners are changed by root, letters' case counts.
                w.u32(MAX_LINKS).u32(MAX_NAME).bool(true).bool(true).bool(false).bool(true);
                Ok(w)
            }),
            Request::Commit(file) => self.on(file, Say::Change, |_, fd, acting| {
                files::commit(fd, acting)?;
                let mut w = Writer::default();
                w.fixed(&self.verifier);
                Ok(w)
            }),
        }
    }

    fn get_attributes(&self, file: Handle<'_>) -> Writer {
        let mut w = Writer::default();
        let found = self.open(file).and_then(|(export, fd)| Ok((export.file_system, fstat(fd)?)));
        match found {
            Ok((file_system, stat)) => attributes::write(w.u32(0), &stat, file_system),
            Err(s) => {
                w.u32(s as u32);
            }
        }
        w
    }

    fn rename(&self, from: Place<'_>, to: Place<'_>) -> Writer {
        let opened = self.open(from.dir).and_then(|f| Ok((f, self.open(to.dir)?)));
        let mut w = Writer::default();
        let ((export, old), (other, new)) = match opened {
            Ok(both) => both,
            Err(s) => {
                w.u32(s as u32).bool(false).bool(false).bool(false).bool(false);
                return w;
            }
        };
        let before = [Before::of(old.as_fd()), Before::of(new.as_fd())];
        let done = Acting::of(self.credentials).and_then(|_acting| {
            if !std::ptr::eq(export, other) {
                return Err(Status::XDev);
            }
            Ok(renameat(&old, from.changed()?, &new, to.changed()?)?)
        });
        w.u32(status(done));
        before[0].write(&mut w, old.as_fd(), export.file_system);
        before[1].write(&mut w, new.as_fd(), other.file_system);
        w
    }

    fn hard_link(&self, file: Handle<'_>, at: Place<'_>) -> Writer {
        let opened = self.open(file).and_then(|f| Ok((f, self.open(at.dir)?)));
        let mut w = Writer::default();
        let ((export, target), (other, dir)) = match opened {
            Ok(both) => both,
            Err(s) => {
                w.u32(s as u32).bool(false).bool(false).bool(false);
                return w;
            }
        };
        let before = Before::of(dir.as_fd());
        let done = Acting::of(self.credentials).and_then(|_acting| {
            if !std::ptr::eq(export, other) {
                return Err(Status::XDev);
            }
            // By the descriptor's path: by the descriptor alone it takes a right that only root has.
            let path = path_of(target.as_fd());
            Ok(linkat(rustix::fs::CWD, path, &dir, at.changed()?, AtFlags::SYMLINK_FOLLOW)?)
        });
        w.u32(status(done));
        write_after(&mut w, Some(target.as_fd()), export.file_system);
        before.write(&mut w, dir.as_fd(), other.file_system);
        w
    }
}
