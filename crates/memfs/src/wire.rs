//! The part of the kernel's FUSE protocol (include/uapi/linux/fuse.h) that read-only files need.
//! Numbers have the machine's byte order.

use rustix::io::Errno;

/// The node of the file system's root.
pub const ROOT: u64 = 1;
/// The most that one read is asked for: 256 pages.
pub const MAX_READ: usize = 1 << 20;
/// What a request may have: the kernel insists on this much.
pub const REQUEST_MAX: usize = 8 << 10;

const HEADER_LEN: usize = 40;
const REPLY_HEADER_LEN: usize = 16;

const VERSION: (u32, u32) = (7, 31);
/// Several reads of a file at once; the count of pages in our answer is meant.
const FLAGS: u32 = ASYNC_READ | MAX_PAGES;
const ASYNC_READ: u32 = 1;
const MAX_PAGES: u32 = 1 << 22;
/// Reads ahead that may be under way at once.
const MAX_BACKGROUND: u16 = 64;
const NOTIFY_INVALIDATE_ENTRY: i32 = 3;
/// Names and attributes never change: the kernel need not ask again.
const FOREVER: u64 = 1 << 40;

/// What the kernel asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// The first request.
    Init { major: u32, flags: u32, max_readahead: u32 },
    /// A name in the root.
    Lookup { name: &'a [u8] },
    /// Attributes of the node.
    GetAttributes,
    /// Bytes of the node.
    Read { offset: u64, len: usize },
    /// Something that no answer is expected to.
    Silent,
    /// Anything else.
    Other,
}

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Goes into the answer.
    pub unique: u64,
    /// Which node it is about.
    pub node: u64,
    /// What is to be done.
    pub operation: Operation<'a>,
}

impl<'a> Request<'a> {
    /// Reads a request; nothing if it is not one.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, body) = bytes.split_at_checked(HEADER_LEN)?;
        let operation = match number(header, 4)? {
            1 => Operation::Lookup { name: body.split(|b| *b == 0).next()? },
            2 | 36 | 42 => Operation::Silent,
            3 => Operation::GetAttributes,
            15 => Operation::Read { offset: long(body, 8)?, len: number(body, 16)? as usize },
            26 => Operation::Init {
                major: number(body, 0)?,
                max_readahead: number(body, 8)?,
                flags: number(body, 12)?,
            },
            _ => Operation::Other,
        };
        Some(Self { unique: long(header, 8)?, node: long(header, 16)?, operation })
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_ne_bytes(*b))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|b| u64::from_ne_bytes(*b))
}

/// The header of an answer with so many bytes after it.
pub fn header(unique: u64, result: Result<usize, Errno>) -> [u8; REPLY_HEADER_LEN] {
    let (len, error) = match result {
        Ok(len) => (len, 0),
        Err(e) => (0, -e.raw_os_error()),
    };
    raw_header(unique, len, error)
}

fn raw_header(unique: u64, len: usize, error: i32) -> [u8; REPLY_HEADER_LEN] {
    let mut out = [0; REPLY_HEADER_LEN];
    out[..4].copy_from_slice(&((REPLY_HEADER_LEN + len) as u32).to_ne_bytes());
    out[4..8].copy_from_slice(&error.to_ne_bytes());
    out[8..].copy_from_slice(&unique.to_ne_bytes());
    out
}

/// The answer to the first request; none if the kernel's protocol is another.
pub fn init(major: u32, max_readahead: u32, offered: u32) -> Option<Vec<u8>> {
    if major != VERSION.0 {
        return None;
    }
    let mut out = Vec::with_capacity(64);
    for number in [VERSION.0, VERSION.1, max_readahead, FLAGS & offered] {
        out.extend(number.to_ne_bytes());
    }
    for short in [MAX_BACKGROUND, MAX_BACKGROUND / 4 * 3] {
        out.extend(short.to_ne_bytes());
    }
    // The longest write, which nobody may do, and the granularity of times.
    for number in [4096u32, 1] {
        out.extend(number.to_ne_bytes());
    }
    out.extend(((MAX_READ / 4096) as u16).to_ne_bytes());
    out.resize(64, 0);
    Some(out)
}

/// A node's attributes, as they are part of answers.
fn attributes(node: u64, size: u64) -> Vec<u8> {
    let (mode, links) = if node == ROOT { (0o040_555u32, 2u32) } else { (0o100_444, 1) };
    let mut out = Vec::with_capacity(88);
    for long in [node, size, size.div_ceil(512), 0, 0, 0] {
        out.extend(long.to_ne_bytes());
    }
    // Three parts of times; mode, links; user, group, device, block size, flags.
    for number in [0, 0, 0, mode, links, 0, 0, 0, 4096, 0] {
        out.extend(number.to_ne_bytes());
    }
    out
}

/// The answer about a node's attributes.
pub fn attributes_reply(node: u64, size: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(104);
    out.extend(FOREVER.to_ne_bytes());
    out.extend([0; 8]);
    out.extend(attributes(node, size));
    out
}

/// The answer about a name that is there.
pub fn entry_reply(node: u64, size: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    for long in [node, 0, FOREVER, FOREVER, 0] {
        out.extend(long.to_ne_bytes());
    }
    out.extend(attributes(node, size));
    out
}

/// Tells the kernel that a name of the root is gone, and what it keeps of its file with it.
pub fn forget_entry(name: &str) -> Vec<u8> {
    let mut out = raw_header(0, 16 + name.len() + 1, NOTIFY_INVALIDATE_ENTRY).to_vec();
    out.extend(ROOT.to_ne_bytes());
    out.extend((name.len() as u32).to_ne_bytes());
    out.extend([0; 4]);
    out.extend(name.as_bytes());
    out.push(0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(((HEADER_LEN + body.len()) as u32).to_ne_bytes());
        out.extend(opcode.to_ne_bytes());
        out.extend(7u64.to_ne_bytes());
        out.extend(9u64.to_ne_bytes());
        out.extend([0; 16]);
        out.extend(body);
        out
    }

    #[test]
    fn requests_are_read_or_refused_but_never_trusted() {
        let operation = |opcode, body: &[u8]| {
            let bytes = request(opcode, body);
            let parsed = Request::parse(&bytes)?;
            assert_eq!((parsed.unique, parsed.node), (7, 9));
            Some(format!("{:?}", parsed.operation))
        };
        assert_eq!(operation(1, b"12\0").unwrap(), format!("{:?}", Operation::Lookup { name: b"12" }));
        let mut read = [0; 40];
        read[8..16].copy_from_slice(&4096u64.to_ne_bytes());
        read[16..20].copy_from_slice(&512u32.to_ne_bytes());
        assert_eq!(operation(15, &read).unwrap(), "Read { offset: 4096, len: 512 }");
        assert_eq!(operation(15, &read[..19]), None);
        assert_eq!(operation(2, &[0; 8]).unwrap(), "Silent");
        assert_eq!(operation(14, &[0; 8]).unwrap(), "Other");
        assert_eq!(Request::parse(&request(3, &[])[..30]), None);
    }

    #[test]
    fn answers_have_the_kernels_sizes() {
        assert_eq!(init(7, 1 << 17, u32::MAX).unwrap().len(), 64);
        assert_eq!(init(8, 0, 0), None);
        assert_eq!(attributes_reply(2, 5).len(), 104);
        assert_eq!(entry_reply(2, 5).len(), 128);
        assert_eq!(forget_entry("12").len(), 16 + 16 + 3);
        assert_eq!(header(3, Err(Errno::IO))[4..8], (-5i32).to_ne_bytes());
    }
}
