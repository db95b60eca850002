//! The machine's own state: clock, entropy, host name, /etc. Only here does envd change them.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, Utc};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

/// The guest's clock stands still while it is saved. Behind by more than this, it is set.
const MAX_BEHIND: Duration = Duration::from_millis(50);

/// The host's time is older by the request's way; only a clock far ahead is set back.
const MAX_AHEAD: Duration = Duration::from_secs(5);

/// Most random bytes that one `/init` may bring.
const MAX_ENTROPY: usize = 4096;

/// Name that hyperloop, the host's service, has in the guest.
const EVENTS_HOST: &str = "events.e2b.local";

const IDENTITY: &str = "/run/e2b";
const HOSTS: &str = "/etc/hosts";
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A change that the kernel or the file system refused.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    #[error("cannot set the clock: {0}")]
    Clock(nix::Error),
    #[error("cannot add entropy to the kernel: {0}")]
    Entropy(io::Error),
    #[error("the entropy must be 1 to {MAX_ENTROPY} bytes, not {0}")]
    EntropySize(usize),
    #[error("cannot set the host name: {0}")]
    Hostname(nix::Error),
    #[error("cannot change {path}: {source}")]
    File { path: &'static str, source: io::Error },
    #[error("'{0}' is not an IP address")]
    Address(String),
}

/// Access to the machine, or to none of it.
#[derive(Debug)]
pub struct System {
    enabled: bool,
    /// Held open: `/init` shall not look for it.
    random: Option<File>,
}

impl System {
    /// With `enabled` unset, every change is left out and succeeds.
    pub fn new(enabled: bool) -> Self {
        let random = enabled
            .then(|| OpenOptions::new().read(true).write(true).open("/dev/urandom"))
            .and_then(Result::ok);
        Self { enabled, random }
    }

    /// Whether changes are made.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Sets the clock when it is off; see [`MAX_BEHIND`] and [`MAX_AHEAD`].
    pub fn set_clock(&self, host: DateTime<Utc>) -> Result<(), SystemError> {
        if !self.enabled || !is_off(Utc::now(), host) {
            return Ok(());
        }
        let time = TimeSpec::new(host.timestamp(), i64::from(host.timestamp_subsec_nanos()));
        clock_settime(ClockId::CLOCK_REALTIME, time).map_err(SystemError::Clock)
    }

    /// Mixes fresh random bytes into the kernel's generator and makes it use them at once, so
    /// that clones of one snapshot part ways before anything is read from it (random(4)).
    pub fn add_entropy(&self, bytes: &[u8]) -> Result<(), SystemError> {
        if bytes.is_empty() || bytes.len() > MAX_ENTROPY {
            return Err(SystemError::EntropySize(bytes.len()));
        }
        if !self.enabled {
            return Ok(());
        }
        let Some(random) = &self.random else {
            return Err(SystemError::Entropy(io::Error::other("/dev/urandom cannot be opened")));
        };
        // struct rand_pool_info: bits that count as entropy, size in bytes, the bytes.
        let mut info = Vec::with_capacity(8 + bytes.len());
        info.extend_from_slice(&(bytes.len() as i32 * 8).to_ne_bytes());
        info.extend_from_slice(&(bytes.len() as i32).to_ne_bytes());
        info.extend_from_slice(bytes);
        let fd = random.as_raw_fd();
        // SAFETY: fd is open, and info is a rand_pool_info of the size that it states.
        unsafe { add_entropy(fd, info.as_ptr().cast()) }
            .and_then(|_| {
                // SAFETY: fd is open, and RNDRESEEDCRNG takes no argument.
                unsafe { reseed(fd) }
            })
            .map(drop)
            .map_err(|e| SystemError::Entropy(e.into()))
    }

    /// Sets the kernel's host name.
    pub fn set_hostname(&self, name: &str) -> Result<(), SystemError> {
        if !self.enabled {
            return Ok(());
        }
        nix::unistd::sethostname(name).map_err(SystemError::Hostname)
    }

    /// Lets `events.e2b.local` mean this address.
    pub fn set_events_host(&self, address: &str) -> Result<(), SystemError> {
        let address: IpAddr = address.parse().map_err(|_| SystemError::Address(address.to_owned()))?;
        if !self.enabled {
            return Ok(());
        }
        let wrap = |source| SystemError::File { path: HOSTS, source };
        let old = match fs::read_to_string(HOSTS) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            read => read.map_err(wrap)?,
        };
        let new = with_host(&old, address);
        if new == old { Ok(()) } else { fs::write(HOSTS, new).map_err(wrap) }
    }

    /// Writes who this sandbox is where programs look that have no variable for it, as E2B's envd does:
    /// `/run/e2b/.E2B_SANDBOX`, `.E2B_SANDBOX_ID` and `.E2B_TEMPLATE_ID`. For root alone, all variables of commands are
    /// in `/run/e2b/envs.json`: a program that root started before need not ask for them.
    pub fn tell_identity(&self, envs: &HashMap<String, String>) -> Result<(), SystemError> {
        if !self.enabled {
            return Ok(());
        }
        let wrap = |source| SystemError::File { path: IDENTITY, source };
        fs::create_dir_all(IDENTITY).map_err(wrap)?;
        for name in ["E2B_SANDBOX", "E2B_SANDBOX_ID", "E2B_TEMPLATE_ID"] {
            let path = Path::new(IDENTITY).join(format!(".{name}"));
            match envs.get(name) {
                Some(value) => fs::write(path, value).map_err(wrap)?,
                None => match fs::remove_file(path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(wrap(e)),
                    _ => {}
                },
            }
        }
        // Whole or not at all, for those who read it meanwhile.
        let (new, path) = (Path::new(IDENTITY).join(".envs.json"), Path::new(IDENTITY).join("envs.json"));
        let _ = fs::remove_file(&new);
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new).map_err(wrap)?;
        serde_json::to_writer(&mut file, envs).map_err(|e| wrap(e.into()))?;
        fs::rename(new, path).map_err(wrap)
    }

    /// Adds certificates to those that the guest trusts, once.
    pub fn trust(&self, pem: &str) -> Result<(), SystemError> {
        if !self.enabled {
            return Ok(());
        }
        let wrap = |source| SystemError::File { path: CERTIFICATES, source };
        let path = Path::new(CERTIFICATES);
        if fs::read_to_string(path).is_ok_and(|have| have.contains(pem.trim())) {
            return Ok(());
        }
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(wrap)?;
        }
        let mut file = OpenOptions::new().create(true).append(true).open(path).map_err(wrap)?;
        file.write_all(format!("\n{}\n", pem.trim()).as_bytes()).map_err(wrap)
    }
}

nix::ioctl_write_ptr!(add_entropy, b'R', 0x03, [libc::c_int; 2]);
nix::ioctl_none!(reseed, b'R', 0x07);

fn is_off(guest: DateTime<Utc>, host: DateTime<Utc>) -> bool {
    let ahead = guest.signed_duration_since(host);
    match ahead.to_std() {
        Ok(ahead) => ahead > MAX_AHEAD,
        Err(_) => (-ahead).to_std().is_ok_and(|behind| behind > MAX_BEHIND),
    }
}

/// The hosts file with this one address for [`EVENTS_HOST`].
fn with_host(hosts: &str, address: IpAddr) -> String {
    let line = format!("{address} {EVENTS_HOST}");
    if hosts.lines().any(|l| l == line) {
        return hosts.to_owned();
    }
    let others = hosts.lines().filter(|l| !l.split_whitespace().skip(1).any(|name| name == EVENTS_HOST));
    let mut out: String = others.flat_map(|l| [l, "\n"]).collect();
    out.push_str(&line);
    out.push('\n');
    out
}

/// Files are made as `rw-r--r--`, whatever started us.
pub fn set_umask() {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
}

/// The kernel shall end anything else first; processes that we start give this up. Without the
/// right to do so, we are like any other process.
pub fn protect_from_oom_killer() {
    if let Err(e) = fs::write("/proc/self/oom_score_adj", "-1000") {
        eprintln!("envd: cannot lower our OOM score: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_set_when_behind_or_far_ahead() {
        let host = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let off = |ms: i64| is_off(host + chrono::TimeDelta::milliseconds(ms), host);
        assert!(off(-60) && off(-100_000_000) && off(6_000));
        assert!(!off(-40) && !off(0) && !off(400));
    }

    #[test]
    fn the_hosts_file_keeps_its_other_lines() {
        let old = "127.0.0.1 localhost\n10.0.0.1 events.e2b.local\n# c";
        let new = with_host(old, "10.0.0.2".parse().unwrap());
        assert_eq!(new, "127.0.0.1 localhost\n# c\n10.0.0.2 events.e2b.local\n");
        assert_eq!(with_host(&new, "10.0.0.2".parse().unwrap()), new);
    }

    #[test]
    fn a_disabled_system_still_checks_its_input() {
        let system = System::new(false);
        system.add_entropy(&[1; 64]).unwrap();
        assert!(matches!(system.add_entropy(&[]), Err(SystemError::EntropySize(0))));
        assert!(matches!(system.set_events_host("x"), Err(SystemError::Address(_))));
    }
}
