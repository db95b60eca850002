//! The transmission phase: requests in, replies out.
//!
//! Three loops run in one task, so that a request crosses no thread that it need not cross. The
//! first reads requests, and answers at once what needs no waiting. The second works on the others,
//! all at the same time. The third sends replies, as many as there are with each system call. The
//! first waits when too many requests, or too many bytes of them, are unanswered.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use futures::{StreamExt, stream::FuturesUnordered};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, BufReader},
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    SessionError,
    buffer::{Buffer, BufferPool},
    handshake::Agreed,
    reply::{BATCH, Reply, send},
    wire::{Action, Errno, MAX_PAYLOAD, REQUEST_LEN, Request, command},
};
use crate::{BlockDevice, BlockError, Zeroing};

/// The most requests of one connection that are unanswered at a time.
const MAX_IN_FLIGHT: usize = 64;
/// The most payload bytes of one connection that are in memory at a time: those of the longest
/// request.
const MAX_BYTES: usize = MAX_PAYLOAD as usize;
/// After so many bytes read without waiting, other tasks get their turn.
const TURN: usize = 1 << 20;
/// A connection without replies for so long gives its buffers back.
const IDLE: Duration = Duration::from_secs(1);

/// What the three loops share.
struct Session {
    device: Arc<dyn BlockDevice>,
    structured: bool,
    /// Free places for requests and for their bytes.
    requests: Semaphore,
    bytes: Semaphore,
    pool: Arc<BufferPool>,
    /// A device error was logged: a guest must not fill the log by repeating a request.
    warned: AtomicBool,
}

/// A request that may have to wait.
struct Work {
    request: Request,
    task: Task,
}

enum Task {
    Read(Buffer),
    Write { data: Bytes, durable: bool },
    Zero { how: Option<Zeroing>, durable: bool },
    Flush,
}

/// Serves requests until the client disconnects or `stop` is cancelled.
pub(super) async fn transmit<R, W>(
    reader: BufReader<R>,
    writer: W,
    device: Arc<dyn BlockDevice>,
    agreed: Agreed,
    stop: &CancellationToken,
) -> Result<(), SessionError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let session = Session {
        device,
        structured: agreed.structured,
        requests: Semaphore::new(MAX_IN_FLIGHT),
        bytes: Semaphore::new(MAX_BYTES),
        pool: Arc::default(),
        warned: AtomicBool::new(false),
    };
    let session = &session;
    // Neither queue needs a bound of its own: each request is in one of them at most, once.
    let (work_tx, work_rx) = mpsc::unbounded_channel();
    let (reply_tx, reply_rx) = mpsc::unbounded_channel();
    // Each loop owns its ends of the queues: when the first returns, the second finishes what is
    // in flight and returns, and then the third.
    let early_replies = reply_tx.clone();
    // The end of the requests, for whatever reason, must not keep replies from being sent.
    let reading = async { Ok(session.read_requests(reader, work_tx, early_replies, stop).await) };
    let working = async {
        session.work(work_rx, reply_tx).await;
        Ok(())
    };
    let (end, (), ()) = tokio::try_join!(reading, working, session.send_replies(writer, reply_rx))?;
    end
}

impl Session {
    async fn read_requests<R: AsyncRead + Unpin>(
        &self,
        mut reader: BufReader<R>,
        work: mpsc::UnboundedSender<Work>,
        replies: mpsc::UnboundedSender<Reply>,
        stop: &CancellationToken,
    ) -> Result<(), SessionError> {
        let stopped = stop.cancelled();
        tokio::pin!(stopped);
        let mut inline_bytes = 0;
        loop {
            if reader.buffer().len() < REQUEST_LEN {
                let available = tokio::select! {
                    biased;
                    () = &mut stopped => return Ok(()),
                    available = reader.fill_buf() => available?,
                };
                if available.is_empty() {
                    return Ok(());
                }
                inline_bytes = 0;
            }
            let mut bytes = [0; REQUEST_LEN];
            reader.read_exact(&mut bytes).await?;
            let request = Request::parse(&bytes).ok_or(SessionError::BadMagic)?;
            let carries = match request.command {
                command::READ | command::WRITE => request.len.min(MAX_PAYLOAD),
                _ => 0,
            };
            if request.command == command::WRITE && request.len > MAX_PAYLOAD {
                return Err(SessionError::WriteTooLong(request.len));
            }
            self.occupy(carries).await;
            let data = match request.command {
                command::WRITE => read_payload(&mut reader, request.len as usize).await?,
                _ => Bytes::new(),
            };
            let task = match request.action(self.device.size(), self.structured) {
                Err(refusal) => {
                    debug!(?request, reason = refusal.1, "refused a request");
                    let reply = Reply::error(request.cookie, refusal.0, refusal.1, carries, self.structured);
                    let _ = replies.send(reply);
                    continue;
                }
                Ok(Action::Disconnect) => return Ok(()),
                Ok(Action::Read) => {
                    let mut buffer = self.pool.take(request.len as usize);
                    match self.device.try_read_at(request.offset, &mut buffer) {
                        Ok(false) => Task::Read(buffer),
                        result => {
                            inline_bytes += buffer.len();
                            let _ = replies.send(self.read_reply(&request, result.map(|_| buffer)));
                            if inline_bytes >= TURN {
                                inline_bytes = 0;
                                tokio::task::yield_now().await;
                            }
                            continue;
                        }
                    }
                }
                Ok(Action::Write { durable }) => Task::Write { data, durable },
                Ok(Action::WriteZeroes { durable, may_punch }) => {
                    let how = if may_punch { Zeroing::Hole } else { Zeroing::Allocate };
                    Task::Zero { how: Some(how), durable }
                }
                Ok(Action::Trim { durable }) => Task::Zero { how: None, durable },
                Ok(Action::Flush) => Task::Flush,
            };
            let _ = work.send(Work { request, task });
        }
    }

    async fn work(&self, mut work: mpsc::UnboundedReceiver<Work>, replies: mpsc::UnboundedSender<Reply>) {
        let mut running = FuturesUnordered::new();
        loop {
            tokio::select! {
                Some(reply) = running.next() => { let _ = replies.send(reply); }
                next = work.recv() => match next {
                    Some(work) => running.push(self.run(work)),
                    None => break,
                },
            }
        }
        while let Some(reply) = running.next().await {
            let _ = replies.send(reply);
        }
    }

    async fn run(&self, Work { request, task }: Work) -> Reply {
        let (offset, len) = (request.offset, u64::from(request.len));
        let (result, durable) = match task {
            Task::Read(mut buffer) => {
                let result = self.device.read_at(offset, &mut buffer).await;
                return self.read_reply(&request, result.map(|()| buffer));
            }
            Task::Write { data, durable } => (self.device.write_at(offset, data).await, durable),
            Task::Zero { how: Some(how), durable } => {
                (self.device.write_zeroes(offset, len, how).await, durable)
            }
            Task::Zero { how: None, durable } => (self.device.trim(offset, len).await, durable),
            Task::Flush => (self.device.flush().await, false),
        };
        let result = match result {
            Ok(()) if durable => self.device.flush().await,
            result => result,
        };
        let cost = if request.command == command::WRITE { request.len } else { 0 };
        match result {
            Ok(()) => Reply::done(request.cookie, cost),
            Err(e) => self.failure(&request, &e, cost),
        }
    }

    fn read_reply(&self, request: &Request, result: Result<Buffer, BlockError>) -> Reply {
        match result {
            Ok(data) => Reply::data(request.cookie, request.offset, data, request.len, self.structured),
            Err(e) => self.failure(request, &e, request.len),
        }
    }

    /// The reply for a device error. The client is told the kind; paths of the host are for the log.
    fn failure(&self, request: &Request, error: &BlockError, cost: u32) -> Reply {
        let (errno, text) = match error {
            BlockError::NoSpace { .. } => (Errno::NoSpace, "no space left on the host's disk"),
            BlockError::OutOfRange { .. } => (Errno::Invalid, "beyond the end of the device"),
            BlockError::Shutdown => (Errno::Shutdown, "the server is shutting down"),
            BlockError::Truncated { .. } | BlockError::Io { .. } => {
                (Errno::Io, "input/output error on the host")
            }
        };
        if self.warned.swap(true, Ordering::Relaxed) {
            debug!(?request, %error, "a request failed");
        } else {
            warn!(?request, %error, "a request failed; later failures of this connection are logged at debug level");
        }
        Reply::error(request.cookie, errno, text, cost, self.structured)
    }

    async fn send_replies<W: AsyncWrite + Unpin>(
        &self,
        mut writer: W,
        mut replies: mpsc::UnboundedReceiver<Reply>,
    ) -> Result<(), SessionError> {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let count = match timeout(IDLE, replies.recv_many(&mut batch, BATCH)).await {
                Ok(count) => count,
                Err(_) => {
                    self.pool.shrink();
                    replies.recv_many(&mut batch, BATCH).await
                }
            };
            if count == 0 {
                return Ok(());
            }
            send(&mut writer, &batch).await?;
            self.requests.add_permits(count);
            self.bytes.add_permits(batch.drain(..).map(|reply| reply.cost as usize).sum());
        }
    }

    /// Waits for a place for a request and its bytes; the sent reply frees them.
    async fn occupy(&self, bytes: u32) {
        // The semaphores are never closed.
        if let Ok(permit) = self.requests.acquire().await {
            permit.forget();
        }
        if bytes > 0
            && let Ok(permit) = self.bytes.acquire_many(bytes).await
        {
            permit.forget();
        }
    }
}

/// Reads the payload of a write, into memory that is not cleared first.
async fn read_payload<R: AsyncRead + Unpin>(reader: &mut BufReader<R>, len: usize) -> io::Result<Bytes> {
    let mut data = BytesMut::with_capacity(len);
    while data.len() < len {
        let rest = len - data.len();
        if reader.read_buf(&mut (&mut data).limit(rest)).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(data.freeze())
}
