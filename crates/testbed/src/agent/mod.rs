//! The test bed's part in the machine. The first process prepares the machine, starts the agent
//! and reaps; the agent loads the rest of the modules, mounts the shares and runs the jobs.

mod job;
mod mounts;
mod setup;

use std::fs::{self, File};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::protocol::{Event, Frame, SPEC_FILE, Spec};

/// This program and the specification, once the root disk is the root.
const PROGRAM: &str = "/run/testbed";
/// How the name of the channel's device begins: it is the only port of a virtio serial device. The
/// number of the device depends on what other devices there are.
const PORT: &str = "/dev/vport";

/// Where frames go; the job's two streams and the agent share it.
type Channel = Arc<Mutex<File>>;

/// The machine's first process. Never returns.
pub fn first_process() -> ! {
    if let Err(error) = mounts::prepare().and_then(|()| supervise()) {
        // The console is all there is.
        let _ = fs::write("/dev/kmsg", format!("<3>testbed: {error:#}\n"));
    }
    nix::unistd::sync();
    let _ = reboot(RebootMode::RB_POWER_OFF);
    // The kernel panics when its first process ends, which ends the machine as well.
    std::process::exit(1);
}

/// Runs the agent to its end and reaps every process that has lost its parent.
fn supervise() -> Result<()> {
    let agent = Command::new(PROGRAM).arg("agent").spawn().context("start the agent")?;
    let agent = Pid::from_raw(agent.id().cast_signed());
    loop {
        match waitpid(Pid::from_raw(-1), None) {
            Ok(WaitStatus::Exited(pid, 0)) if pid == agent => return Ok(()),
            Ok(status) if status.pid() == Some(agent) => anyhow::bail!("the agent ended: {status:?}"),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("wait for a process"),
        }
    }
}

/// `testbed agent`.
pub fn run() -> Result<ExitCode> {
    let spec = fs::read(format!("/run/{SPEC_FILE}")).context("read the specification")?;
    let spec: Spec = serde_json::from_slice(&spec).context("understand the specification")?;
    let port = mounts::wait_for(PORT)?;
    let port = File::options().read(true).write(true).open(port).context("open the channel to the host")?;
    let channel: Channel = Arc::new(Mutex::new(port));
    setup::modules(|note| tell(&channel, Event::Note(note)))?;
    setup::kvm_device()?;
    setup::network()?;
    setup::limits()?;
    for (i, share) in spec.shares.iter().enumerate() {
        mounts::share(i, share)?;
    }
    tell(&channel, Event::Up)?;
    for (i, job) in spec.jobs.iter().enumerate() {
        tell(&channel, Event::Started(i))?;
        let (end, seconds) = job::run(i, job, &channel)?;
        tell(&channel, Event::Ended(i, end, seconds))?;
    }
    tell(&channel, Event::Finished)?;
    Ok(ExitCode::SUCCESS)
}

fn tell(channel: &Channel, event: Event) -> Result<()> {
    send(channel, &Frame::Event(event))
}

fn send(channel: &Channel, frame: &Frame) -> Result<()> {
    let mut channel = channel.lock().map_err(|_| anyhow::anyhow!("the channel is broken"))?;
    frame.write(&mut *channel).context("write to the host")
}
