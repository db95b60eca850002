//! A live snapshot: the memory of one instant is saved while the VM runs on.
//!
//! All present pages are write-protected at that instant. A page is read and handed on before its
//! protection is lifted: at once if the VM wants to write to it, otherwise when the sweep comes to
//! it. One thread reads, so that each page is read once; a second gives what was read to the sink.
//! None of the readers may do this: reading a page that is gone after all makes a fault that a
//! reader must answer.

use std::{collections::VecDeque, io, ops::Range, sync::Arc, thread};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use super::{bitmap::PageSet, error::SnapshotError, process::ProcessMemory, protect::Protected, vm::Vm};

/// What the sweep reads at once, in bytes, for small pages.
const CHUNK: usize = 256 << 10;
/// What may have been read and not yet been taken by the sink, in bytes. The sweep stops at half.
const MAX_QUEUED: usize = 64 << 20;

/// Takes the pages of a live snapshot.
pub trait PageSink: Send + 'static {
    /// Takes the content of one or more pages, each page once, in no particular order: `bytes` at
    /// `offset` of the memory file. May block; if it is slow, the VM's writes wait for it.
    fn save(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Which pages made up the memory at the instant of a live snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// Pages that the sink has got.
    pub pages: PageSet,
    /// Pages that are zero: the VM had given them up.
    pub zeroed: PageSet,
    // All others were never touched, and are what the source has.
}

/// A live snapshot under way. Dropping it ends it: the protection is lifted, the sink gets no more.
#[derive(Debug)]
pub struct LiveSnapshot {
    live: Arc<Live>,
    result: oneshot::Receiver<Result<Saved, SnapshotError>>,
}

impl LiveSnapshot {
    /// Waits until the sink has all pages.
    pub async fn finish(mut self) -> Result<Saved, SnapshotError> {
        (&mut self.result).await.unwrap_or(Err(SnapshotError::Ended))
    }
}

impl Drop for LiveSnapshot {
    fn drop(&mut self) {
        self.live.fail(SnapshotError::Cancelled);
    }
}

/// What the readers, the saver and the writer of a live snapshot share.
#[derive(Debug)]
pub(super) struct Live {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Protected pages that nobody has read yet.
    left: PageSet,
    /// Where the sweep goes on.
    next: usize,
    /// The pages that are being read.
    open: Range<usize>,
    /// Pages that the VM waits to write to.
    urgent: VecDeque<usize>,
    /// What was read, by offset, for the writer.
    queue: VecDeque<(u64, Vec<u8>)>,
    queued: usize,
    /// All has been read.
    complete: bool,
    failed: Option<SnapshotError>,
}

impl Live {
    fn new(left: PageSet) -> Self {
        let state = State {
            left,
            next: 0,
            open: 0..0,
            urgent: VecDeque::new(),
            queue: VecDeque::new(),
            queued: 0,
            complete: false,
            failed: None,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Whether a page that the VM wants to write to has yet to be saved. It will be, soon, and
    /// who waits for it woken.
    pub(super) fn wants(&self, page: usize) -> bool {
        let mut state = self.state.lock();
        if state.failed.is_some() || state.complete {
            return false;
        }
        if state.left.contains(page) {
            state.urgent.push_back(page);
            self.changed.notify_all();
            return true;
        }
        state.open.contains(&page)
    }

    /// The VM gives up pages, which are dropped any moment now.
    pub(super) fn removed(&self, pages: Range<usize>, page_bytes: u64) {
        let state = self.state.lock();
        let lost =
            state.left.next_run(pages.start, 1).map(|run| run.start).filter(|page| pages.contains(page));
        let open = pages.start.max(state.open.start)..pages.end.min(state.open.end);
        let lost = lost.or((!open.is_empty()).then_some(open.start));
        drop(state);
        if let Some(page) = lost {
            self.fail(SnapshotError::Removed { offset: page as u64 * page_bytes });
        }
    }

    pub(super) fn handler_ended(&self) {
        self.fail(SnapshotError::Ended);
    }

    /// Ends it, unless it has ended.
    fn fail(&self, error: SnapshotError) {
        self.state.lock().failed.get_or_insert(error);
        self.changed.notify_all();
    }
}

impl Vm {
    /// Protects the memory and starts to save it. Blocks as [`Vm::protect`] does.
    pub(super) fn begin_live_snapshot(
        self: &Arc<Self>,
        sink: Box<dyn PageSink>,
    ) -> Result<LiveSnapshot, SnapshotError> {
        let system = |action| move |source| SnapshotError::System { action, source };
        let process = self.process.as_ref().ok_or(SnapshotError::NoProcess)?;
        let memory = process.memory().map_err(system("open the VMM's memory"))?;
        let (live, protected) = self.protect(|protected| Arc::new(Live::new(protected.present.clone())))?;
        let (sender, result) = oneshot::channel();
        let (vm, shared) = (self.clone(), live.clone());
        let saver = move || {
            let result = vm.save_all(&shared, &memory, sink, protected);
            if result.is_err() {
                vm.lift_protection();
            }
            // Only now may another begin.
            *vm.live.lock() = None;
            // The owner may have lost interest.
            let _ = sender.send(result);
        };
        if let Err(source) = thread::Builder::new().name("uffd-save".into()).spawn(saver) {
            self.lift_protection();
            *self.live.lock() = None;
            return Err(SnapshotError::System { action: "start a thread", source });
        }
        Ok(LiveSnapshot { live, result })
    }

    fn save_all(
        &self,
        live: &Live,
        memory: &ProcessMemory,
        mut sink: Box<dyn PageSink>,
        protected: Protected,
    ) -> Result<Saved, SnapshotError> {
        thread::scope(|scope| {
            let writer = thread::Builder::new().name("uffd-sink".into());
            let writer = writer.spawn_scoped(scope, || live.write_to(&mut *sink));
            let writer =
                writer.map_err(|source| SnapshotError::System { action: "start a thread", source })?;
            if let Err(error) = self.read_all(live, memory) {
                live.fail(error);
            }
            // It does not panic unless the sink does.
            if writer.join().is_err() {
                live.fail(SnapshotError::Sink { offset: 0, source: io::Error::other("the sink panicked") });
            }
            Ok(())
        })?;
        // Left in place, lest another error follow.
        match live.state.lock().failed.replace(SnapshotError::Ended) {
            None => Ok(Saved { pages: protected.present, zeroed: protected.zeroed }),
            Some(error) => Err(error),
        }
    }

    /// Reads all pages, those first that the VM waits for, and lets it write to them again.
    fn read_all(&self, live: &Live, memory: &ProcessMemory) -> Result<(), SnapshotError> {
        while let Some((pages, urgent)) = live.claim(self) {
            let offset = self.offset(pages.start);
            let Some(address) = self.layout.address_of(pages.start) else { continue };
            let mut bytes = vec![0; pages.len() * self.page];
            memory.read(address, &mut bytes).map_err(|source| SnapshotError::Read { offset, source })?;
            let len = bytes.len() as u64;
            {
                // If the pages were given up before they were read, the event of that has been
                // read, and with the intake taken it has been noted.
                let _shared = self.intake.read();
                let mut state = live.state.lock();
                if state.failed.is_some() {
                    return Ok(());
                }
                state.open = 0..0;
                state.queued += bytes.len();
                state.queue.push_back((offset, bytes));
                live.changed.notify_all();
            }
            self.unprotect_now(address, len);
            let count = if urgent { &self.metrics.saved_on_write } else { &self.metrics.saved_by_sweep };
            count.add(pages.len() as u64);
        }
        Ok(())
    }
}

impl Live {
    /// Takes the next pages to read, and whether the VM waits for them. `None` at the end.
    fn claim(&self, vm: &Vm) -> Option<(Range<usize>, bool)> {
        let max = (CHUNK / vm.page).max(1);
        let mut state = self.state.lock();
        loop {
            if state.failed.is_some() {
                return None;
            }
            if state.queued < MAX_QUEUED {
                while let Some(page) = state.urgent.pop_front() {
                    if state.left.contains(page) {
                        return Some((state.open_pages(page..page + 1), true));
                    }
                }
            }
            if state.queued < MAX_QUEUED / 2 {
                let run = state.left.next_run(state.next, max).or_else(|| state.left.next_run(0, max));
                let Some(mut run) = run else {
                    state.complete = true;
                    self.changed.notify_all();
                    return None;
                };
                // Pages that follow each other in the file need not do so in the VMM.
                if let Some(region) = vm.layout.neighbours(run.start) {
                    run.end = run.end.min(region.end);
                }
                state.next = run.end;
                return Some((state.open_pages(run), false));
            }
            self.changed.wait(&mut state);
        }
    }

    /// Gives the sink what was read, until all has been.
    fn write_to(&self, sink: &mut dyn PageSink) {
        let mut state = self.state.lock();
        loop {
            if state.failed.is_some() {
                return;
            }
            if let Some((offset, bytes)) = state.queue.pop_front() {
                drop(state);
                let saved = sink.save(offset, &bytes);
                state = self.state.lock();
                state.queued -= bytes.len();
                self.changed.notify_all();
                if let Err(source) = saved {
                    state.failed.get_or_insert(SnapshotError::Sink { offset, source });
                }
            } else if state.complete {
                return;
            } else {
                self.changed.wait(&mut state);
            }
        }
    }
}

impl State {
    fn open_pages(&mut self, pages: Range<usize>) -> Range<usize> {
        self.left.remove_range(pages.clone());
        self.open = pages.clone();
        pages
    }
}
