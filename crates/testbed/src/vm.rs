//! The emulated machine on the host: one QEMU process and the agent's channel.
//!
//! Nothing has a name outside this process: the initramfs is a memory file, the channel a socket
//! pair, and what the machine writes to its disk goes to a file that QEMU has already unlinked. QEMU
//! dies with this process. So nothing is left behind however the run ends.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nidus_vmm::guest::Archive;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::Size;
use crate::image::Image;
use crate::protocol::{Frame, SPEC_FILE, Spec};

/// How much of the console is kept for error messages.
const CONSOLE_KEPT: usize = 16 << 10;
/// The kernel's parameters. The processor is emulated: the time stamp counter can be trusted, the
/// timer check takes seconds and fails, and mitigations only cost.
const KERNEL_PARAMETERS: &str = "console=ttyS0 quiet rw mitigations=off panic=-1 tsc=reliable no_timer_check";

/// An AMD processor with virtualisation and nested paging, less what TCG cannot do and would warn of.
const PROCESSOR: &str = "EPYC,+svm,+npt,-fxsr-opt,-misalignsse,-osvw,-topoext,-nrip-save,-xsavec";

/// A running machine; killed when dropped.
pub struct Vm {
    qemu: Child,
    channel: UnixStream,
    console: Arc<Mutex<Vec<u8>>>,
}

impl Vm {
    /// Boots the machine. With `show_console`, what its kernel says goes to the error output.
    pub fn boot(image: &Image, size: &Size, spec: &Spec, show_console: bool) -> Result<Self> {
        let initramfs = initramfs(image, spec)?;
        let (channel, far_end) = UnixStream::pair().context("make the agent's channel")?;
        let far_end = OwnedFd::from(far_end);
        let mut command = image.emulator();
        let number = |fd: &OwnedFd| fd.as_raw_fd();
        arguments(&mut command, image, size, spec, number(&initramfs), number(&far_end));
        inherit(&mut command, vec![number(&initramfs), number(&far_end)]);
        die_with_parent(&mut command);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut qemu = command.spawn().context("start the image's QEMU")?;
        let console = Arc::default();
        if let Some(pipe) = qemu.stdout.take() {
            keep(pipe, Arc::clone(&console), show_console);
        }
        if let Some(pipe) = qemu.stderr.take() {
            keep(pipe, Arc::clone(&console), show_console);
        }
        Ok(Self { qemu, channel, console })
    }

    /// The agent's next frame, or `None` if there is none before `end`.
    pub fn next(&mut self, end: Instant) -> Result<Option<Frame>> {
        let mut channel = Deadline { channel: &self.channel, end };
        match Frame::read(&mut channel) {
            Ok(frame) => Ok(Some(frame)),
            Err(e) if e.kind() == ErrorKind::TimedOut => Ok(None),
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => {
                let status = self.qemu.wait().context("wait for QEMU")?;
                bail!("the machine went off too early (QEMU: {status}); {}", self.console())
            }
            Err(e) => Err(e).context("hear from the machine"),
        }
    }

    /// What the kernel and QEMU said last, for error messages.
    pub fn console(&self) -> String {
        let kept = self.console.lock().map(|c| String::from_utf8_lossy(&c).trim().replace('\r', ""));
        match kept {
            Ok(text) if !text.is_empty() => format!("the last lines of its console:\n{text}"),
            _ => "its console is empty".into(),
        }
    }

    /// Waits for the machine to go off by itself until `end`; then it is killed.
    pub fn finish(mut self, end: Instant) -> Result<()> {
        // QEMU closes its end of the channel when it exits.
        let mut channel = Deadline { channel: &self.channel, end };
        match channel.read(&mut [0]) {
            Ok(0) => self.qemu.wait().map(|_| ()).context("wait for QEMU"),
            Ok(_) => bail!("the machine said something after its end"),
            Err(e) => Err(e).context("wait for the machine to go off"),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Reading that ends at a point in time.
struct Deadline<'a> {
    channel: &'a UnixStream,
    end: Instant,
}

impl Read for Deadline<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.channel.set_read_timeout(Some(left))?;
        match (&mut &*self.channel).read(buf) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => Err(ErrorKind::TimedOut.into()),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => Ok(0),
            other => other,
        }
    }
}

/// This program as the first process, the early modules and the specification.
fn initramfs(image: &Image, spec: &Spec) -> Result<OwnedFd> {
    let mut archive = Archive::default();
    let mut order = String::new();
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("read {}", path.display()));
    let mut add = |name: &str, mode: u32, data: &[u8]| {
        archive.add(name, mode, data).with_context(|| format!("put {name} into the initramfs"))
    };
    for dir in ["dev", "proc", "sys", "modules", "root"] {
        add(dir, 0o040_755, &[])?;
    }
    for file in image.modules()? {
        let name = format!("modules/{}", file.file_name().unwrap_or_default().to_string_lossy());
        add(&name, 0o100_644, &read(&file)?)?;
        order.push_str(&format!("/{name}\n"));
    }
    add("modules/order", 0o100_644, order.as_bytes())?;
    add("init", 0o100_755, &read(Path::new("/proc/self/exe"))?)?;
    add(SPEC_FILE, 0o100_644, &serde_json::to_vec(spec)?)?;
    let bytes = archive.finish().context("finish the initramfs")?;
    let file = memfd_create("initramfs", MFdFlags::MFD_CLOEXEC).context("make a memory file")?;
    let mut file = File::from(file);
    file.write_all(&bytes).context("write the initramfs")?;
    Ok(file.into())
}

fn arguments(
    command: &mut Command,
    image: &Image,
    size: &Size,
    spec: &Spec,
    initramfs: RawFd,
    channel: RawFd,
) {
    // A comma within a value is written twice.
    let path = |p: &Path| p.display().to_string().replace(',', ",,");
    command
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-name", "nidus-testbed"])
        .args(["-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", PROCESSOR])
        .args(["-smp", &size.cpus.to_string(), "-m", &size.memory.to_string()])
        .arg("-kernel")
        .arg(image.kernel())
        .arg("-initrd")
        .arg(format!("/proc/self/fd/{initramfs}"))
        .args(["-append", &kernel_parameters(), "-serial", "stdio"])
        .arg("-drive")
        .arg(format!("file={},if=none,id=root,format=raw,snapshot=on,cache=unsafe", path(&image.disk())))
        .args(["-device", "virtio-blk-pci,drive=root", "-device", "virtio-serial-pci"])
        .args(["-chardev", &format!("socket,id=agent,fd={channel}")])
        .args(["-device", "virtserialport,chardev=agent,nr=1"])
        .args(["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]);
    if let Some(socket) = &size.monitor {
        command.args(["-monitor", &format!("unix:{},server=on,wait=off", path(socket))]);
    }
    for (i, share) in spec.shares.iter().enumerate() {
        let access = if share.read_only { "on" } else { "off" };
        command
            .arg("-fsdev")
            .arg(format!(
                "local,id=share{i},path={},security_model=none,multidevs=remap,readonly={access}",
                path(&share.host)
            ))
            .args(["-device", &format!("virtio-9p-pci,fsdev=share{i},mount_tag=share{i}")]);
    }
}

/// On a busy host the kernel cannot measure the emulated counter, and would hang without a word.
fn kernel_parameters() -> String {
    let frequency = nidus_vmm::qemu::tsc::khz().map(|khz| format!(" tsc_early_khz={khz}"));
    format!("{KERNEL_PARAMETERS}{}", frequency.unwrap_or_default())
}

/// Passes files on under the same numbers.
fn inherit(command: &mut Command, fds: Vec<RawFd>) {
    // SAFETY: only fcntl(2), which is async-signal-safe, is called between fork and exec; the numbers
    // are those of files that stay open until the child has been started.
    unsafe {
        command.pre_exec(move || {
            for fd in &fds {
                if libc::fcntl(*fd, libc::F_SETFD, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}

/// The process that `command` starts is killed when this thread ends, so it must be the main one.
pub fn die_with_parent(command: &mut Command) {
    let parent = std::process::id().cast_signed();
    // SAFETY: only prctl(2) and getppid(2), which are async-signal-safe, are called between fork and
    // exec.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            if libc::getppid() != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
}

/// Keeps the end of what comes out of `pipe`, in a thread that ends with the pipe.
fn keep(mut pipe: impl Read + Send + 'static, kept: Arc<Mutex<Vec<u8>>>, show: bool) {
    thread::spawn(move || {
        let mut buf = [0; 4096];
        while let Ok(n @ 1..) = pipe.read(&mut buf) {
            if show {
                let _ = io::stderr().write_all(&buf[..n]);
            }
            let Ok(mut kept) = kept.lock() else { return };
            kept.extend_from_slice(&buf[..n]);
            let surplus = kept.len().saturating_sub(CONSOLE_KEPT);
            kept.drain(..surplus);
        }
    });
}
