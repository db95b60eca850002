//! What has come from the client and was not worked on yet.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, recv};

/// Enough for a burst of small requests.
const SMALL: usize = 64 << 10;
/// Enough for as many writes of a block as may be in flight, and for what the socket holds.
const LARGE: usize = 256 << 10;
/// What is there is moved to the front when there is less room behind it.
const ROOM: usize = 32 << 10;

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
        self.receive_by(|room| read(stream, room))
    }

    /// Like [`Input::receive`], but does not block: `None` if nothing has come.
    pub(super) fn try_receive(&mut self, stream: &UnixStream) -> io::Result<Option<usize>> {
        match self.receive_by(|room| Ok(recv(stream, room, RecvFlags::DONTWAIT)?.0)) {
            Ok(n) => Ok(Some(n)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn receive_by(&mut self, receive: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<usize> {
        if self.start == self.end || self.bytes.len() - self.end < ROOM {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = self.bytes.len() - self.end;
        debug_assert!(room > 0, "nothing received would look like the end");
        let n = receive(&mut self.bytes[self.end..])?;
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
