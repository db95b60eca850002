//! One job: its processes are in a control group of their own, which is how they all end with it.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use std::os::unix::process::{CommandExt, ExitStatusExt};

use super::{Channel, send};
use crate::protocol::{End, Frame, Job};

/// What a job's output is cut into.
const PIECE: usize = 32 << 10;
/// How long killed processes may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// Runs the job to its end, or to the end of its time. Returns how it ended and after how many
/// seconds. Fails only where the machine itself does not work.
pub fn run(number: usize, job: &Job, channel: &Channel) -> Result<(End, f64)> {
    let begin = Instant::now();
    let group = Group::new(number)?;
    let end = match start(job, &group, channel) {
        Ok(running) => running.wait(begin + Duration::from_secs(job.timeout), &group)?,
        Err(error) => End::NotStarted(format!("{error:#}")),
    };
    group.remove()?;
    Ok((end, begin.elapsed().as_secs_f64()))
}

struct Running {
    exit: mpsc::Receiver<std::io::Result<ExitStatus>>,
    output: [thread::JoinHandle<()>; 2],
}

fn start(job: &Job, group: &Group, channel: &Channel) -> Result<Running> {
    let (program, arguments) = job.command.split_first().context("it has no command")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .envs([("HOME", "/root"), ("LANG", "C.UTF-8"), ("NIDUS_TESTBED", "1")])
        .envs(&job.env)
        .current_dir("/root")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let procs =
        fs::File::options().write(true).open(group.0.join("cgroup.procs")).context("open its group")?;
    let procs_number = std::os::fd::AsRawFd::as_raw_fd(&procs);
    // SAFETY: only write(2) and setsid(2), which are async-signal-safe, are called between fork and
    // exec, on a number that stays open until the child has been started.
    unsafe {
        command.pre_exec(move || {
            if libc::write(procs_number, c"0".as_ptr().cast(), 1) != 1 || libc::setsid() < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn().with_context(|| format!("cannot start {program}"))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let output = [pass_on(stdout, channel, Frame::Out), pass_on(stderr, channel, Frame::Err)];
    let (tx, exit) = mpsc::channel();
    thread::spawn(move || tx.send(child.wait()));
    Ok(Running { exit, output })
}

impl Running {
    fn wait(self, end: Instant, group: &Group) -> Result<End> {
        let status = self.exit.recv_timeout(end.saturating_duration_since(Instant::now()));
        // Whoever is left holds the output open and may hold devices.
        group.kill()?;
        let ended = match status {
            Err(_) => {
                self.exit.recv_timeout(KILL_LIMIT).context("a killed job does not end")??;
                End::TimedOut
            }
            Ok(status) => {
                let status = status.context("wait for a job")?;
                match (status.code(), status.signal()) {
                    (Some(code), _) => End::Exited(code),
                    (None, signal) => End::Killed(signal.unwrap_or(0)),
                }
            }
        };
        for thread in self.output {
            let _ = thread.join();
        }
        Ok(ended)
    }
}

/// Passes a stream of the job on until it is closed, which is when the last process that has it
/// ends.
fn pass_on<R: Read + Send + 'static>(
    stream: Option<R>,
    channel: &Channel,
    frame: fn(Vec<u8>) -> Frame,
) -> thread::JoinHandle<()> {
    let channel = channel.clone();
    thread::spawn(move || {
        let Some(mut stream) = stream else { return };
        let mut piece = vec![0; PIECE];
        while let Ok(n @ 1..) = stream.read(&mut piece) {
            if send(&channel, &frame(piece[..n].to_vec())).is_err() {
                return;
            }
        }
    })
}

/// The control group of a job.
struct Group(PathBuf);

impl Group {
    fn new(number: usize) -> Result<Self> {
        let dir = Path::new("/sys/fs/cgroup").join(format!("job{number}"));
        fs::create_dir(&dir).with_context(|| format!("make the group {}", dir.display()))?;
        Ok(Self(dir))
    }

    fn kill(&self) -> Result<()> {
        fs::write(self.0.join("cgroup.kill"), "1").with_context(|| format!("kill {}", self.0.display()))
    }

    /// Kills what is left and removes the group.
    fn remove(self) -> Result<()> {
        self.kill()?;
        let end = Instant::now() + KILL_LIMIT;
        loop {
            match remove_tree(&self.0) {
                Ok(()) => return Ok(()),
                // Killed processes leave the group a moment later.
                Err(_) if Instant::now() < end => thread::sleep(Duration::from_millis(5)),
                Err(e) => return Err(e).with_context(|| format!("remove the group {}", self.0.display())),
            }
        }
    }
}

/// The files of a group go with it; only directories are removed.
fn remove_tree(dir: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(dir)
}
