//! What has come from the client and was not worked on yet.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;

/// Enough for a burst of small requests.
const SMALL: usize = 64 << 10;
/// Enough for as many writes of a block as may be in flight.
const LARGE: usize = 384 << 10;

/// A buffer over the connection's receiving side.
#[derive(Debug)]
pub(super) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    /// Begins with what was received already.
    pub(super) fn new(early: &[u8]) -> Self {
        let mut bytes = vec![0; SMALL.max(early.len())];
        bytes[..early.len()].copy_from_slice(early);
        Self { bytes, start: 0, end: early.len() }
    }

    /// What is there.
    pub(super) fn available(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Says that so many bytes were used.
    pub(super) fn consume(&mut self, len: usize) {
        self.start += len;
        debug_assert!(self.start <= self.end);
    }

    /// Receives more, behind what is there; 0 is the end. Blocks.
    pub(super) fn receive(&mut self, stream: &UnixStream) -> io::Result<usize> {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let room = self.bytes.len() - self.end;
        let n = read(stream, &mut self.bytes[self.end..])?;
        self.end += n;
        if n == room && self.bytes.len() < LARGE {
            // The client sends faster than it is read.
            self.bytes.resize(LARGE, 0);
        }
        Ok(n)
    }

    /// Fills `to` from what is there and then from the stream. Blocks.
    pub(super) fn take(&mut self, stream: &UnixStream, to: &mut [u8]) -> io::Result<()> {
        let here = self.available().len().min(to.len());
        to[..here].copy_from_slice(&self.available()[..here]);
        self.consume(here);
        let mut done = here;
        while done < to.len() {
            match read(stream, &mut to[done..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    /// Whether it has grown.
    pub(super) fn is_large(&self) -> bool {
        self.bytes.len() > SMALL
    }

    /// Gives memory back, if it is empty.
    pub(super) fn shrink(&mut self) {
        if self.available().is_empty() {
            *self = Self::new(&[]);
        }
    }
}

fn read(mut stream: &UnixStream, to: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.read(to) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
