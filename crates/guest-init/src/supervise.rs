//! envd and the orphans: what the first process does for the rest of the guest's life.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::{Failure, say};

/// envd that ends sooner than this after its start is not started again at once for ever.
const QUICK: Duration = Duration::from_secs(1);
const MAX_QUICK: u32 = 5;

/// Starts envd, starts it again when it ends, and reaps every process that has lost its parent.
pub fn run(envd: &str) -> Result<(), Failure> {
    let mut quick = 0;
    loop {
        let started = Instant::now();
        let child = Command::new(envd)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/root")
            .env("LANG", "C.UTF-8")
            .current_dir("/")
            .stdin(Stdio::null())
            .spawn()
            .map_err(|e| Failure::new(format!("start {envd}"), e))?;
        let pid = Pid::from_raw(child.id().cast_signed());
        let status = reap_until(pid)?;
        say(&format!("envd ended: {status:?}"));
        quick = if started.elapsed() < QUICK { quick + 1 } else { 0 };
        if quick >= MAX_QUICK {
            return Err(Failure::new("keep envd running", "it ends at once"));
        }
    }
}

fn reap_until(wanted: Pid) -> Result<WaitStatus, Failure> {
    loop {
        match waitpid(Pid::from_raw(-1), None) {
            Ok(status) if status.pid() == Some(wanted) => return Ok(status),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(Failure::new("wait for a process", e)),
        }
    }
}
