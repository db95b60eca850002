//! A thread that reads what happens to a VM's memory and answers it.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::AsFd,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use rustix::{
    event::{Timespec, epoll},
    fd::OwnedFd,
};

use super::{
    error::{End, HandlerError, Violation},
    fault::pause_after,
    sys::{EVENT_LEN, Event},
    vm::{PutOff, Step, Stop, Vm, Wanted},
};

/// Events that are read at once. While they are read and noted, no page is put in place.
const BATCH: usize = 16;
/// Pages, of 4 KiB, that are prefetched between two looks at the events.
const SLICE: usize = 4;

/// What an epoll event is about.
mod token {
    pub(super) const MEMORY: u64 = 0;
    pub(super) const BELL: u64 = 1;
    pub(super) const HALT: u64 = 2;
    pub(super) const PROCESS: u64 = 3;
    pub(super) const STREAM: u64 = 4;
}

pub(super) struct Reader {
    vm: Arc<Vm>,
    epoll: OwnedFd,
    events: Box<[u8]>,
    /// For the source: a page, or as many as are copied around a fault.
    buffer: Box<[u8]>,
    /// How often in a row something was put off.
    put_off: u32,
    /// Until then it looks for events again and again instead of sleeping.
    awake_until: Option<Instant>,
}

/// What `wait` found.
#[derive(Default)]
struct Ready {
    memory: bool,
    bell: bool,
}

impl Reader {
    /// The first reader also watches the process.
    pub(super) fn new(vm: Arc<Vm>, first: bool) -> io::Result<Self> {
        use epoll::{CreateFlags, EventData, EventFlags, add};
        // EPOLLEXCLUSIVE: a fault wakes one reader, not all.
        let exclusive = EventFlags::from_bits_retain(1 << 28);
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        add(&epoll, vm.uffd.as_fd(), EventData::new_u64(token::MEMORY), EventFlags::IN | exclusive)?;
        add(&epoll, &vm.bell, EventData::new_u64(token::BELL), EventFlags::IN)?;
        add(&epoll, &vm.halt, EventData::new_u64(token::HALT), EventFlags::IN)?;
        if first {
            if let Some(process) = &vm.process {
                add(&epoll, process.as_fd(), EventData::new_u64(token::PROCESS), EventFlags::IN)?;
            }
            // Once: some versions of Firecracker close it at once, others at their end.
            let closed = EventFlags::RDHUP | EventFlags::ONESHOT;
            add(&epoll, vm.stream.as_fd(), EventData::new_u64(token::STREAM), closed)?;
        }
        let around = vm.config.around.max(1) * crate::PageSize::Small.bytes() as usize;
        let buffer = vec![0; around.max(vm.page)].into();
        Ok(Self {
            vm,
            epoll,
            events: vec![0; BATCH * EVENT_LEN].into(),
            buffer,
            put_off: 0,
            awake_until: None,
        })
    }

    /// Serves the VM until it ends.
    pub(super) fn run(mut self) {
        let stop = loop {
            if let Err(stop) = self.turn() {
                break stop;
            }
            if self.vm.has_halted() {
                return;
            }
        };
        self.vm.finish(match stop {
            Stop::Exited => Ok(End::Exited),
            Stop::Disconnected => Ok(End::Disconnected),
            Stop::Failed(error) => Err(Arc::new(error)),
        });
    }

    fn turn(&mut self) -> Step {
        let limit = if self.vm.prefetcher.is_ready() {
            Some(Duration::ZERO)
        } else if self.vm.put_off_count.load(Ordering::Acquire) > 0 {
            Some(pause_after(self.put_off))
        } else if self.awake_until.is_some_and(|until| Instant::now() < until) {
            // Whoever faulted may be waiting for this very processor.
            std::thread::yield_now();
            Some(Duration::ZERO)
        } else {
            None
        };
        let ready = self.wait(limit)?;
        if ready.memory {
            self.serve_events()?;
            self.awake_until = Instant::now().checked_add(self.vm.config.awake);
        }
        if ready.bell {
            self.drain_bell();
            self.place_arrived()?;
        }
        if self.vm.put_off_count.load(Ordering::Acquire) > 0 {
            self.try_again()?;
        } else {
            self.put_off = 0;
        }
        if !ready.memory && self.vm.prefetcher.is_ready() {
            self.prefetch()?;
        }
        Ok(())
    }

    fn wait(&self, limit: Option<Duration>) -> Result<Ready, Stop> {
        let limit = limit.map(|limit| Timespec { tv_sec: 0, tv_nsec: i64::from(limit.subsec_nanos()) });
        let mut events = [MaybeUninit::uninit(); 8];
        let events = match epoll::wait(&self.epoll, &mut events, limit.as_ref()) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            Err(error) => {
                return Err(HandlerError::Events { action: "wait for", source: error.into() }.into());
            }
        };
        let mut ready = Ready::default();
        for event in events {
            let flags = event.flags;
            match event.data.u64() {
                // That is how the kernel reports a userfaultfd without O_NONBLOCK.
                token::MEMORY if flags.contains(epoll::EventFlags::ERR) => {
                    return Err(HandlerError::Protocol(Violation::Blocking).into());
                }
                token::MEMORY => ready.memory = true,
                token::BELL => ready.bell = true,
                token::PROCESS => return Err(Stop::Exited),
                token::STREAM if self.vm.process.is_none() => return Err(Stop::Disconnected),
                token::STREAM => self.vm.disconnected.cancel(),
                // The halt: the caller looks.
                _ => {}
            }
        }
        Ok(ready)
    }

    /// Reads what has happened, notes what was given up, and then answers the faults.
    fn serve_events(&mut self) -> Step {
        let vm = &self.vm;
        let mut faults = [(0u64, false, false); BATCH];
        let mut count = 0;
        {
            let _nothing_is_copied = vm.intake.write();
            let events = vm
                .uffd
                .read(&mut self.events)
                .map_err(|source| HandlerError::Events { action: "read", source })?;
            for event in events {
                match event {
                    Event::Fault { address, write, protected } => {
                        faults[count] = (address, write, protected);
                        count += 1;
                    }
                    Event::Remove { start, end } => {
                        vm.metrics.removes.add(1);
                        vm.note_removed(start..end);
                    }
                    Event::Unmap { start, end } => vm.note_removed(start..end),
                    Event::Remap { from, to } => return Err(violation(Violation::Remap { from, to })),
                    Event::Fork => return Err(violation(Violation::Fork)),
                    Event::Unknown(kind) => return Err(violation(Violation::Unknown(kind))),
                }
            }
        }
        let since = Instant::now();
        for &(address, write, protected) in &faults[..count] {
            let page = self.vm.layout.page_at(address).ok_or(violation(Violation::Stray { address }))?;
            if protected {
                self.vm.metrics.faults_protected.add(1);
                self.vm.fault_on_protected(page)?;
            } else {
                self.vm.resolve(page, write, Wanted::Fault(since), &mut self.buffer)?;
            }
        }
        Ok(())
    }

    fn drain_bell(&self) {
        // Nothing to read means that another reader did.
        let _ = rustix::io::read(&self.vm.bell, &mut [0; 8]);
    }

    fn place_arrived(&self) -> Step {
        let arrived = std::mem::take(&mut *self.vm.arrived.lock());
        arrived.into_iter().try_for_each(|arrived| self.vm.place(arrived))
    }

    fn try_again(&mut self) -> Step {
        self.put_off = self.put_off.saturating_add(1);
        for put_off in self.vm.take_put_off() {
            match put_off {
                PutOff::Resolve { page, write, since } => {
                    self.vm.resolve(page, write, Wanted::Fault(since), &mut self.buffer)?;
                }
                PutOff::Place(arrived) => self.vm.place(arrived)?,
                PutOff::Unprotect { page } => self.vm.unprotect(page)?,
            }
        }
        Ok(())
    }

    fn prefetch(&mut self) -> Step {
        let slice = if self.vm.page > 4096 { 1 } else { SLICE };
        for _ in 0..slice {
            let Some(recorded) = self.vm.prefetcher.take() else { break };
            let step =
                self.vm.resolve(recorded.page as usize, recorded.write, Wanted::Prefetch, &mut self.buffer);
            self.vm.prefetcher.done();
            step?;
        }
        Ok(())
    }
}

fn violation(violation: Violation) -> Stop {
    Stop::Failed(HandlerError::Protocol(violation))
}

impl Vm {
    /// Notes that the VM gave up these addresses. Called with the intake held exclusively, before
    /// anything else is put in place.
    fn note_removed(&self, addresses: std::ops::Range<u64>) {
        if addresses.start >= addresses.end {
            return;
        }
        let live = self.live.lock().clone();
        for pages in self.layout.pages_within(addresses) {
            self.metrics.removed_pages.add(pages.len() as u64);
            self.zeroed.insert_range(pages.clone());
            self.present.remove_range(pages.clone());
            if let Some(live) = &live {
                live.removed(pages, self.page as u64);
            }
        }
    }
}
