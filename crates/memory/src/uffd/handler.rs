//! The handler of one VM's memory, as its owner sees it.

use std::{
    fmt,
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use rustix::event::{EventfdFlags, eventfd};
use tokio::{runtime, sync::watch, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    bitmap::{AtomicPages, PageSet},
    error::{End, HandlerError, SnapshotError, StartError},
    fetch::Misses,
    handshake::Handshake,
    live::{LiveSnapshot, PageSink},
    metrics::{Metrics, MetricsSnapshot},
    prefetch::{OtherMemory, Prefetch, Prefetcher},
    reader::Reader,
    recording::{Recorder, Recording},
    source::PageSource,
    vm::{Outcome, Vm},
};

/// How long threads and tasks may take to end.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// How a handler works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Threads that read and answer faults: 1 or more. A second one helps a VM whose processors
    /// fault at the same time.
    pub readers: usize,
    /// Fetches of missing pages under way at once.
    pub fetches: usize,
    /// The same for the prefetch.
    pub prefetch_fetches: usize,
    /// Small pages that are put in place together when one of them is touched and all are at hand:
    /// an aligned group of this many. 1 for the touched one alone.
    pub around: usize,
    /// How often a page is tried to be read.
    pub attempts: u32,
    /// How long one attempt may take.
    pub attempt_limit: Duration,
    /// The pause after the first failed attempt; it doubles, up to a second.
    pub first_pause: Duration,
    /// How long a fault may wait for its page before the handler gives up.
    pub fault_deadline: Duration,
    /// How long a reader looks for the next fault before it sleeps: faults come in bursts, and to wake a
    /// sleeping processor can take longer than to answer one.
    pub awake: Duration,
    /// Pages that are recorded, at most.
    pub recorded: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            readers: 1,
            fetches: 16,
            prefetch_fetches: 4,
            around: 1,
            attempts: 30,
            attempt_limit: Duration::from_secs(10),
            first_pause: Duration::from_millis(10),
            fault_deadline: Duration::from_secs(30),
            awake: Duration::from_micros(100),
            recorded: 1 << 16,
        }
    }
}

/// Which pages a VM has had, see [`Handler::touched`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Touched {
    /// Pages that were put in place, for a read, for a write or ahead of need, and that the VM has
    /// not given up since. They may differ from the source.
    pub present: PageSet,
    /// Pages that the VM gave up and has not touched again: they are zero.
    pub zeroed: PageSet,
}

/// Serves one VM's memory. See the [module](super) for what it promises, and what its drop means.
pub struct Handler {
    vm: Arc<Vm>,
    /// Ends when all readers have: each holds a sender.
    readers: watch::Receiver<()>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handler").field("process", &self.vm.process).finish_non_exhaustive()
    }
}

impl Handler {
    /// Starts to answer the faults of a VM. The source is read on the current Tokio runtime.
    pub fn start(
        handshake: Handshake,
        source: Arc<dyn PageSource>,
        config: Config,
    ) -> Result<Self, StartError> {
        let Handshake { layout, uffd, stream, process } = handshake;
        let (source_size, memory_size) = (source.size(), layout.memory_size());
        if source_size != memory_size {
            return Err(StartError::Size { source_size, memory_size });
        }
        let runtime = runtime::Handle::try_current().map_err(|_| StartError::NoRuntime)?;
        let system = |action| move |source: std::io::Error| StartError::System { action, source };
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let (bell, halt) = (event(), event());
        let pages = layout.pages();
        let page = layout.page_size().bytes() as usize;
        let vm = Arc::new(Vm {
            intake: RwLock::new(()),
            present: AtomicPages::new(pages),
            zeroed: AtomicPages::new(pages),
            fetching: AtomicPages::new(pages),
            zeros: vec![0; page].into(),
            misses: Misses::default(),
            arrived: Mutex::default(),
            put_off: Mutex::default(),
            put_off_count: 0.into(),
            prefetcher: Prefetcher::new(config.prefetch_fetches),
            recorder: Recorder::new(config.recorded),
            protecting: Mutex::new(()),
            live: Mutex::new(None),
            metrics: Metrics::default(),
            bell: bell.map_err(|error| system("make an event descriptor")(error.into()))?,
            halt: halt.map_err(|error| system("make an event descriptor")(error.into()))?,
            halted: AtomicBool::new(false),
            runtime,
            tasks: TaskTracker::new(),
            cancel: CancellationToken::new(),
            outcome: watch::Sender::new(None),
            disconnected: CancellationToken::new(),
            uffd,
            layout,
            page,
            source,
            config,
            process,
            stream,
        });
        let (sender, readers) = watch::channel(());
        let mut handler = Self { vm, readers, threads: Vec::new() };
        for number in 0..handler.vm.config.readers.max(1) {
            let reader =
                Reader::new(handler.vm.clone(), number == 0).map_err(system("watch the descriptors"))?;
            let sender = sender.clone();
            let thread = thread::Builder::new().name("uffd".into()).stack_size(256 << 10).spawn(move || {
                reader.run();
                drop(sender);
            });
            // What was started ends when `handler` is dropped.
            handler.threads.push(thread.map_err(system("start a thread"))?);
        }
        Ok(handler)
    }

    /// Waits until the VM's process is gone, the handler was stopped, or it can go on no further:
    /// then the VM must be killed. Can be called by several, and dropped at any time.
    pub async fn ended(&self) -> Outcome {
        let mut outcome = self.vm.outcome.subscribe();
        match outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Ok(End::Stopped)),
            // Cannot be: `self` holds the sender.
            Err(_) => Ok(End::Stopped),
        }
    }

    /// Why it can go on no further, if that is so.
    pub fn failure(&self) -> Option<Arc<HandlerError>> {
        self.vm.outcome.borrow().as_ref().and_then(|outcome| outcome.as_ref().err().cloned())
    }

    /// Cancelled when the VMM's end of the connection was closed while its process is known: some versions
    /// of Firecracker do that as soon as they have handed their memory over, others keep it for life.
    pub fn disconnected(&self) -> CancellationToken {
        self.vm.disconnected.clone()
    }

    /// Stops it and waits until its threads and tasks have ended; says how it ended. The VM must be
    /// gone: with nobody to answer them, its faults are answered with zeros.
    pub async fn stop(mut self) -> Outcome {
        self.vm.finish(Ok(End::Stopped));
        self.vm.tasks.close();
        let ended = timeout(STOP_LIMIT, async {
            // It fails when the last sender is gone, which is what is waited for.
            while self.readers.changed().await.is_ok() {}
            self.vm.tasks.wait().await;
        });
        if ended.await.is_err() {
            return Err(Arc::new(HandlerError::Stuck(STOP_LIMIT)));
        }
        for thread in self.threads.drain(..) {
            // They are past their last instructions; none of them panics.
            let _ = thread.join();
        }
        self.ended().await
    }

    /// What it has done so far.
    pub fn metrics(&self) -> MetricsSnapshot {
        self.vm.metrics.snapshot()
    }

    /// Which pages a pause must look at: those in `present` may differ from the source, those in
    /// `zeroed` are zero, and all others are exactly what the source has, because the VM never had
    /// them.
    ///
    /// It cannot tell which of the `present` pages were only read. Exact for the moment only if the
    /// VM is paused. Waits for what is being put in place just now.
    pub async fn touched(&self) -> Touched {
        loop {
            // Not a blocking lock: a VMM can make its holder wait.
            if let Some(_exclusive) = self.vm.intake.try_write() {
                let present = self.vm.present.snapshot();
                let zeroed = self.vm.zeroed.snapshot().without(&present);
                return Touched { present, zeroed };
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// In which order the VM has needed its pages so far. Those that a prefetch or a neighbour's
    /// fault brought are not among them: to go on with an older recording, put its pages first in
    /// [`Recording::new`].
    pub fn recording(&self) -> Recording {
        let layout = &self.vm.layout;
        Recording::new(layout.page_size(), layout.memory_size(), self.vm.recorder.pages())
    }

    /// Puts pages in place in recorded order whenever no fault waits. Takes the place of a prefetch
    /// that is under way.
    pub fn prefetch(&self, recording: &Recording) -> Result<Prefetch, OtherMemory> {
        let layout = &self.vm.layout;
        if recording.page_size() != layout.page_size() || recording.memory_size() != layout.memory_size() {
            return Err(OtherMemory);
        }
        let prefetch = self.vm.prefetcher.begin(recording.pages().iter().copied());
        if self.vm.has_halted() {
            self.vm.prefetcher.abandon();
        }
        super::vm::ring(&self.vm.bell);
        Ok(prefetch)
    }

    /// Begins to save the memory as it is now while the VM runs on: write-protects it, and from
    /// then on gives `sink` each page that the VM has had, as it was, before the VM can change it.
    ///
    /// For a consistent snapshot the VM must be paused during this call; when it has returned, the
    /// VM can go on. Extends the registration of the memory if it is for missing pages only.
    pub async fn live_snapshot(&self, sink: Box<dyn PageSink>) -> Result<LiveSnapshot, SnapshotError> {
        let vm = self.vm.clone();
        // If this future is dropped, so is the snapshot, which ends it.
        let begun = tokio::task::spawn_blocking(move || vm.begin_live_snapshot(sink)).await;
        begun.unwrap_or(Err(SnapshotError::Cancelled))
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.vm.finish(Ok(End::Stopped));
    }
}
