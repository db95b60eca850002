//! What the tests of kernel devices share.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nidus_block::nbd::kernel::{self, AttachOptions, AttachedDevice, DevicePool, PoolConfig};
use nidus_block::{BlockDevice, BlockError, FileDevice, Overlay, ReadDevice, Zeroing};
use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard};

pub const SIZE: u64 = 64 << 20;
/// Names this run's pools; a pool of another name never reclaims their devices.
pub const INSTANCE: &str = "test";

/// The host's devices, for one test at a time.
pub struct Devices {
    _turn: MutexGuard<'static, ()>,
    pub dir: TempDir,
}

/// `None`, with the reason printed, where the kernel has no NBD devices; a failure where they are
/// required.
pub async fn devices() -> Option<Devices> {
    static TURN: Mutex<()> = Mutex::const_new(());
    if let Err(reason) = kernel::probe() {
        assert!(std::env::var_os("NIDUS_REQUIRE_NBD").is_none(), "NBD devices are required: {reason}");
        eprintln!("skipped: {reason}. 'make testbed' runs this test in an emulated machine");
        return None;
    }
    let turn = TURN.lock().await;
    Some(Devices { _turn: turn, dir: TempDir::new().unwrap() })
}

/// Shorter limits than the defaults: what fails does so soon.
pub fn config() -> PoolConfig {
    PoolConfig { hold_limit: Duration::from_millis(200), ..PoolConfig::new(INSTANCE) }
}

pub fn options(connections: usize) -> AttachOptions {
    AttachOptions { connections, dead_connection_timeout: Duration::from_secs(1), ..AttachOptions::default() }
}

/// For devices whose server breaks: the kernel notices soon.
pub fn impatient(connections: usize) -> AttachOptions {
    AttachOptions { request_timeout: Duration::from_secs(1), ..options(connections) }
}

impl Devices {
    /// An overlay over a file of the pattern that `seed` gives.
    pub async fn overlay(&self, seed: u8) -> Arc<Overlay> {
        overlay(self.dir.path(), seed).await
    }

    pub async fn pool(&self) -> DevicePool {
        DevicePool::open(config()).await.unwrap()
    }
}

pub async fn overlay(dir: &Path, seed: u8) -> Arc<Overlay> {
    let base = dir.join(format!("base-{seed}"));
    if !base.exists() {
        std::fs::write(&base, pattern(seed)).unwrap();
    }
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let cache = dir.join(format!("cache-{}-{number}", std::process::id()));
    let base = Arc::new(FileDevice::open(base).await.unwrap());
    Arc::new(Overlay::create(base, cache).await.unwrap())
}

/// Every block has a value of its own.
pub fn pattern(seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    for (i, block) in bytes.chunks_mut(4096).enumerate() {
        block.fill(seed.wrapping_add((i % 251) as u8));
    }
    bytes
}

pub async fn contents(device: &impl ReadDevice) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    device.read_at(0, &mut bytes).await.unwrap();
    bytes
}

pub fn sysfs(device: &AttachedDevice, name: &str) -> String {
    let name = format!("/sys/block/{}/{name}", device.path().file_name().unwrap().display());
    std::fs::read_to_string(name).unwrap().trim().to_owned()
}

/// Runs what waits for the device on a thread of its own: the runtime's threads serve it.
pub async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

pub fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

pub fn open_direct(path: &Path) -> File {
    let direct = nix::fcntl::OFlag::O_DIRECT.bits();
    File::options().read(true).write(true).custom_flags(direct).open(path).unwrap()
}

/// A buffer at an address that direct I/O takes.
pub struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub fn new(len: usize, fill: u8) -> Self {
        let bytes = vec![fill; len + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self { bytes, start, len }
    }
}

impl std::ops::Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

pub fn read_direct(path: &Path, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut buffer = Aligned::new(len, 0);
    open_direct(path).read_exact_at(&mut buffer, offset)?;
    Ok(buffer.to_vec())
}

/// Runs a program to its end.
pub fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&text));
}

/// Counts flushes, and breaks the connection (by a panic in its task) on reads of one offset.
pub struct Watched {
    pub inner: Arc<Overlay>,
    pub flushes: AtomicU64,
    /// How often reads of [`Watched::BREAK_AT`] still panic.
    pub breaks: AtomicU64,
}

impl Watched {
    pub const BREAK_AT: u64 = 8 << 20;

    pub fn new(inner: Arc<Overlay>, breaks: u64) -> Arc<Self> {
        Arc::new(Self { inner, flushes: AtomicU64::new(0), breaks: AtomicU64::new(breaks) })
    }
}

#[async_trait]
impl ReadDevice for Watched {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> Result<bool, BlockError> {
        if offset == Self::BREAK_AT {
            let left = self.breaks.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
            assert!(left.is_err(), "this connection is meant to break");
        }
        self.inner.try_read_at(offset, buf)
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.inner.read_at(offset, buf).await
    }
}

#[async_trait]
impl BlockDevice for Watched {
    async fn write_at(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        self.inner.write_at(offset, data).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: Zeroing) -> Result<(), BlockError> {
        self.inner.write_zeroes(offset, len, how).await
    }

    async fn flush(&self) -> Result<(), BlockError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.inner.flush().await
    }
}

/// Another daemon: this test program again, as a process of its own with one attached device. It ends
/// when its standard input does.
pub struct Daemon {
    pub child: Child,
    pub node: PathBuf,
}

const DAEMON: &str = "NIDUS_TEST_DAEMON";

impl Daemon {
    pub fn start(instance: &str, dir: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "another_daemon", "--ignored", "--nocapture"])
            .env(DAEMON, instance)
            .env("NIDUS_TEST_DIR", dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let node = lines.find_map(|line| Some(PathBuf::from(line.unwrap().strip_prefix("attached ")?)));
        Self { child, node: node.expect("the daemon attaches no device") }
    }

    pub fn kill(mut self) -> PathBuf {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::mem::take(&mut self.node)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The other daemon's part. Does nothing where it was not started by [`Daemon::start`].
pub async fn be_a_daemon() {
    let (Some(instance), Some(dir)) = (std::env::var_os(DAEMON), std::env::var_os("NIDUS_TEST_DIR")) else {
        eprintln!("skipped: it is a part of other tests");
        return;
    };
    let config = PoolConfig { instance: instance.into_string().unwrap(), ..config() };
    let pool = DevicePool::open(config).await.unwrap();
    let device = pool.acquire(overlay(Path::new(&dir), 9).await, impatient(2)).await.unwrap();
    // The test harness has begun a line of its own.
    println!("\nattached {}", device.path().display());
    on_thread(|| io::copy(&mut io::stdin(), &mut io::sink())).await.unwrap();
    device.detach().await.unwrap();
}
