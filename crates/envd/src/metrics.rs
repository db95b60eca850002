//! `GET /metrics`: processor, memory and disk of the guest.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::Serialize;

use crate::reply::HttpError;

/// The answer, with E2B's names.
#[derive(Debug, Serialize)]
pub struct Metrics {
    ts: u64,
    cpu_count: usize,
    cpu_used_pct: f64,
    mem_total_mib: u64,
    mem_used_mib: u64,
    mem_total: u64,
    mem_used: u64,
    mem_cache: u64,
    disk_used: u64,
    disk_total: u64,
}

/// Processor time at the last look; the use is counted from one look to the next.
#[derive(Debug, Default)]
pub struct CpuClock(Mutex<CpuTimes>);

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct CpuTimes {
    busy: u64,
    total: u64,
}

/// Reads /proc and the root file system's figures.
pub fn read(clock: &CpuClock) -> Result<Metrics, HttpError> {
    let file = |path: &str| {
        fs::read_to_string(path).map_err(|e| HttpError::internal(format!("cannot read {path}: {e}")))
    };
    let stat = file("/proc/stat")?;
    let now = cpu_times(&stat);
    let before = std::mem::replace(&mut *clock.0.lock(), now);
    let memory = file("/proc/meminfo")?;
    let kib = |name: &str| meminfo(&memory, name) * 1024;
    let (total, cache) = (kib("MemTotal"), kib("Cached") + kib("SReclaimable"));
    let used = total.saturating_sub(kib("MemAvailable"));
    let disk = nix::sys::statvfs::statvfs("/")
        .map_err(|e| HttpError::internal(format!("cannot look at the root file system: {e}")))?;
    let block = disk.fragment_size();
    Ok(Metrics {
        ts: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        cpu_count: cpu_count(&stat),
        cpu_used_pct: percent(before, now),
        mem_total_mib: total >> 20,
        mem_used_mib: used >> 20,
        mem_total: total,
        mem_used: used,
        mem_cache: cache,
        disk_used: disk.blocks().saturating_sub(disk.blocks_available()) * block,
        disk_total: disk.blocks() * block,
    })
}

/// The first line of /proc/stat (proc_stat(5)): user, nice, system, idle, iowait, irq, softirq,
/// steal; guest time is part of user time.
fn cpu_times(stat: &str) -> CpuTimes {
    let line = stat.lines().next().unwrap_or_default();
    let times: Vec<u64> = line.split_whitespace().skip(1).take(8).filter_map(|t| t.parse().ok()).collect();
    let total: u64 = times.iter().sum();
    let idle: u64 = times.iter().skip(3).take(2).sum();
    CpuTimes { busy: total - idle, total }
}

fn cpu_count(stat: &str) -> usize {
    stat.lines().filter(|l| l.starts_with("cpu")).count().saturating_sub(1).max(1)
}

/// In percent of all processors, with two decimal places.
fn percent(before: CpuTimes, now: CpuTimes) -> f64 {
    let total = now.total.saturating_sub(before.total);
    if total == 0 {
        return 0.0;
    }
    let busy = now.busy.saturating_sub(before.busy).min(total);
    (busy as f64 / total as f64 * 10_000.0).round() / 100.0
}

fn meminfo(text: &str, name: &str) -> u64 {
    let line = text.lines().find(|l| l.split(':').next() == Some(name));
    line.and_then(|l| l.split_whitespace().nth(1)).and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "cpu  100 0 50 800 50 0 0 0 7 0\ncpu0 50 0 0 0\ncpu1 50 0 0 0\nintr 5";

    #[test]
    fn processor_use_is_counted_between_looks() {
        let first = cpu_times(STAT);
        assert_eq!(first, CpuTimes { busy: 150, total: 1000 });
        assert_eq!(cpu_count(STAT), 2);
        assert_eq!(percent(CpuTimes::default(), first), 15.0);
        assert_eq!(percent(first, CpuTimes { busy: 250, total: 1300 }), 33.33);
        assert_eq!(percent(first, first), 0.0);
    }

    #[test]
    fn memory_is_found_by_its_name() {
        let text = "MemTotal:  2048 kB\nSwapCached: 9 kB\nCached:  4 kB\n";
        assert_eq!((meminfo(text, "MemTotal"), meminfo(text, "Cached"), meminfo(text, "No")), (2048, 4, 0));
    }

    #[test]
    fn this_machine_has_metrics() {
        let metrics = read(&CpuClock::default()).unwrap();
        assert!(metrics.mem_total > metrics.mem_used && metrics.disk_total > 0 && metrics.cpu_count > 0);
    }
}
