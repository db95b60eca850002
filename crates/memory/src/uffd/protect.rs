//! Write-protecting the VM's memory for a live snapshot, and what then happens.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::errno::Errno;

use super::{
    bitmap::PageSet,
    error::SnapshotError,
    live::Live,
    vm::{Step, Vm},
};

/// How long the VMM's mappings may keep changing before protecting them is given up.
const SETTLE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(1);

/// The pages of the instant at which the memory was protected.
pub(super) struct Protected {
    pub(super) present: PageSet,
    pub(super) zeroed: PageSet,
}

impl Vm {
    /// Protects all pages that are present and makes `live` the receiver of the faults on them.
    /// Blocks for some milliseconds per GiB; meanwhile the VM's faults wait.
    pub(super) fn protect(
        &self,
        begin: impl Fn(&Protected) -> Arc<Live>,
    ) -> Result<(Arc<Live>, Protected), SnapshotError> {
        let _one_at_a_time = self.protecting.lock();
        let started = Instant::now();
        let mut registered = false;
        loop {
            let attempt = {
                // Nothing is put in place meanwhile, so what is present is what is protected.
                let _exclusive = self.intake.write();
                let mut live = self.live.lock();
                if self.has_halted() {
                    return Err(SnapshotError::Ended);
                }
                if live.is_some() {
                    return Err(SnapshotError::Busy);
                }
                let attempt = self.protect_regions();
                if attempt.is_ok() {
                    let zeroed = self.zeroed.snapshot().without(&self.present.snapshot());
                    let protected = Protected { present: self.present.snapshot(), zeroed };
                    let begun = begin(&protected);
                    *live = Some(begun.clone());
                    return Ok((begun, protected));
                }
                attempt
            };
            let Err(errno) = attempt else { continue };
            self.lift_protection();
            match errno {
                // A remove event waits to be read: the readers must get their turn.
                Errno::EAGAIN if started.elapsed() < SETTLE => thread::sleep(PAUSE),
                Errno::EAGAIN => return Err(SnapshotError::Unsettled(SETTLE)),
                Errno::ESRCH => return Err(SnapshotError::Ended),
                // Firecracker registers for missing pages alone. The registration belongs to the
                // userfaultfd, which whoever holds it may extend.
                Errno::ENOENT if !registered => {
                    registered = true;
                    for region in self.layout.regions() {
                        self.uffd
                            .register_for_write_protect(region.base, region.size)
                            .map_err(SnapshotError::Unsupported)?;
                    }
                }
                errno => return Err(SnapshotError::Unsupported(errno)),
            }
        }
    }

    fn protect_regions(&self) -> Result<(), Errno> {
        let mut regions = self.layout.regions().iter();
        regions.try_for_each(|region| self.uffd.write_protect(region.base, region.size, true))
    }

    /// Lifts the protection of all regions, as far as that is possible.
    pub(super) fn lift_protection(&self) {
        for region in self.layout.regions() {
            self.unprotect_now(region.base, region.size);
        }
    }

    /// Lifts the protection of a range and wakes who waits to write there. Waits while the VMM
    /// changes its mappings; not for use by a reader. What else may fail means that nobody waits.
    pub(super) fn unprotect_now(&self, start: u64, len: u64) {
        while self.uffd.write_protect(start, len, false) == Err(Errno::EAGAIN) && !self.has_halted() {
            thread::sleep(PAUSE);
        }
    }

    /// A thread of the VM wants to write to a protected page.
    pub(super) fn fault_on_protected(&self, page: usize) -> Step {
        let _shared = self.intake.read();
        let live = self.live.lock().clone();
        if live.is_some_and(|live| live.wants(page)) {
            // It will be saved, then the thread is woken.
            return Ok(());
        }
        self.unprotect(page)
    }
}
