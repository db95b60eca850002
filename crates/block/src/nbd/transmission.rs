//! The transmission phase: requests in, replies out, by a thread of the connection's own.
//!
//! The thread waits in the socket, and answers at once what needs no waiting: reads and writes of
//! cached data, which are nearly all. So a request costs three system calls and wakes nobody but its
//! client; many that came together share the first and the last. What has to wait for a disk or a
//! network runs on the runtime ([`Slow`]); while there is such a request, the thread waits for it and
//! for the socket.
//!
//! Writes go to the page cache on the thread too. Where the kernel holds writers up, only this
//! connection waits, and its next writes go to the runtime for a while, so that reads pass them.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::{thread, time::Instant};

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::runtime::Handle;
use tracing::debug;

use super::{
    SessionError,
    buffer::BufferPool,
    input::Input,
    pace::Pace,
    patience::Patience,
    reply::{BATCH, Reply, send},
    slow::{Context, Slow, Task, cost},
    wire::{Action, MAX_PAYLOAD, REQUEST_LEN, Request, command},
};
use crate::{BLOCK_SIZE, Zeroing};

/// The most requests of one connection that are unanswered at a time.
const MAX_IN_FLIGHT: usize = 64;
/// The most payload bytes of one connection that are in memory at a time: those of the longest
/// request.
const MAX_BYTES: usize = MAX_PAYLOAD as usize;
/// Replies of so many bytes are sent although more requests have come: the client can begin.
const ENOUGH_TO_SEND: usize = 256 << 10;
/// A long write is begun when so much of it is there, which is more than a block.
const PIECE: u64 = 48 << 10;
/// A connection without requests for so long gives its buffers back.
const IDLE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// One connection.
pub(super) struct Transmission {
    stream: UnixStream,
    input: Input,
    context: Arc<Context>,
    slow: Slow,
    pool: Arc<BufferPool>,
    /// Not sent yet.
    replies: Vec<Reply>,
    /// The payload bytes that they hold.
    reply_bytes: usize,
    pace: Pace,
    patience: Patience,
}

impl Transmission {
    /// A connection on which `early` was received before.
    pub(super) fn new(
        stream: UnixStream,
        early: &[u8],
        context: Context,
        runtime: Handle,
    ) -> io::Result<Self> {
        let context = Arc::new(context);
        Ok(Self {
            stream,
            input: Input::new(early),
            slow: Slow::new(runtime, context.clone())?,
            context,
            pool: Arc::default(),
            replies: Vec::with_capacity(BATCH),
            reply_bytes: 0,
            pace: Pace::default(),
            patience: Patience::default(),
        })
    }

    /// Serves requests until the client disconnects or the socket is shut down. What is in flight then
    /// is finished, and answered if the client still takes answers. Blocks.
    pub(super) fn run(mut self) -> Result<(), SessionError> {
        let mut end = self.serve();
        loop {
            let told = self.collect().and(self.flush());
            end = end.and_then(|()| Ok(told?));
            if self.slow.running() == 0 {
                return end;
            }
            self.slow.wait(None)?;
        }
    }

    fn serve(&mut self) -> Result<(), SessionError> {
        loop {
            while self.input.available().len() < REQUEST_LEN {
                if !self.receive()? {
                    let empty = self.input.available().is_empty();
                    return if empty {
                        Ok(())
                    } else {
                        Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
                    };
                }
            }
            let Some((head, _)) = self.input.available().split_first_chunk::<REQUEST_LEN>() else { continue };
            let request = Request::parse(head).ok_or(SessionError::BadMagic)?;
            self.input.consume(REQUEST_LEN);
            if request.command == command::WRITE && request.len > MAX_PAYLOAD {
                return Err(SessionError::WriteTooLong(request.len));
            }
            self.occupy(&request)?;
            let action = match request.action(self.context.device.size(), self.context.structured) {
                Ok(Action::Disconnect) => return Ok(()),
                Ok(action) => action,
                Err(refusal) => {
                    debug!(?request, reason = refusal.1, "refused a request");
                    if request.command == command::WRITE {
                        self.skip(request.len.into())?;
                    }
                    let (cookie, structured) = (request.cookie, self.context.structured);
                    self.reply(Reply::error(cookie, refusal.0, refusal.1, 0, structured));
                    continue;
                }
            };
            match action {
                Action::Read => self.read(request),
                Action::Write { durable } => self.write(request, durable)?,
                Action::WriteZeroes { durable, may_punch } => {
                    let how = if may_punch { Zeroing::Hole } else { Zeroing::Allocate };
                    self.slow.start(request, Task::Zero { how: Some(how), durable });
                }
                Action::Trim { durable } => self.slow.start(request, Task::Zero { how: None, durable }),
                Action::Flush => self.slow.start(request, Task::Flush),
                Action::Disconnect => return Ok(()),
            }
        }
    }

    /// Receives more, after all that can be answered is. `false`: nothing will come any more.
    fn receive(&mut self) -> Result<bool, SessionError> {
        loop {
            self.flush()?;
            if self.slow.running() > 0 {
                let ready = self.slow.wait(Some(&self.stream))?;
                self.collect()?;
                self.flush()?;
                if !ready.input {
                    continue;
                }
                return Ok(self.input.receive(&self.stream)? > 0);
            }
            return Ok(self.next_input()?);
        }
    }

    /// Receives when nothing else is to be waited for.
    fn next_input(&mut self) -> io::Result<bool> {
        let begin = Instant::now();
        let mut received = None;
        while received.is_none() && self.patience.lasts(begin.elapsed()) {
            received = self.input.try_receive(&self.stream)?;
            // Whoever else wants this processor, the client perhaps, goes first.
            thread::yield_now();
        }
        if received.is_none() && (self.pool.is_large() || self.input.is_large()) {
            self.shrink_when_idle()?;
        }
        let received = match received {
            Some(received) => received,
            None => self.input.receive(&self.stream)?,
        };
        self.patience.note(begin.elapsed());
        Ok(received > 0)
    }

    fn shrink_when_idle(&mut self) -> io::Result<()> {
        if poll(&mut [PollFd::new(&self.stream, PollFlags::IN)], Some(&IDLE)) == Ok(0) {
            self.pool.shrink();
            self.input.shrink();
        }
        Ok(())
    }

    /// Waits for a place for a request and its bytes.
    fn occupy(&mut self, request: &Request) -> Result<(), SessionError> {
        // A read of more than that is going to be refused.
        let bytes = cost(request).min(MAX_PAYLOAD) as usize;
        if self.replies.len() >= BATCH || self.reply_bytes >= ENOUGH_TO_SEND {
            self.flush()?;
        }
        while self.slow.running() + self.replies.len() >= MAX_IN_FLIGHT
            || (bytes > 0 && self.slow.bytes() + self.reply_bytes + bytes > MAX_BYTES)
        {
            if self.replies.is_empty() {
                self.slow.wait(None)?;
                self.collect()?;
            }
            self.flush()?;
        }
        Ok(())
    }

    fn read(&mut self, request: Request) {
        let mut buffer = self.pool.take(request.len as usize);
        match self.context.device.try_read_at(request.offset, &mut buffer) {
            Ok(false) => self.slow.start(request, Task::Read(buffer)),
            result => {
                self.reply(self.context.read_reply(&request, result.map(|_| buffer)));
            }
        }
    }

    fn write(&mut self, request: Request, durable: bool) -> Result<(), SessionError> {
        let end = request.offset + u64::from(request.len);
        let mut at = request.offset;
        // What has come of a long write is written while the rest is on its way: neither side waits for
        // the other, and the data stays in the processor's cache.
        while !durable && at < end && self.pace.inline(Instant::now()) {
            let left = end - at;
            while (self.input.available().len() as u64) < left.min(PIECE) {
                if self.input.receive(&self.stream)? == 0 {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
            }
            let have = left.min(self.input.available().len() as u64);
            // Pieces end with blocks: else the device would have to read.
            let next = if have == left { end } else { (at + have) / BLOCK_SIZE * BLOCK_SIZE };
            let len = (next - at) as usize;
            let piece = &self.input.available()[..len];
            match self.pace.time(|| self.context.device.try_write_at(at, piece)) {
                Ok(true) => {
                    self.input.consume(len);
                    at = next;
                }
                Ok(false) => break,
                Err(error) => {
                    self.skip(left)?;
                    self.reply(self.context.done_reply(&request, Err(error), cost(&request)));
                    return Ok(());
                }
            }
        }
        if at == end && !durable {
            self.reply(self.context.done_reply(&request, Ok(()), cost(&request)));
            return Ok(());
        }
        let mut rest = self.pool.take((end - at) as usize);
        self.input.take(&self.stream, &mut rest)?;
        self.slow.start(request, Task::Write { offset: at, data: Bytes::from_owner(rest), durable });
        Ok(())
    }

    fn reply(&mut self, reply: Reply) {
        self.reply_bytes += reply.cost as usize;
        self.replies.push(reply);
    }

    fn collect(&mut self) -> io::Result<()> {
        let before = self.replies.len();
        let result = self.slow.collect(&mut self.replies);
        self.reply_bytes += self.replies[before..].iter().map(|r| r.cost as usize).sum::<usize>();
        result
    }

    /// Sends all replies. Blocks while the client does not take them.
    fn flush(&mut self) -> io::Result<()> {
        if self.replies.is_empty() {
            return Ok(());
        }
        let sent = send(&self.stream, &self.replies);
        self.replies.clear();
        self.reply_bytes = 0;
        sent
    }

    /// Receives payload that nobody wants.
    fn skip(&mut self, mut len: u64) -> Result<(), SessionError> {
        while len > 0 {
            let mut piece = self.pool.take(len.min(PIECE) as usize);
            self.input.take(&self.stream, &mut piece)?;
            len -= piece.len() as u64;
        }
        Ok(())
    }
}
