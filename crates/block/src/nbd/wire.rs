//! The protocol's numbers, and the parts of it that are plain functions from bytes to values.
//!
//! All integers on the wire are big-endian.

/// First magic number of the server's greeting ("NBDMAGIC").
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Magic number of the newstyle handshake and of each option ("IHAVEOPT").
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic number of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic number of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic number of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic number of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags: fixed newstyle, and no zeros after `NBD_OPT_EXPORT_NAME`.
pub const HANDSHAKE_FLAGS: u16 = 0b11;
/// The client's answer to the second of [`HANDSHAKE_FLAGS`].
pub const CLIENT_NO_ZEROES: u32 = 0b10;

/// Option types (section "Option types").
pub mod option {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
}

/// Types of replies to options (section "Option reply types").
pub mod option_reply {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
}

/// Information types (`NBD_REP_INFO`).
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags (section "Transmission flags").
pub mod transmission_flag {
    #![allow(missing_docs)]
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Request types (section "Request types").
pub mod command {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
}

/// Command flags (section "Command flags").
pub mod command_flag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
}

/// Types of chunks of structured replies (section "Structured reply types").
pub mod chunk {
    #![allow(missing_docs)]
    pub const FLAG_DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const ERROR: u16 = 0x8001;
}

/// The most bytes that one request may carry or ask for: the specification's default.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// The block size at which requests are efficient, in bytes.
pub const PREFERRED_BLOCK: u32 = 4096;
/// The longest string (section "Conventions").
pub const MAX_STRING: usize = 4096;
/// The most option data that is read; longer options are refused.
pub const MAX_OPTION: usize = 8192;

/// Error values (section "Error values").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Input/output error.
    Io = 5,
    /// Invalid argument.
    Invalid = 22,
    /// No space left on device.
    NoSpace = 28,
    /// Value too large.
    Overflow = 75,
    /// The server is shutting down.
    Shutdown = 108,
}

/// The length of a request's fixed part, in bytes.
pub const REQUEST_LEN: usize = 28;

/// The fixed part of a request, as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// Request type.
    pub command: u16,
    /// The client's name for the request, sent back with the reply.
    pub cookie: u64,
    /// Where in the device, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub len: u32,
}

impl Request {
    /// Reads a request; `None` if it does not begin with the request magic.
    pub fn parse(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let [m0, m1, m2, m3, f0, f1, c0, c1, rest @ ..] = *bytes;
        let [k0, k1, k2, k3, k4, k5, k6, k7, o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        (u32::from_be_bytes([m0, m1, m2, m3]) == REQUEST_MAGIC).then_some(Self {
            flags: u16::from_be_bytes([f0, f1]),
            command: u16::from_be_bytes([c0, c1]),
            cookie: u64::from_be_bytes([k0, k1, k2, k3, k4, k5, k6, k7]),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            len: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    /// Says what to do, for a device of `size` bytes, or why the request must be refused.
    pub fn action(&self, size: u64, structured: bool) -> Result<Action, Refusal> {
        let &Self { flags, command, offset, len, .. } = self;
        let (allowed, beyond) = match command {
            command::READ if structured => (command_flag::DF, Errno::Invalid),
            command::READ | command::TRIM => (0, Errno::Invalid),
            command::WRITE => (0, Errno::NoSpace),
            command::WRITE_ZEROES => (command_flag::NO_HOLE, Errno::NoSpace),
            command::FLUSH => (0, Errno::Invalid),
            command::DISC => return Ok(Action::Disconnect),
            _ => return Err(Refusal(Errno::Invalid, "unknown command")),
        };
        // Clients set FUA on any command ("Command flags").
        if flags & !(allowed | command_flag::FUA) != 0 {
            return Err(Refusal(Errno::Invalid, "unknown or inapplicable command flag"));
        }
        let durable = flags & command_flag::FUA != 0;
        if command == command::FLUSH {
            return Ok(Action::Flush);
        }
        if matches!(command, command::READ | command::WRITE) && len > MAX_PAYLOAD {
            let errno = if structured { Errno::Overflow } else { Errno::Invalid };
            return Err(Refusal(errno, "more bytes than the advertised maximum"));
        }
        if offset.checked_add(u64::from(len)).is_none_or(|end| end > size) {
            return Err(Refusal(beyond, "beyond the end of the device"));
        }
        Ok(match command {
            command::READ => Action::Read,
            command::WRITE => Action::Write { durable },
            command::TRIM => Action::Trim { durable },
            _ => Action::WriteZeroes { durable, may_punch: flags & command_flag::NO_HOLE == 0 },
        })
    }
}

/// A request that passed the checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Send `len` bytes from `offset`.
    Read,
    /// Store the `len` bytes that follow the request at `offset`.
    Write {
        /// Answer only once it is on the disk.
        durable: bool,
    },
    /// Store zeros.
    WriteZeroes {
        /// Answer only once it is on the disk.
        durable: bool,
        /// The space may be given back.
        may_punch: bool,
    },
    /// Forget the contents.
    Trim {
        /// Answer only once it is on the disk.
        durable: bool,
    },
    /// Put all that was answered on the disk.
    Flush,
    /// Finish what is in flight and close the connection.
    Disconnect,
}

/// Why a request is refused; the connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal(pub Errno, pub &'static str);

/// The export name in the data of `NBD_OPT_INFO` and `NBD_OPT_GO`; `None` if the data is malformed.
pub fn parse_info_request(data: &[u8]) -> Option<&[u8]> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let (name, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    let (count, requests) = rest.split_first_chunk::<2>()?;
    let complete = requests.len() == usize::from(u16::from_be_bytes(*count)) * 2;
    (complete && name.len() <= MAX_STRING).then_some(name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(r: &Request) -> [u8; REQUEST_LEN] {
        let mut out = Vec::new();
        out.extend(REQUEST_MAGIC.to_be_bytes());
        out.extend(r.flags.to_be_bytes());
        out.extend(r.command.to_be_bytes());
        out.extend(r.cookie.to_be_bytes());
        out.extend(r.offset.to_be_bytes());
        out.extend(r.len.to_be_bytes());
        out.try_into().unwrap()
    }

    proptest! {
        #[test]
        fn a_request_reads_as_it_was_written(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) {
            let request = Request { flags, command, cookie, offset, len };
            let mut wire = bytes(&request);
            prop_assert_eq!(Request::parse(&wire), Some(request));
            wire[(cookie % 4) as usize] ^= 1;
            prop_assert_eq!(Request::parse(&wire), None);
        }

        #[test]
        fn what_is_accepted_lies_within_the_device(
            flags in 0u16..16, command in 0u16..9, cookie: u64, structured: bool, size in 0u64..1 << 33,
            offset in prop_oneof![0u64..1 << 33, any::<u64>()], len in prop_oneof![0u32..1 << 26, any::<u32>()],
        ) {
            let request = Request { flags, command, cookie, offset, len };
            match request.action(size, structured) {
                Ok(Action::Flush | Action::Disconnect) => {}
                Ok(action) => {
                    prop_assert!(u128::from(offset) + u128::from(len) <= u128::from(size));
                    let carries = matches!(action, Action::Read | Action::Write { .. });
                    prop_assert!(!carries || len <= MAX_PAYLOAD);
                    prop_assert!(flags & command_flag::DF == 0 || (structured && action == Action::Read));
                }
                Err(Refusal(_, text)) => prop_assert!(!text.is_empty()),
            }
        }

        #[test]
        fn any_bytes_are_an_info_request_or_not(data in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Some(name) = parse_info_request(&data) {
                prop_assert_eq!(&data[4..4 + name.len()], name);
            }
        }
    }

    #[test]
    fn refusals_have_the_specified_errors() {
        let request = |command, flags, offset, len| Request { flags, command, cookie: 1, offset, len };
        let errno = |r: Request, structured| r.action(8192, structured).unwrap_err().0;
        assert_eq!(errno(request(command::READ, 0, 8192, 1), false), Errno::Invalid);
        assert_eq!(errno(request(command::TRIM, 0, u64::MAX, 1), false), Errno::Invalid);
        assert_eq!(errno(request(command::WRITE, 0, 8191, 2), false), Errno::NoSpace);
        assert_eq!(errno(request(command::WRITE_ZEROES, 0, 0, 8193), false), Errno::NoSpace);
        assert_eq!(errno(request(command::READ, 0, 0, MAX_PAYLOAD + 1), true), Errno::Overflow);
        assert_eq!(errno(request(command::READ, command_flag::DF, 0, 1), false), Errno::Invalid);
        assert_eq!(errno(request(command::WRITE, command_flag::NO_HOLE, 0, 1), true), Errno::Invalid);
        assert_eq!(errno(request(99, 0, 0, 1), true), Errno::Invalid);
        assert_eq!(parse_info_request(b"\0\0\0\x04root\0\0"), Some(&b"root"[..]));
        assert_eq!(parse_info_request(b"\0\0\0\x04root\0\x01\0\x03"), Some(&b"root"[..]));
        assert_eq!(parse_info_request(b"\0\0\0\x04root\0\x01\0"), None);
        assert_eq!(parse_info_request(b"\xff\xff\xff\xffroot\0\0"), None);
    }
}
