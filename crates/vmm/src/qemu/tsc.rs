//! Frequency of the time-stamp counter that an emulated guest sees.
//!
//! Under software emulation the guest's counter is the host's. The guest's kernel would measure it
//! against the emulated PIT, and on a busy host that measurement fails: the kernel then has no usable
//! clock and hangs in its first steps, without a word. So it is measured here, where a disturbed
//! sample can be told from a good one, and given on the kernel's command line (`tsc_early_khz`,
//! kernel-parameters.txt).

use std::arch::x86_64::_rdtsc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Between the two samples. The error of a sample is below a microsecond: 20 ppm of this.
const SPAN: Duration = Duration::from_millis(50);
/// Tries for each sample, of which the least disturbed one counts.
const TRIES: usize = 50;

/// A reading of the counter and the time in nanoseconds at the middle of it.
fn sample() -> Option<(u64, i64)> {
    let one = || {
        // SAFETY: every x86-64 processor has the instruction, and user space may use it unless
        // prctl(PR_SET_TSC) forbade it, which nobody does here.
        let before = unsafe { _rdtsc() };
        let time = clock_gettime(ClockId::CLOCK_MONOTONIC_RAW).ok()?;
        // SAFETY: as above.
        let after = unsafe { _rdtsc() };
        let nanoseconds = time.tv_sec() * 1_000_000_000 + time.tv_nsec();
        Some((after.wrapping_sub(before), before.wrapping_add(after.wrapping_sub(before) / 2), nanoseconds))
    };
    let best = (0..TRIES).filter_map(|_| one()).min_by_key(|(width, ..)| *width)?;
    Some((best.1, best.2))
}

/// The host's frequency in kHz; nothing if it cannot be a real one. Blocks for 50 ms.
pub fn khz() -> Option<u64> {
    let (counter, time) = sample()?;
    std::thread::sleep(SPAN);
    let (counter_end, time_end) = sample()?;
    let elapsed = u128::try_from(time_end - time).ok().filter(|ns| *ns > 0)?;
    let ticks = u128::from(counter_end.checked_sub(counter)?);
    let khz = u64::try_from(ticks * 1_000_000 / elapsed).ok()?;
    // 100 MHz to 20 GHz.
    (100_000..20_000_000).contains(&khz).then_some(khz)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let (a, b) = (khz().unwrap(), khz().unwrap());
        assert!(a.abs_diff(b) * 1000 < a, "{a} and {b} kHz differ by more than a thousandth");
    }
}
