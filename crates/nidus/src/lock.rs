//! One daemon to a data directory, and one to a range of network slots.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};

/// Slots of one daemon.
pub const SLOTS_PER_DAEMON: u32 = 4096;
/// Daemons on one host: as many ranges as there are indices (network slots, contract).
const RANGES: u32 = 7;

/// How long the lock of a process that is gone may still be held: by a child that it was just forking.
const GOING: Duration = Duration::from_secs(5);
/// Between two tries.
const LOOK: Duration = Duration::from_millis(10);

/// The data directory's lock, held by the open file.
#[derive(Debug)]
pub struct DataLock {
    _file: File,
}

impl DataLock {
    /// Takes the lock, or says who has it.
    pub fn take(data_dir: &Path) -> anyhow::Result<Self> {
        let path = data_dir.join("nidus.lock");
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("Cannot open the lock file {}", path.display()))?;
        let end = Instant::now() + GOING;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(e)) => {
                    return Err(e).with_context(|| format!("Cannot lock {}", path.display()));
                }
            }
            let mut pid = String::new();
            let _ = file.rewind().and_then(|()| file.read_to_string(&mut pid));
            let pid = pid.trim();
            if Path::new("/proc").join(pid).exists() || Instant::now() >= end {
                bail!("{} is already served by another nidus (process {pid})", data_dir.display());
            }
            std::thread::sleep(LOOK);
        }
        let write = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()));
        write.with_context(|| format!("Cannot write {}", path.display()))?;
        Ok(Self { _file: file })
    }
}

/// A range of slots. Its lock is a socket with an abstract name: the kernel frees it with the
/// process, and no file stays.
#[derive(Debug)]
pub struct SlotRange {
    /// Number of the range.
    pub number: u32,
    _socket: OwnedFd,
}

impl SlotRange {
    /// The range's first index.
    pub fn first_index(&self) -> u32 {
        1 + self.number * SLOTS_PER_DAEMON
    }

    /// A name that no other daemon on this host has now.
    pub fn name(&self, separator: char) -> String {
        if self.number == 0 { "nidus".to_owned() } else { format!("nidus{separator}{}", self.number) }
    }

    /// All ranges that no daemon has, lowest first. What lies in them was left behind.
    pub fn take_free() -> anyhow::Result<Vec<Self>> {
        let mut free = Vec::new();
        for number in 0..RANGES {
            let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
                .context("Cannot open a socket")?;
            let address = UnixAddr::new_abstract(format!("nidus-slots-{number}").as_bytes())?;
            match bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &address) {
                Ok(()) => free.push(Self { number, _socket: socket }),
                Err(nix::Error::EADDRINUSE) => {}
                Err(e) => return Err(anyhow!("Cannot lock a range of network slots: {e}")),
            }
        }
        if free.is_empty() {
            bail!(
                "{RANGES} other nidus daemons run on this host, as many as there are ranges of network slots"
            );
        }
        Ok(free)
    }
}

/// Removes a directory at the end, with what is in it.
#[derive(Debug)]
pub struct RunDir(pub PathBuf);

impl Drop for RunDir {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(&self.0).into_iter().flatten().flatten() {
            let path = entry.path();
            let gone =
                if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            if let Err(e) = gone {
                tracing::warn!("{} could not be removed: {e}", path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_names_the_first_process() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataLock::take(dir.path()).unwrap();
        let e = DataLock::take(dir.path()).unwrap_err().to_string();
        assert!(e.contains(&std::process::id().to_string()) && e.contains("already served"), "{e}");
        drop(first);
        DataLock::take(dir.path()).unwrap();
    }

    #[test]
    fn a_process_that_is_gone_is_waited_for_until_its_last_child_is() {
        let dir = tempfile::tempdir().unwrap();
        let mut gone = std::process::Command::new("true").spawn().unwrap();
        gone.wait().unwrap();
        let lock = File::create(dir.path().join("nidus.lock")).unwrap();
        lock.try_lock().unwrap();
        (&lock).write_all(format!("{}\n", gone.id()).as_bytes()).unwrap();
        // It has the lock for as long as it lives.
        let mut child = std::process::Command::new("sleep").arg("0.3").stdout(lock).spawn().unwrap();
        DataLock::take(dir.path()).unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn ranges_are_taken_once() {
        let first = SlotRange::take_free().unwrap();
        let taken: Vec<u32> = first.iter().map(|r| r.number).collect();
        // Other daemons may hold some, and this test all the rest.
        let second = SlotRange::take_free();
        assert!(second.is_err() || second.unwrap().iter().all(|r| !taken.contains(&r.number)));
    }
}
