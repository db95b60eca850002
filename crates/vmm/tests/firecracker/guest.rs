//! What this program does as the first process of a guest: it uses its memory, its disk and its
//! network, and answers questions about them over TCP, a line each.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use crate::net;

pub const ADDRESS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(169, 254, 0, 21), 7000);
/// Bytes of memory that questions are about.
pub const MEMORY: usize = 24 << 20;
pub const PAGE: usize = 4096;
/// What the disk begins with when the guest has written to it.
pub const DISK_TEXT: &[u8] = b"written by the guest";

pub fn run() -> ! {
    if let Err(e) = start() {
        say(&format!("failed: {e}"));
    }
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    std::process::exit(1);
}

fn say(text: &str) {
    let _ = fs::write("/dev/kmsg", format!("<3>nidus: {text}\n"));
}

type Failure = Box<dyn std::error::Error>;

fn start() -> Result<(), Failure> {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)?;
    }
    for path in fs::read_to_string("/modules.order")?.lines() {
        finit_module(File::open(path)?, c"", ModuleInitFlags::empty())?;
    }
    if fs::read_to_string("/proc/cmdline")?.contains("nidus.probe=1") {
        say("probe ok");
        reboot(RebootMode::RB_POWER_OFF)?;
    }
    while !Path::new("/dev/vda").exists() {
        std::thread::yield_now();
    }
    let disk = File::options().read(true).write(true).custom_flags(libc::O_SYNC).open("/dev/vda")?;
    disk.write_all_at(DISK_TEXT, 0)?;
    disk.sync_all()?;
    net::configure("eth0", *ADDRESS.ip(), Ipv4Addr::new(255, 255, 255, 252))?;
    static TICKS: AtomicU64 = AtomicU64::new(0);
    std::thread::spawn(|| {
        loop {
            TICKS.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    let mut memory = vec![0u8; MEMORY];
    fill(&mut memory, 1);
    let listener = TcpListener::bind(ADDRESS)?;
    say("guest is up");
    loop {
        let (stream, _) = listener.accept()?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        while let Some(Ok(line)) = lines.next() {
            let answer = match line.split_once(' ').unwrap_or((&line, "")) {
                ("ticks", _) => TICKS.load(Ordering::Relaxed).to_string(),
                ("sum", _) => sum(&memory).to_string(),
                ("fill", n) => {
                    let n: usize = n.parse()?;
                    fill(&mut memory[..n * PAGE], 2);
                    "filled".into()
                }
                ("disk", _) => {
                    let file = File::options().read(true).custom_flags(libc::O_DIRECT).open("/dev/vda")?;
                    let mut buf = Aligned([0; 512]);
                    file.read_exact_at(&mut buf.0, 0)?;
                    String::from_utf8_lossy(&buf.0[..DISK_TEXT.len()]).into_owned()
                }
                ("clock", _) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs().to_string(),
                ("crash", _) => {
                    reboot(RebootMode::RB_AUTOBOOT)?;
                    unreachable!()
                }
                other => format!("what is {other:?}?"),
            };
            let mut stream = &stream;
            if writeln!(stream, "{answer}").is_err() {
                break;
            }
        }
    }
}

#[repr(align(4096))]
struct Aligned([u8; 512]);

/// Each page another content.
pub fn fill(memory: &mut [u8], seed: u8) {
    for (n, page) in memory.chunks_mut(PAGE).enumerate() {
        page.fill(seed);
        page[..8].copy_from_slice(&(n as u64 ^ u64::from(seed) << 32).to_le_bytes());
    }
}

pub fn sum(memory: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(memory);
    hasher.finish()
}
