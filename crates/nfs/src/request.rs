//! The arguments of NFSv3's procedures (RFC 1813, 3.3), checked as far as they can be without the file system.

use crate::handle::MAX_HANDLE;
use crate::status::Status;
use crate::xdr::{Garbage, Reader, Result};

/// Bytes of a read or a write.
pub(crate) const MAX_TRANSFER: u32 = 128 << 10;
/// Bytes of a name, and of where a link leads.
const MAX_NAME: usize = 255;
const MAX_TARGET: usize = 4095;
/// What is read of a name before it is called too long.
const MAX_READ: usize = 64 << 10;

pub(crate) type Handle<'a> = &'a [u8];

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub dir: Handle<'a>,
    name: &'a [u8],
}

/// What may stand in a directory, so that no name leads anywhere else.
fn check_name(name: &[u8]) -> std::result::Result<&[u8], Status> {
    match name {
        name if name.len() > MAX_NAME => Err(Status::NameTooLong),
        b"" => Err(Status::Acces),
        name if name.iter().any(|b| *b == b'/' || *b == 0) => Err(Status::Acces),
        name => Ok(name),
    }
}

impl<'a> Place<'a> {
    /// A name to be looked up: `.` and `..` are some.
    pub fn looked_up(&self) -> std::result::Result<&'a [u8], Status> {
        check_name(self.name)
    }

    /// A name to be made, changed or removed.
    pub fn changed(&self) -> std::result::Result<&'a [u8], Status> {
        match check_name(self.name)? {
            b"." => Err(Status::Inval),
            b".." => Err(Status::Exist),
            name => Ok(name),
        }
    }
}

/// A time to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum SetTime {
    #[default]
    Keep,
    Now,
    To {
        seconds: u32,
        nanos: u32,
    },
}

/// `sattr3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct SetAttributes {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub accessed: SetTime,
    pub modified: SetTime,
}

/// How a file is made.
#[derive(Debug, Clone, Copy)]
pub(crate) enum How {
    Unchecked(SetAttributes),
    Guarded(SetAttributes),
    /// Once, however often it is asked for with this verifier.
    Exclusive([u8; 8]),
}

/// What is made that is neither file, directory nor link.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Special {
    Pipe,
    Socket,
    /// Devices: never.
    Device,
}

/// A call of NFSv3.
#[derive(Debug)]
pub(crate) enum Request<'a> {
    Null,
    GetAttributes(Handle<'a>),
    /// With the time of the last change that it must still have, in seconds and nanoseconds.
    SetAttributes(Handle<'a>, SetAttributes, Option<(u32, u32)>),
    Lookup(Place<'a>),
    Access(Handle<'a>, u32),
    ReadLink(Handle<'a>),
    Read {
        file: Handle<'a>,
        offset: u64,
        count: u32,
    },
    /// `stable` is whether it must be on the disk when it is answered.
    Write {
        file: Handle<'a>,
        offset: u64,
        stable: bool,
        data: &'a [u8],
    },
    Create(Place<'a>, How),
    MakeDirectory(Place<'a>, SetAttributes),
    Link {
        at: Place<'a>,
        target: &'a [u8],
        attributes: SetAttributes,
    },
    MakeSpecial(Place<'a>, Special, SetAttributes),
    Remove(Place<'a>),
    RemoveDirectory(Place<'a>),
    Rename(Place<'a>, Place<'a>),
    HardLink(Handle<'a>, Place<'a>),
    ReadDirectory {
        dir: Handle<'a>,
        cookie: u64,
        bytes: u32,
        with_attributes: bool,
    },
    FileSystemUse(Handle<'a>),
    FileSystemLimits(Handle<'a>),
    PathLimits(Handle<'a>),
    Commit(Handle<'a>),
}

fn handle<'a>(r: &mut Reader<'a>) -> Result<Handle<'a>> {
    r.opaque(MAX_HANDLE)
}

fn place<'a>(r: &mut Reader<'a>) -> Result<Place<'a>> {
    Ok(Place { dir: handle(r)?, name: r.opaque(MAX_READ)? })
}

fn set_time(r: &mut Reader<'_>) -> Result<SetTime> {
    Ok(match r.u32()? {
        0 => SetTime::Keep,
        1 => SetTime::Now,
        2 => SetTime::To { seconds: r.u32()?, nanos: r.u32()? },
        _ => return Err(Garbage),
    })
}

fn set_attributes(r: &mut Reader<'_>) -> Result<SetAttributes> {
    Ok(SetAttributes {
        mode: r.optional(Reader::u32)?,
        uid: r.optional(Reader::u32)?,
        gid: r.optional(Reader::u32)?,
        size: r.optional(Reader::u64)?,
        accessed: set_time(r)?,
        modified: set_time(r)?,
    })
}

impl<'a> Request<'a> {
    /// The arguments of a procedure; `None` when there is no such procedure.
    ///
    /// # Errors
    /// When they are none of it.
    pub fn parse(procedure: u32, r: &mut Reader<'a>) -> Result<Option<Self>> {
        Ok(Some(match procedure {
            0 => Self::Null,
            1 => Self::GetAttributes(handle(r)?),
            2 => {
                let (file, attributes) = (handle(r)?, set_attributes(r)?);
                Self::SetAttributes(file, attributes, r.optional(|r| Ok((r.u32()?, r.u32()?)))?)
            }
            3 => Self::Lookup(place(r)?),
            4 => Self::Access(handle(r)?, r.u32()?),
            5 => Self::ReadLink(handle(r)?),
            6 => Self::Read { file: handle(r)?, offset: r.u64()?, count: r.u32()? },
            7 => {
                let (file, offset, count, stable) = (handle(r)?, r.u64()?, r.u32()?, r.u32()?);
                let data = r.opaque(MAX_TRANSFER as usize)?;
                // Less than was sent may be asked to be written, never more.
                let data = data.get(..count as usize).ok_or(Garbage)?;
                Self::Write { file, offset, stable: stable != 0, data }
            }
            8 => {
                let at = place(r)?;
                let how = match r.u32()? {
                    0 => How::Unchecked(set_attributes(r)?),
                    1 => How::Guarded(set_attributes(r)?),
                    2 => How::Exclusive(r.fixed()?),
                    _ => return Err(Garbage),
                };
                Self::Create(at, how)
            }
            9 => Self::MakeDirectory(place(r)?, set_attributes(r)?),
            10 => {
                let (at, attributes) = (place(r)?, set_attributes(r)?);
                Self::Link { at, attributes, target: r.opaque(MAX_READ)? }
            }
            11 => {
                let at = place(r)?;
                match r.u32()? {
                    // Block and character devices have numbers.
                    3 | 4 => Self::MakeSpecial(at, Special::Device, set_attributes(r)?),
                    6 => Self::MakeSpecial(at, Special::Socket, set_attributes(r)?),
                    7 => Self::MakeSpecial(at, Special::Pipe, set_attributes(r)?),
                    _ => return Err(Garbage),
                }
            }
            12 => Self::Remove(place(r)?),
            13 => Self::RemoveDirectory(place(r)?),
            14 => Self::Rename(place(r)?, place(r)?),
            15 => Self::HardLink(handle(r)?, place(r)?),
            16 => {
                let (dir, cookie, _verifier) = (handle(r)?, r.u64()?, r.u64()?);
                Self::ReadDirectory { dir, cookie, bytes: r.u32()?, with_attributes: false }
            }
            17 => {
                let (dir, cookie, _verifier, _names) = (handle(r)?, r.u64()?, r.u64()?, r.u32()?);
                Self::ReadDirectory { dir, cookie, bytes: r.u32()?, with_attributes: true }
            }
            18 => Self::FileSystemUse(handle(r)?),
            19 => Self::FileSystemLimits(handle(r)?),
            20 => Self::PathLimits(handle(r)?),
            21 => Self::Commit(handle(r)?),
            _ => return Ok(None),
        }))
    }

    /// Whether doing it twice is not as doing it once.
    pub fn is_once(&self) -> bool {
        matches!(
            self,
            Self::SetAttributes(_, _, Some(_))
                | Self::Create(..)
                | Self::MakeDirectory(..)
                | Self::Link { .. }
                | Self::MakeSpecial(..)
                | Self::Remove(_)
                | Self::RemoveDirectory(_)
                | Self::Rename(..)
                | Self::HardLink(..)
        )
    }
}

/// Where a link may lead: anywhere, since only the guest follows it.
pub(crate) fn check_target(target: &[u8]) -> std::result::Result<&[u8], Status> {
    match target {
        b"" => Err(Status::NoEnt),
        t if t.len() > MAX_TARGET => Err(Status::NameTooLong),
        t if t.contains(&0) => Err(Status::Inval),
        t => Ok(t),
    }
}

/// Reads a record as a call and its arguments, for the fuzzer.
#[doc(hidden)]
pub fn parse_anything(record: &[u8]) {
    if let Ok(mut call) = crate::call::Call::parse(record) {
        let _ = Request::parse(call.procedure % 23, &mut call.arguments);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::xdr::Writer;

    #[test]
    fn names_lead_nowhere_else() {
        let place = |name| Place { dir: b"", name };
        for (name, looked_up, changed) in [
            (&b"a"[..], None, None),
            (b"..", None, Some(Status::Exist)),
            (b".", None, Some(Status::Inval)),
            (b"", Some(Status::Acces), Some(Status::Acces)),
            (b"a/b", Some(Status::Acces), Some(Status::Acces)),
            (b"a\0b", Some(Status::Acces), Some(Status::Acces)),
            (&[b'x'; 256], Some(Status::NameTooLong), Some(Status::NameTooLong)),
        ] {
            assert_eq!(place(name).looked_up().err(), looked_up, "{name:?}");
            assert_eq!(place(name).changed().err(), changed, "{name:?}");
        }
        assert!(check_target(b"/etc/passwd").is_ok());
        assert_eq!(check_target(&[b'x'; 4096]), Err(Status::NameTooLong));
    }

    #[test]
    fn a_write_has_what_it_says() {
        let write = |count: u32, data: &[u8]| {
            let mut w = Writer::default();
            w.opaque(b"h").u64(5).u32(count).u32(2).opaque(data);
            w.into_bytes()
        };
        let bytes = write(2, b"abc");
        let Ok(Some(Request::Write { data, stable, offset, .. })) =
            Request::parse(7, &mut Reader::new(&bytes))
        else {
            panic!("not a write");
        };
        assert_eq!((data, stable, offset), (&b"ab"[..], true, 5));
        assert!(Request::parse(7, &mut Reader::new(&write(4, b"abc"))).is_err());
        let large = write(MAX_TRANSFER + 1, &vec![0; MAX_TRANSFER as usize + 1]);
        assert!(Request::parse(7, &mut Reader::new(&large)).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_fall_over(procedure in 0u32..30, bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Request::parse(procedure, &mut Reader::new(&bytes));
            parse_anything(&bytes);
        }
    }
}
