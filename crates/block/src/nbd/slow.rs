//! Requests that have to wait for a disk or a network: they run on the runtime, all at the same time,
//! and come back to the connection's thread as replies.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno as SystemError;
use tokio::runtime::Handle;
use tracing::{debug, warn};

use super::buffer::Buffer;
use super::reply::Reply;
use super::wire::{Errno, Request, command};
use crate::{BlockDevice, BlockError, Zeroing};

/// What replies depend on beside their request.
pub(super) struct Context {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) structured: bool,
    /// A device error was logged: a guest must not fill the log by repeating a request.
    warned: AtomicBool,
}

impl Context {
    pub(super) fn new(device: Arc<dyn BlockDevice>, structured: bool) -> Self {
        Self { device, structured, warned: AtomicBool::new(false) }
    }

    pub(super) fn read_reply(&self, request: &Request, result: Result<Buffer, BlockError>) -> Reply {
        match result {
            Ok(data) => Reply::data(request.cookie, request.offset, data, request.len, self.structured),
            Err(e) => self.failure(request, &e, request.len),
        }
    }

    pub(super) fn done_reply(&self, request: &Request, result: Result<(), BlockError>, cost: u32) -> Reply {
        match result {
            Ok(()) => Reply::done(request.cookie, cost),
            Err(e) => self.failure(request, &e, cost),
        }
    }

    /// The reply for a device error. The client is told the kind; paths of the host are for the log.
    fn failure(&self, request: &Request, error: &BlockError, cost: u32) -> Reply {
        let (errno, text) = match error {
            BlockError::NoSpace { .. } => (Errno::NoSpace, "no space left on the host's disk"),
            BlockError::OutOfRange { .. } => (Errno::Invalid, "beyond the end of the device"),
            BlockError::Shutdown => (Errno::Shutdown, "the server is shutting down"),
            BlockError::Truncated { .. }
            | BlockError::Io { .. }
            | BlockError::Storage(_)
            | BlockError::Compressed { .. }
            | BlockError::Header(_) => (Errno::Io, "input/output error on the host"),
        };
        if self.warned.swap(true, Ordering::Relaxed) {
            debug!(?request, %error, "a request failed");
        } else {
            warn!(?request, %error, "a request failed; later failures of this connection are logged at debug level");
        }
        Reply::error(request.cookie, errno, text, cost, self.structured)
    }
}

/// What a request that may wait does.
pub(super) enum Task {
    Read(Buffer),
    /// Data for an offset, which may be the end of what the request carried.
    Write {
        offset: u64,
        data: Bytes,
        durable: bool,
    },
    /// `None`: trim.
    Zero {
        how: Option<Zeroing>,
        durable: bool,
    },
    Flush,
}

async fn run(context: &Context, request: Request, task: Task) -> Reply {
    let (device, offset, len) = (&context.device, request.offset, u64::from(request.len));
    let (result, durable) = match task {
        Task::Read(mut buffer) => {
            let result = device.read_at(offset, &mut buffer).await;
            return context.read_reply(&request, result.map(|()| buffer));
        }
        Task::Write { offset, data, durable } => (device.write_at(offset, data).await, durable),
        Task::Zero { how: Some(how), durable } => (device.write_zeroes(offset, len, how).await, durable),
        Task::Zero { how: None, durable } => (device.trim(offset, len).await, durable),
        Task::Flush => (device.flush().await, false),
    };
    let result = match result {
        Ok(()) if durable => device.flush().await,
        result => result,
    };
    context.done_reply(&request, result, cost(&request))
}

/// The payload bytes that a request holds of its connection's budget.
pub(super) fn cost(request: &Request) -> u32 {
    match request.command {
        command::READ | command::WRITE => request.len,
        _ => 0,
    }
}

/// What became of a request: `None` if it was dropped (its device panicked, or the runtime was shut
/// down).
type Finished = Option<Reply>;

/// The requests of one connection that are on the runtime.
pub(super) struct Slow {
    runtime: Handle,
    context: Arc<Context>,
    finished: Arc<FinishedQueue>,
    running: usize,
    bytes: usize,
}

struct FinishedQueue {
    replies: Mutex<Vec<Finished>>,
    /// Readable while there are replies.
    event: OwnedFd,
}

/// Puts a reply into the queue, or, when dropped before there is one, the news that there will be none.
struct Promise {
    queue: Arc<FinishedQueue>,
    reply: Finished,
    /// `None` only while this is dropped.
    context: Option<Arc<Context>>,
}

impl Promise {
    async fn keep(mut self, request: Request, task: Task) {
        if let Some(context) = &self.context {
            self.reply = Some(run(context, request, task).await);
        }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        // First: who hears of the end may rely on it that nobody uses the device any more.
        self.context = None;
        self.queue.replies.lock().push(self.reply.take());
        // It can only fail by being full, and then the event is readable.
        let _ = rustix::io::write(&self.queue.event, &1u64.to_ne_bytes());
    }
}

/// What there is to do for the connection's thread.
pub(super) struct Ready {
    /// The client sent something, or is gone.
    pub(super) input: bool,
}

impl Slow {
    pub(super) fn new(runtime: Handle, context: Arc<Context>) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let finished = Arc::new(FinishedQueue { replies: Mutex::default(), event });
        Ok(Self { runtime, context, finished, running: 0, bytes: 0 })
    }

    /// How many requests run.
    pub(super) fn running(&self) -> usize {
        self.running
    }

    /// The payload bytes that they hold.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Starts a request.
    pub(super) fn start(&mut self, request: Request, task: Task) {
        self.running += 1;
        self.bytes += cost(&request) as usize;
        let (queue, context) = (self.finished.clone(), Some(self.context.clone()));
        self.runtime.spawn(Promise { queue, reply: None, context }.keep(request, task));
    }

    /// Waits until a request has finished or, if a stream is given, there is input.
    pub(super) fn wait(&self, stream: Option<&UnixStream>) -> io::Result<Ready> {
        let mut fds = vec![PollFd::new(&self.finished.event, PollFlags::IN)];
        fds.extend(stream.map(|s| PollFd::new(s, PollFlags::IN)));
        loop {
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(SystemError::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(Ready { input: fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) })
    }

    /// Moves the replies of finished requests to `replies`, without waiting. Fails if one was dropped.
    pub(super) fn collect(&mut self, replies: &mut Vec<Reply>) -> io::Result<()> {
        if self.finished.replies.lock().is_empty() {
            return Ok(());
        }
        // In this order: a reply that comes later makes the event readable again.
        let _ = rustix::io::read(&self.finished.event, &mut [0; 8]);
        let finished = std::mem::take(&mut *self.finished.replies.lock());
        self.running -= finished.len();
        let dropped = finished.iter().any(Option::is_none);
        for reply in finished.into_iter().flatten() {
            self.bytes -= reply.cost as usize;
            replies.push(reply);
        }
        if dropped { Err(io::Error::other("the runtime dropped a request")) } else { Ok(()) }
    }
}
