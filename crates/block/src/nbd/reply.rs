//! Replies of the transmission phase, and sending many of them with few system calls.

use std::io::{self, IoSlice, Write};

use super::{
    buffer::Buffer,
    wire::{Errno, MAX_STRING, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk},
};

/// The longest header: a structured chunk's, with the offset of its data.
const HEADER_MAX: usize = 28;
/// How many replies go into one system call, two slices each.
pub(super) const BATCH: usize = 32;

/// One reply, ready to be sent.
#[derive(Debug)]
pub(super) struct Reply {
    header: [u8; HEADER_MAX],
    header_len: usize,
    body: Body,
    /// The payload bytes that the request holds of its connection's budget.
    pub(super) cost: u32,
}

#[derive(Debug)]
enum Body {
    Empty,
    Data(Buffer),
    Text(&'static str),
}

impl Reply {
    fn new(parts: &[&[u8]], body: Body, cost: u32) -> Self {
        let mut header = [0; HEADER_MAX];
        let mut header_len = 0;
        for part in parts {
            header[header_len..header_len + part.len()].copy_from_slice(part);
            header_len += part.len();
        }
        Self { header, header_len, body, cost }
    }

    /// Success without data.
    pub(super) fn done(cookie: u64, cost: u32) -> Self {
        let parts = [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &0u32.to_be_bytes(), &cookie.to_be_bytes()];
        Self::new(&parts, Body::Empty, cost)
    }

    /// The data of a read at `offset`.
    pub(super) fn data(cookie: u64, offset: u64, data: Buffer, cost: u32, structured: bool) -> Self {
        if !structured {
            let parts = [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &0u32.to_be_bytes(), &cookie.to_be_bytes()];
            return Self::new(&parts, Body::Data(data), cost);
        }
        if data.is_empty() {
            // A content chunk describes at least one byte.
            return Self::chunk(cookie, chunk::NONE, 0, &[], Body::Empty, cost);
        }
        let len = data.len() as u32 + 8;
        Self::chunk(cookie, chunk::OFFSET_DATA, len, &offset.to_be_bytes(), Body::Data(data), cost)
    }

    /// Failure; `text` is for people, and goes along where the client can take it.
    pub(super) fn error(cookie: u64, errno: Errno, text: &'static str, cost: u32, structured: bool) -> Self {
        let errno = (errno as u32).to_be_bytes();
        if !structured {
            let parts = [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &errno, &cookie.to_be_bytes()];
            return Self::new(&parts, Body::Empty, cost);
        }
        debug_assert!(text.len() <= MAX_STRING);
        let [e0, e1, e2, e3] = errno;
        let [t0, t1] = (text.len() as u16).to_be_bytes();
        let start = [e0, e1, e2, e3, t0, t1];
        let len = (start.len() + text.len()) as u32;
        Self::chunk(cookie, chunk::ERROR, len, &start, Body::Text(text), cost)
    }

    /// The only chunk of a structured reply; `start` is the payload's fixed part.
    fn chunk(cookie: u64, kind: u16, len: u32, start: &[u8], body: Body, cost: u32) -> Self {
        let parts = [
            &STRUCTURED_REPLY_MAGIC.to_be_bytes()[..],
            &chunk::FLAG_DONE.to_be_bytes(),
            &kind.to_be_bytes(),
            &cookie.to_be_bytes(),
            &len.to_be_bytes(),
            start,
        ];
        Self::new(&parts, body, cost)
    }

    fn slices(&self) -> [&[u8]; 2] {
        let body = match &self.body {
            Body::Empty => &[],
            Body::Data(data) => &data[..],
            Body::Text(text) => text.as_bytes(),
        };
        [&self.header[..self.header_len], body]
    }
}

/// Sends replies in their order. Blocks until the socket has taken them.
pub(super) fn send(mut writer: impl Write, replies: &[Reply]) -> io::Result<()> {
    for batch in replies.chunks(BATCH) {
        let mut slices = [IoSlice::new(&[]); 2 * BATCH];
        let mut count = 0;
        for slice in batch.iter().flat_map(Reply::slices).filter(|s| !s.is_empty()) {
            slices[count] = IoSlice::new(slice);
            count += 1;
        }
        let mut rest = &mut slices[..count];
        while !rest.is_empty() {
            match writer.write_vectored(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => IoSlice::advance_slices(&mut rest, n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}
