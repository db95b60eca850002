//! What the threads and tasks of one VM share.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

use parking_lot::{Mutex, RwLock};
use rustix::fd::OwnedFd;
use tokio::{net::UnixStream, runtime, sync::watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    bitmap::AtomicPages,
    error::{End, HandlerError},
    fetch::Misses,
    handler::Config,
    layout::Layout,
    live::Live,
    metrics::Metrics,
    prefetch::Prefetcher,
    process::Process,
    recording::Recorder,
    source::{Content, Origin, PageSource},
    sys::Uffd,
};

/// How a handler ended.
pub(super) type Outcome = Result<End, Arc<HandlerError>>;

/// Why a reader stops.
#[derive(Debug)]
pub(super) enum Stop {
    /// The process is gone.
    Exited,
    /// It has closed its connection.
    Disconnected,
    Failed(HandlerError),
}

impl From<HandlerError> for Stop {
    fn from(error: HandlerError) -> Self {
        Self::Failed(error)
    }
}

pub(super) type Step = Result<(), Stop>;

/// A page that was fetched, on its way into the VM.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) page: usize,
    pub(super) write: bool,
    pub(super) content: Content,
    pub(super) origin: Origin,
    pub(super) wanted: Wanted,
}

/// What a page is for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Wanted {
    /// A fault whose event was read at this time.
    Fault(Instant),
    /// Nobody has asked for it yet.
    Prefetch,
}

/// Something that the kernel would not do now.
#[derive(Debug)]
pub(super) enum PutOff {
    Resolve { page: usize, write: bool, since: Instant },
    Place(Arrived),
    Unprotect { page: usize },
}

pub(super) struct Vm {
    pub(super) uffd: Uffd,
    pub(super) layout: Layout,
    /// The size of a page in bytes.
    pub(super) page: usize,
    pub(super) source: Arc<dyn PageSource>,
    pub(super) config: Config,
    pub(super) process: Option<Process>,
    /// Kept open; the VMM never sends on it again.
    pub(super) stream: UnixStream,

    /// Held shared to put pages in place, exclusively to read events and note what they say (see
    /// the module's documentation). Taken before any other lock.
    pub(super) intake: RwLock<()>,
    /// Pages that were put in place and not given up since.
    pub(super) present: AtomicPages,
    /// Pages that the VM gave up at some time: their content is zero, not the source's.
    pub(super) zeroed: AtomicPages,
    /// Pages that are being fetched for a fault.
    pub(super) fetching: AtomicPages,
    /// A huge page of zeros; without it, zero pages are left to the kernel.
    pub(super) zeros: Box<[u8]>,

    pub(super) misses: Misses,
    pub(super) arrived: Mutex<Vec<Arrived>>,
    pub(super) put_off: Mutex<Vec<PutOff>>,
    /// How many are in `put_off`, to be asked without the lock.
    pub(super) put_off_count: AtomicUsize,
    pub(super) prefetcher: Prefetcher,
    pub(super) recorder: Recorder,
    /// Held while a live snapshot begins.
    pub(super) protecting: Mutex<()>,
    pub(super) live: Mutex<Option<Arc<Live>>>,
    pub(super) metrics: Metrics,

    /// Rung when there is work other than events.
    pub(super) bell: OwnedFd,
    /// Made readable once, for all readers to stop.
    pub(super) halt: OwnedFd,
    pub(super) halted: AtomicBool,
    pub(super) runtime: runtime::Handle,
    pub(super) tasks: TaskTracker,
    pub(super) cancel: CancellationToken,
    pub(super) outcome: watch::Sender<Option<Outcome>>,
    /// The VMM, whose process is known, has closed its end of the stream.
    pub(super) disconnected: CancellationToken,
}

impl Vm {
    pub(super) fn offset(&self, page: usize) -> u64 {
        page as u64 * self.page as u64
    }

    /// Ends everything that serves this VM; the first reason given counts.
    pub(super) fn finish(&self, outcome: Outcome) {
        self.outcome.send_if_modified(|current| {
            let first = current.is_none();
            if first {
                *current = Some(outcome);
            }
            first
        });
        self.halted.store(true, Ordering::Release);
        ring(&self.halt);
        self.cancel.cancel();
        self.prefetcher.abandon();
        if let Some(live) = self.live.lock().clone() {
            live.handler_ended();
        }
    }

    pub(super) fn has_halted(&self) -> bool {
        self.halted.load(Ordering::Acquire)
    }

    /// Hands a fetched page to the readers.
    pub(super) fn deliver(&self, arrived: Arrived) {
        self.arrived.lock().push(arrived);
        ring(&self.bell);
    }

    /// Remembers what the kernel would not do now.
    pub(super) fn put_off(&self, what: PutOff) {
        self.metrics.put_off.add(1);
        let mut put_off = self.put_off.lock();
        put_off.push(what);
        self.put_off_count.store(put_off.len(), Ordering::Release);
    }

    pub(super) fn take_put_off(&self) -> Vec<PutOff> {
        let mut put_off = self.put_off.lock();
        self.put_off_count.store(0, Ordering::Release);
        std::mem::take(&mut *put_off)
    }
}

/// Makes an event descriptor readable.
pub(super) fn ring(event: &OwnedFd) {
    // It can only fail when its counter is full, and then it is readable.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}
