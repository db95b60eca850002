//! Starting a confined VMM process and knowing when it ends.
//!
//! Confinement: own user and group id, no supplementary groups, no
//! capabilities and none to be had (empty bounding set, no new privileges), its own network namespace,
//! a root file system of its own where the driver makes one, cgroup limits, a bounded number of
//! open files, nothing inherited but what is named, no core dumps, killed with the daemon (PR_SET_PDEATHSIG,
//! prctl(2)). The VMM's own seccomp filter comes on top.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::watch;

use crate::console::Tail;
use crate::jail::Entry;
use crate::{Result, VmmError};

/// What to start.
#[derive(Debug)]
pub struct Spawn {
    /// Program.
    pub program: PathBuf,
    /// Arguments.
    pub args: Vec<OsString>,
    /// Files that the child keeps open under the same numbers (arguments name them).
    pub keep: Vec<OwnedFd>,
    /// Network namespace to enter.
    pub netns: OwnedFd,
    /// User and group id.
    pub uid: u32,
    /// cgroup.procs files to join.
    pub cgroup_procs: Vec<PathBuf>,
    /// Root file system to enter; `program` is a path in it then.
    pub jail: Option<Entry>,
    /// Where standard output goes; nowhere if there is none.
    pub stdout: Option<OwnedFd>,
    /// The daemon's end of a pipe, non-blocking, that the process logs to beside its error output.
    pub log: Option<File>,
    /// Most files that it may have open.
    pub max_files: u64,
}

/// Tells when a process has ended; cheap to clone.
#[derive(Debug, Clone)]
pub struct ExitWatch(watch::Receiver<Option<String>>);

impl ExitWatch {
    /// Resolves with the exit status as text once the process has ended.
    pub async fn wait(&mut self) -> String {
        match self.0.wait_for(Option::is_some).await {
            Ok(s) => s.clone().unwrap_or_default(),
            Err(_) => "gone".to_owned(),
        }
    }

    /// The exit status, if the process has ended.
    pub fn status(&self) -> Option<String> {
        self.0.borrow().clone()
    }
}

/// A running process: killed and reaped when dropped.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    exit: ExitWatch,
    log: Tail,
}

const LOG_LIMIT: usize = 16 * 1024;

type Job = Box<dyn FnOnce() + Send>;

/// PR_SET_PDEATHSIG fires when the *thread* that forked ends (prctl(2)), so every VMM is forked
/// from one thread that lives as long as the daemon.
fn spawner() -> &'static mpsc::Sender<Job> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (tx, rx) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("vmm-spawner".into())
            .spawn(move || {
                while let Ok(job) = rx.recv() {
                    job();
                }
            })
            .map_err(|e| tracing::error!("cannot start the spawner thread: {e}"))
            .ok();
        tx
    })
}

impl Process {
    /// Starts the process. Returns when exec has succeeded.
    pub async fn spawn(name: &str, mut spawn: Spawn) -> Result<Self> {
        let log = spawn.log.take();
        let program = spawn.program.display().to_string();
        let (tx, rx) = tokio::sync::oneshot::channel();
        let job: Job = Box::new(move || {
            let _ = tx.send(fork(spawn));
        });
        let gone = || VmmError::io("reach the spawner thread", io::Error::from(io::ErrorKind::BrokenPipe));
        spawner().send(job).map_err(|_| gone())?;
        let child = rx.await.map_err(|_| gone())?.map_err(|e| VmmError::io(format!("start {program}"), e))?;
        Self::watch(name, child, log)
    }

    fn watch(name: &str, mut child: Child, log_pipe: Option<File>) -> Result<Self> {
        let pid = child.id();
        let log = Tail::new(LOG_LIMIT);
        let (tx, rx) = watch::channel(None);
        let tail = log.clone();
        let errors = child.stderr.take();
        // One small thread a VM: it drains the error output and the log, then reaps. It ends
        // with the process, whatever becomes of the runtime.
        std::thread::Builder::new()
            .name(format!("vm-{name}"))
            .stack_size(64 * 1024)
            .spawn(move || {
                if let Some(errors) = errors {
                    drain(errors, log_pipe, &tail);
                }
                let status = match child.wait() {
                    Ok(s) => s.to_string(),
                    Err(e) => format!("unknown: {e}"),
                };
                let _ = tx.send(Some(status));
            })
            .map_err(|e| VmmError::io("start a VM's watcher thread", e))?;
        Ok(Self { pid, exit: ExitWatch(rx), log })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A handle that tells when it ends.
    pub fn exit(&self) -> ExitWatch {
        self.exit.clone()
    }

    /// The end of what it wrote to its error output and its log, at most 16 KiB. Complete once the exit is
    /// known.
    pub fn log(&self) -> String {
        self.log.text().trim().to_owned()
    }

    fn signal_kill(&self) {
        // The watcher thread reaps; until it has told so the pid cannot be another process's.
        if self.exit.status().is_none() {
            // SAFETY: kill has no memory effects.
            unsafe { libc::kill(self.pid as i32, libc::SIGKILL) };
        }
    }

    /// Kills it and waits for its end.
    pub async fn kill(self) -> String {
        self.signal_kill();
        self.exit.clone().wait().await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal_kill();
    }
}

/// A process that has written this much is not listened to any more, for the reading costs the
/// daemon's time.
const OUTPUT_LIMIT: usize = 64 << 20;

/// Reads both pipes until the first is closed by the process's end.
fn drain(mut errors: impl Read + AsFd, mut log: Option<File>, tail: &Tail) {
    let mut buf = [0u8; 2048];
    let mut left = OUTPUT_LIMIT;
    loop {
        // The end is told in any case (POLLHUP).
        let events = if left > 0 { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut wanted = vec![PollFd::new(errors.as_fd(), events)];
        wanted.extend(log.as_ref().map(|l| PollFd::new(l.as_fd(), events)));
        match poll(&mut wanted, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(_) => return,
        }
        let from_errors = wanted[0].any().unwrap_or_default();
        let mut keep = |bytes: &[u8]| {
            tail.push(bytes);
            left = left.saturating_sub(bytes.len());
            left > 0
        };
        if let Some(log) = &mut log {
            while let Ok(n @ 1..) = log.read(&mut buf) {
                if !keep(&buf[..n]) {
                    break;
                }
            }
        }
        if from_errors {
            match errors.read(&mut buf) {
                Ok(n @ 1..) => {
                    keep(&buf[..n]);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => return,
            }
        }
    }
}

/// Highest number of a capability that a kernel could have.
const CAPABILITIES: libc::c_ulong = 63;

fn fork(spawn: Spawn) -> io::Result<Child> {
    let Spawn { program, args, keep, netns, uid, cgroup_procs, jail, stdout, log, max_files } = spawn;
    drop(log);
    let keep_raw: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).collect();
    let netns_raw = netns.as_raw_fd();
    // Opened here: the child must not allocate between fork and exec.
    let procs =
        cgroup_procs.iter().map(|p| File::options().write(true).open(p)).collect::<io::Result<Vec<_>>>()?;
    let procs_raw: Vec<RawFd> = procs.iter().map(AsRawFd::as_raw_fd).collect();
    let daemon = std::process::id() as i32;
    let mut command = Command::new(program);
    command.args(args).env_clear().env("PATH", "/usr/bin:/bin").current_dir("/");
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    command.stdout(stdout.map_or_else(Stdio::null, Stdio::from));
    let check = |r: libc::c_int| if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: only async-signal-safe calls are made between fork and exec: raw system calls on
    // numbers and buffers that were prepared before the fork.
    unsafe {
        command.pre_exec(move || {
            for fd in &procs_raw {
                if libc::write(*fd, c"0".as_ptr().cast(), 1) != 1 {
                    return Err(io::Error::last_os_error());
                }
            }
            check(libc::setns(netns_raw, libc::CLONE_NEWNET))?;
            let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            check(libc::setrlimit(libc::RLIMIT_CORE, &no_core))?;
            let files = libc::rlimit { rlim_cur: max_files, rlim_max: max_files };
            check(libc::setrlimit(libc::RLIMIT_NOFILE, &files))?;
            if let Some(jail) = &jail {
                jail.enter()?;
            }
            for capability in 0..=CAPABILITIES {
                if libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 {
                    break; // The kernel has no more (or this container may not).
                }
            }
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setresgid(uid, uid, uid))?;
            check(libc::setresuid(uid, uid, uid))?;
            check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            // After the change of user, which clears it.
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
            if libc::getppid() != daemon {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            // Whatever some library left open ends with exec, too. Kernels before 5.11 cannot; what Rust has opened ends with exec in any case.
            libc::syscall(
                libc::SYS_close_range,
                3 as libc::c_uint,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            );
            for fd in &keep_raw {
                check(libc::fcntl(*fd, libc::F_SETFD, 0))?;
            }
            Ok(())
        });
    }
    let child = command.spawn();
    drop((keep, netns, procs));
    child
}

/// A connected pair of unix stream sockets, both close-on-exec; the first is non-blocking and
/// ready for tokio.
pub fn socket_pair() -> Result<(std::os::unix::net::UnixStream, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two numbers that the call writes.
    let r = unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr())
    };
    if r < 0 {
        return Err(VmmError::io("make a socket pair", io::Error::last_os_error()));
    }
    // SAFETY: both numbers are open sockets that nothing else owns.
    let (a, b) =
        unsafe { (std::os::unix::net::UnixStream::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
    a.set_nonblocking(true).map_err(|e| VmmError::io("make a socket non-blocking", e))?;
    Ok((a, b))
}
