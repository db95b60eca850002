//! Control groups of VM processes: memory and processor limits, and the sure way to find what
//! an earlier, killed daemon left behind.
//!
//! Both hierarchies are served: cgroup v2 where its controllers are enabled, else v1's `memory`
//! and `cpu` mounts (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/ in the kernel tree).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::{Result, VmmError};

/// Limits of one VM's process.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Memory in bytes, guest RAM and the VMM's own together.
    pub memory_bytes: u64,
    /// Processor time, in thousandths of a core.
    pub cpu_millis: u32,
}

/// The daemon's own subtree, `{mount}/{name}` in each hierarchy used.
#[derive(Debug, Clone)]
pub struct CgroupRoot {
    dirs: Vec<PathBuf>,
    v2: bool,
}

/// One VM's group; removed when dropped (its processes are killed first).
#[derive(Debug)]
pub struct Cgroup {
    dirs: Vec<PathBuf>,
}

const CPU_PERIOD_US: u64 = 100_000;

impl CgroupRoot {
    /// Finds the hierarchies and makes the daemon's group in them.
    ///
    /// # Errors
    /// When neither v2 with `memory` and `cpu` nor v1's two mounts can be written.
    pub fn new(name: &str) -> Result<Self> {
        let mounts =
            fs::read_to_string("/proc/self/mounts").map_err(|e| VmmError::io("read /proc/self/mounts", e))?;
        let mut v1 = Vec::new();
        for line in mounts.lines() {
            let f: Vec<&str> = line.split(' ').collect();
            if f.len() < 4 {
                continue;
            }
            let (dir, kind) = (Path::new(f[1]), f[2]);
            let options: Vec<&str> = f[3].split(',').collect();
            if kind == "cgroup2" {
                let have = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
                let has = |c: &str| have.split_whitespace().any(|x| x == c);
                if has("memory") && has("cpu") {
                    // Delegation to children; already set on systemd hosts.
                    let _ = fs::write(dir.join("cgroup.subtree_control"), "+memory +cpu");
                    let root = dir.join(name);
                    make_dir(&root)?;
                    fs::write(root.join("cgroup.subtree_control"), "+memory +cpu")
                        .map_err(|e| VmmError::io(format!("enable controllers in {}", root.display()), e))?;
                    return Ok(Self { dirs: vec![root], v2: true });
                }
            } else if kind == "cgroup"
                && options.iter().any(|o| *o == "memory" || *o == "cpu")
                && !v1.iter().any(|d: &PathBuf| d.starts_with(dir))
            {
                v1.push(dir.join(name));
            }
        }
        if v1.is_empty() {
            return Err(VmmError::io(
                "find a cgroup hierarchy with memory and cpu controllers",
                io::Error::from(io::ErrorKind::NotFound),
            ));
        }
        for dir in &v1 {
            make_dir(dir)?;
        }
        Ok(Self { dirs: v1, v2: false })
    }

    /// Makes the group of one VM.
    pub fn create(&self, name: &str, limits: Limits) -> Result<Cgroup> {
        let group = Cgroup { dirs: self.dirs.iter().map(|d| d.join(name)).collect() };
        for dir in &group.dirs {
            make_dir(dir)?;
            let set = |file: &str, value: String| -> Result<()> {
                let path = dir.join(file);
                if !path.exists() {
                    return Ok(());
                }
                fs::write(&path, value).map_err(|e| VmmError::io(format!("set {}", path.display()), e))
            };
            let quota = u64::from(limits.cpu_millis) * CPU_PERIOD_US / 1000;
            if self.v2 {
                set("memory.max", limits.memory_bytes.to_string())?;
                set("cpu.max", format!("{quota} {CPU_PERIOD_US}"))?;
            } else {
                set("memory.limit_in_bytes", limits.memory_bytes.to_string())?;
                set("cpu.cfs_quota_us", quota.to_string())?;
            }
        }
        Ok(group)
    }

    /// Kills every process in groups below this one and removes them: what an earlier daemon
    /// that was killed has left. Returns how many groups there were.
    pub fn reclaim(&self) -> Result<usize> {
        let mut count = 0;
        for root in &self.dirs {
            let entries = match fs::read_dir(root) {
                Ok(e) => e,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(VmmError::io(format!("list {}", root.display()), e)),
            };
            for entry in entries.flatten().filter(|e| e.path().is_dir()) {
                remove_group(&entry.path());
                count += 1;
            }
        }
        Ok(count)
    }

    /// Removes the daemon's own group; it must be empty.
    pub fn remove(&self) {
        for dir in &self.dirs {
            let _ = fs::remove_dir(dir);
        }
    }
}

impl Cgroup {
    /// Files that a process writes `0` to in order to join, opened by path in the child.
    pub fn procs_files(&self) -> Vec<PathBuf> {
        self.dirs.iter().map(|d| d.join("cgroup.procs")).collect()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for dir in &self.dirs {
            remove_group(dir);
        }
    }
}

fn make_dir(dir: &Path) -> Result<()> {
    match fs::create_dir(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(VmmError::io(format!("make the cgroup {}", dir.display()), e)),
    }
}

/// Kills what is in the group and removes it. A killed process leaves its group only when it
/// has been torn down, so removal is tried again for a bounded time.
fn remove_group(dir: &Path) {
    for _ in 0..200 {
        if let Ok(pids) = fs::read_to_string(dir.join("cgroup.procs")) {
            for pid in pids.lines().filter_map(|l| l.parse::<i32>().ok()) {
                // SAFETY: kill has no memory effects.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
        }
        match fs::remove_dir(dir) {
            Ok(()) => return,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return,
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(5)),
        }
    }
    tracing::warn!(cgroup = %dir.display(), "cgroup could not be removed");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_holds_limits_and_is_removed_with_its_processes() {
        let root = CgroupRoot::new(&format!("nidus-test-{}", std::process::id())).unwrap();
        let group = root.create("vm", Limits { memory_bytes: 64 << 20, cpu_millis: 500 }).unwrap();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        for f in group.procs_files() {
            fs::write(f, child.id().to_string()).unwrap();
        }
        let dirs = group.dirs.clone();
        let limit = dirs.iter().find_map(|d| {
            fs::read_to_string(d.join("memory.limit_in_bytes"))
                .or_else(|_| fs::read_to_string(d.join("memory.max")))
                .ok()
        });
        assert_eq!(limit.unwrap().trim(), (64u64 << 20).to_string());
        // A killed daemon's view: the group is found and emptied by a new one.
        std::mem::forget(group);
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        assert!(root.reclaim().unwrap() >= 1);
        assert!(!reaper.join().unwrap().success());
        assert!(dirs.iter().all(|d| !d.exists()));
        root.remove();
    }
}
