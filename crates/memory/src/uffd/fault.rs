//! Putting pages in place.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use nix::errno::Errno;

use super::{
    error::HandlerError,
    metrics::Counter,
    recording::Recorded,
    source::{Cached, Content, Origin},
    sys::Fill,
    vm::{Arrived, PutOff, Step, Stop, Vm, Wanted},
};
use crate::PageSize;

/// How many faults may turn out to be on addresses that are gone. A VMM that has torn its mappings in
/// such a way that it faults on them again and again would keep a reader busy for ever.
const MAX_GONE: u64 = 4096;

/// Whence the bytes of an answer came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    Cache,
    Storage,
    Zero,
}

/// A page to be put in place.
#[derive(Debug, Clone, Copy)]
struct Target {
    page: usize,
    address: u64,
    /// The VM wants to write to it.
    write: bool,
    wanted: Wanted,
}

/// How putting a page in place ended.
enum Placed {
    /// It is there, or there is no place for it any more.
    Settled,
    /// The kernel would not do it now.
    Later,
}

impl Vm {
    /// Answers a fault, or brings a page ahead of it. `buffer` is for the source's use.
    pub(super) fn resolve(
        self: &Arc<Self>,
        page: usize,
        write: bool,
        wanted: Wanted,
        buffer: &mut [u8],
    ) -> Step {
        let Some(address) = self.layout.address_of(page) else { return Ok(()) };
        let target = Target { page, address, write, wanted };
        if matches!(wanted, Wanted::Prefetch) && self.present.contains(page) {
            self.metrics.prefetch_skipped.add(1);
            return Ok(());
        }
        let copying = self.intake.read();
        let placed = if self.zeroed.contains(page) {
            self.settle(target, From::Zero, self.fill_zero(target))?
        } else {
            if self.config.around > 1
                && matches!(wanted, Wanted::Fault(_))
                && self.copy_around(target, buffer)?
            {
                return Ok(());
            }
            let fill = match self.source.cached(self.offset(page), self.page, &mut buffer[..self.page]) {
                Cached::Zero => Some((From::Zero, self.fill_zero(target))),
                Cached::Bytes(bytes) if bytes.len() == self.page => {
                    Some((From::Cache, self.uffd.copy(address, bytes)))
                }
                Cached::Bytes(_) | Cached::Miss => None,
            };
            match fill {
                Some((from, fill)) => self.settle(target, from, fill)?,
                None => {
                    drop(copying);
                    match wanted {
                        Wanted::Fault(since) => self.missed(page, write, since),
                        Wanted::Prefetch => self.prefetch_missed(Recorded { page: page as u32, write }),
                    }
                    return Ok(());
                }
            }
        };
        drop(copying);
        match (placed, wanted) {
            (Placed::Later, Wanted::Fault(since)) => self.put_off(PutOff::Resolve { page, write, since }),
            (Placed::Later, Wanted::Prefetch) => self.metrics.prefetch_skipped.add(1),
            (Placed::Settled, _) => {}
        }
        Ok(())
    }

    /// Puts a fetched page in place.
    pub(super) fn place(self: &Arc<Self>, arrived: Arrived) -> Step {
        let Arrived { page, write, ref content, origin, wanted } = arrived;
        let Some(address) = self.layout.address_of(page) else { return Ok(()) };
        let target = Target { page, address, write, wanted };
        // Before the page is there, so that a fault that finds it missing again is not left alone.
        if matches!(wanted, Wanted::Fault(_)) {
            self.fetching.remove(page);
        }
        let copying = self.intake.read();
        let placed = match content {
            Content::Bytes(bytes) if !self.zeroed.contains(page) => {
                let from = if origin == Origin::Storage { From::Storage } else { From::Cache };
                self.settle(target, from, self.uffd.copy(address, bytes))?
            }
            _ => self.settle(target, From::Zero, self.fill_zero(target))?,
        };
        drop(copying);
        match (placed, wanted) {
            (Placed::Later, Wanted::Fault(_)) => {
                self.put_off(PutOff::Place(arrived));
                return Ok(());
            }
            (Placed::Later, Wanted::Prefetch) => self.metrics.prefetch_skipped.add(1),
            (Placed::Settled, _) => {}
        }
        match wanted {
            Wanted::Fault(_) => self.fetch_used(),
            Wanted::Prefetch => self.prefetcher.fetch_ended(),
        }
        Ok(())
    }

    /// Lets the VM write to a page again.
    pub(super) fn unprotect(&self, page: usize) -> Step {
        let Some(address) = self.layout.address_of(page) else { return Ok(()) };
        match self.uffd.write_protect(address, self.page as u64, false) {
            Ok(()) => Ok(()),
            Err(Errno::EAGAIN) => {
                self.put_off(PutOff::Unprotect { page });
                Ok(())
            }
            Err(Errno::ENOENT) if self.metrics.faults_gone.get() < MAX_GONE => {
                // Not registered for that any more.
                self.metrics.faults_gone.add(1);
                let _ = self.uffd.wake(address, self.page as u64);
                Ok(())
            }
            Err(Errno::ESRCH) => Err(Stop::Exited),
            Err(source) => Err(HandlerError::Fill { offset: self.offset(page), source }.into()),
        }
    }

    /// A page of zeros. The kernel has one that costs no memory; but a page that is to be written
    /// would fault again on that one, and huge pages do not have it.
    fn fill_zero(&self, target: Target) -> Fill {
        if self.layout.page_size() == PageSize::Small && !target.write {
            return self.uffd.zero(target.address, self.page as u64);
        }
        self.uffd.copy(target.address, &self.zeros)
    }

    /// Copies the page together with its neighbours, as far as they are absent and all at hand;
    /// whether it did.
    fn copy_around(&self, target: Target, buffer: &mut [u8]) -> Result<bool, Stop> {
        let window = self.config.around.min(buffer.len() / self.page);
        let first = target.page / window * window;
        let Some(region) = self.layout.neighbours(target.page) else { return Ok(false) };
        let absent = |page: &usize| !self.present.contains(*page) && !self.zeroed.contains(*page);
        let before = (first.max(region.start)..target.page).rev().take_while(absent).count();
        let after = (target.page + 1..(first + window).min(region.end)).take_while(absent).count();
        if before + after == 0 || !absent(&target.page) {
            return Ok(false);
        }
        let start = target.page - before;
        let len = (before + 1 + after) * self.page;
        let address = target.address - (before * self.page) as u64;
        let fill = match self.source.cached(self.offset(start), len, &mut buffer[..len]) {
            Cached::Bytes(bytes) if bytes.len() == len => self.uffd.copy(address, bytes),
            _ => return Ok(false),
        };
        if fill.stop == Some(Errno::ESRCH) {
            return Err(Stop::Exited);
        }
        let pages = start..start + fill.done as usize / self.page;
        self.present.insert_range(pages.clone());
        self.metrics.bytes_copied.add(fill.done);
        // Whatever stopped it before this page will show again when it is copied alone.
        let covered = pages.contains(&target.page);
        self.metrics.around.add(pages.len() as u64 - u64::from(covered));
        if covered {
            self.count(target, From::Cache);
        }
        Ok(covered)
    }

    fn settle(&self, target: Target, from: From, fill: Fill) -> Result<Placed, Stop> {
        let Target { page, address, wanted, .. } = target;
        let len = self.page as u64;
        match fill.stop {
            None => {
                self.present.insert(page);
                if from != From::Zero {
                    self.metrics.bytes_copied.add(len);
                }
                self.count(target, from);
            }
            Some(Errno::EEXIST) => {
                self.present.insert(page);
                match wanted {
                    Wanted::Fault(_) => self.metrics.faults_repeated.add(1),
                    Wanted::Prefetch => self.metrics.prefetch_skipped.add(1),
                }
                // Who brought it has woken those that waited then.
                let _ = self.uffd.wake(address, len);
            }
            Some(Errno::EAGAIN) => return Ok(Placed::Later),
            Some(Errno::ENOENT) if self.metrics.faults_gone.get() < MAX_GONE => {
                self.metrics.faults_gone.add(1);
                let _ = self.uffd.wake(address, len);
            }
            Some(Errno::ESRCH) => return Err(Stop::Exited),
            Some(source @ (Errno::ENOMEM | Errno::ENOSPC)) => match wanted {
                Wanted::Fault(since) if since.elapsed() > self.config.fault_deadline => {
                    return Err(HandlerError::Fill { offset: self.offset(page), source }.into());
                }
                _ => return Ok(Placed::Later),
            },
            Some(source) => return Err(HandlerError::Fill { offset: self.offset(page), source }.into()),
        }
        Ok(Placed::Settled)
    }

    fn count(&self, target: Target, from: From) {
        let Wanted::Fault(since) = target.wanted else {
            self.metrics.prefetched.add(1);
            return;
        };
        let metrics = &self.metrics;
        let (faults, latency): (&Counter, &Counter) = match from {
            From::Cache => (&metrics.faults_cache, &metrics.latency_cache_ns),
            From::Storage => (&metrics.faults_storage, &metrics.latency_storage_ns),
            From::Zero => (&metrics.faults_zero, &metrics.latency_zero_ns),
        };
        self.recorder.note(target.page, target.write);
        latency.add_time(Instant::now().saturating_duration_since(since));
        faults.add(1);
    }
}

/// How long to wait before trying again what the kernel would not do `times` times in a row.
pub(super) fn pause_after(times: u32) -> Duration {
    Duration::from_millis(1 << times.min(5))
}
