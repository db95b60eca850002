//! What the tests share: content, sources, and a child with a handler.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use nidus_memory::uffd::{
    Cached, Config, Content, End, Fetched, Handler, HandlerError, Handshake, Origin, PageSource, Process,
    SourceError,
};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::{runtime::Runtime, sync::Semaphore, time::timeout};

use crate::child::{EVENT_REMOVE, MISSING, Vmm};

pub const PAGE: usize = 4096;
pub const HUGE: usize = 2 << 20;
/// Longer than anything here takes on a busy machine; only reached when something hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Memory in which no two pages are alike, and each fifth (of 4 KiB) is zero.
pub fn content(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for (number, page) in bytes.chunks_mut(PAGE).enumerate() {
        if number % 5 != 3 {
            SmallRng::seed_from_u64(number as u64).fill(page);
            page[0] |= 1;
        }
    }
    bytes
}

/// A source that has all its content at hand, in pages of this size.
pub struct AtHand {
    content: Vec<u8>,
    page: usize,
}

impl AtHand {
    pub fn new(content: &[u8], page: usize) -> Arc<Self> {
        Arc::new(Self { content: content.to_vec(), page })
    }
}

#[async_trait]
impl PageSource for AtHand {
    fn size(&self) -> u64 {
        self.content.len() as u64
    }

    fn cached<'a>(&'a self, at: u64, len: usize, _: &'a mut [u8]) -> Cached<'a> {
        let bytes = &self.content[at as usize..][..len];
        let zero = bytes.chunks(self.page).any(|page| page.iter().all(|byte| *byte == 0));
        match zero {
            true if len == self.page => Cached::Zero,
            true => Cached::Miss,
            false => Cached::Bytes(bytes),
        }
    }

    async fn fetch(&self, at: u64, len: usize) -> Result<Fetched, SourceError> {
        let bytes = self.content[at as usize..][..len].to_vec();
        Ok(Fetched { bytes: Content::Bytes(bytes.into()), origin: Origin::Cache })
    }
}

/// What storage does with one read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Does {
    Answer,
    Fail,
    FailForGood,
    Short,
    /// Answers when the test lets it.
    Wait,
    /// Never answers.
    Stall,
    Panic,
}

/// Storage in which nothing is cached and which does what it is told for each page and attempt.
pub struct Storage {
    content: Vec<u8>,
    page: usize,
    behaviour: Box<dyn Fn(usize, u32) -> Does + Send + Sync>,
    attempts: Mutex<HashMap<usize, u32>>,
    pub release: Semaphore,
}

impl Storage {
    pub fn new(
        content: Vec<u8>,
        page: usize,
        behaviour: impl Fn(usize, u32) -> Does + Send + Sync + 'static,
    ) -> Arc<Self> {
        let release = Semaphore::new(0);
        let attempts = Mutex::default();
        Arc::new(Self { content, page, behaviour: Box::new(behaviour), attempts, release })
    }

    pub fn attempts(&self, page: usize) -> u32 {
        self.attempts.lock().unwrap().get(&page).copied().unwrap_or(0)
    }
}

#[async_trait]
impl PageSource for Storage {
    fn size(&self) -> u64 {
        self.content.len() as u64
    }

    fn cached<'a>(&'a self, _: u64, _: usize, _: &'a mut [u8]) -> Cached<'a> {
        Cached::Miss
    }

    async fn fetch(&self, at: u64, len: usize) -> Result<Fetched, SourceError> {
        assert_eq!(len, self.page);
        let page = at as usize / self.page;
        let attempt = {
            let mut attempts = self.attempts.lock().unwrap();
            let attempt = attempts.entry(page).or_default();
            *attempt += 1;
            *attempt
        };
        let bytes = &self.content[at as usize..at as usize + len];
        let bytes = match (self.behaviour)(page, attempt) {
            Does::Answer => bytes,
            Does::Fail => return Err(io::Error::other("the bucket is on fire").into()),
            Does::FailForGood => return Err(SourceError::Permanent("no such object".into())),
            Does::Short => &bytes[..len / 2],
            Does::Wait => {
                self.release.acquire().await.unwrap().forget();
                bytes
            }
            Does::Stall => std::future::pending().await,
            Does::Panic => panic!("the storage panics, as this test wants it to"),
        };
        let bytes = Content::Bytes(bytes.to_vec().into());
        Ok(Fetched { bytes, origin: Origin::Storage })
    }
}

/// How the child maps its memory.
#[derive(Clone, Copy)]
pub struct Map {
    pub page: usize,
    pub regions: usize,
    pub features: u64,
    pub mode: u64,
}

/// As Firecracker does.
pub const PLAIN: Map = Map { page: PAGE, regions: 1, features: EVENT_REMOVE, mode: MISSING };

/// A child, and the handler of its memory.
pub struct Rig {
    pub vmm: Vmm,
    pub handler: Option<Handler>,
    pub runtime: Runtime,
}

impl Rig {
    pub fn new(map: Map, source: Arc<dyn PageSource>, config: Config) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.unwrap();
        let mut vmm = Vmm::spawn(&["child_process", "--exact", "--ignored", "--nocapture"]);
        let size = source.size();
        let stream = vmm.map(size as usize, map.page, map.regions, map.features, map.mode);
        let handshake = receive(&runtime, stream, size).unwrap();
        assert_eq!(handshake.process().map(Process::pid), Some(vmm.process.id()));
        let _context = runtime.enter();
        let handler = Some(Handler::start(handshake, source, config).unwrap());
        Self { vmm, handler, runtime }
    }

    pub fn handler(&self) -> &Handler {
        self.handler.as_ref().unwrap()
    }

    /// Waits for the handler to end of itself.
    pub fn ended(&self) -> Result<End, Arc<HandlerError>> {
        let ended = async { timeout(PATIENCE, self.handler().ended()).await };
        self.runtime.block_on(ended).expect("the handler goes on")
    }

    /// Lets the child exit, and expects the handler to end with it and leave no thread.
    pub fn finish(mut self) {
        self.vmm.send("exit");
        assert_eq!(self.ended().unwrap(), End::Exited);
        let handler = self.handler.take().unwrap();
        assert_eq!(self.runtime.block_on(handler.stop()).unwrap(), End::Exited);
    }

    pub fn touched(&self) -> nidus_memory::uffd::Touched {
        self.runtime.block_on(self.handler().touched())
    }

    /// The metrics, with all that the child has seen in them: a fault is counted just after the
    /// thread that made it was woken.
    pub fn metrics(&self) -> nidus_memory::uffd::MetricsSnapshot {
        self.touched();
        self.handler().metrics()
    }

    /// Waits until something can be seen in the metrics.
    pub fn until(&self, what: impl Fn(&nidus_memory::uffd::MetricsSnapshot) -> bool) {
        let started = std::time::Instant::now();
        while !what(&self.handler().metrics()) {
            assert!(started.elapsed() < PATIENCE, "{:?}", self.handler().metrics());
            std::thread::yield_now();
        }
    }
}

pub fn receive(
    runtime: &Runtime,
    stream: UnixStream,
    size: u64,
) -> Result<Handshake, nidus_memory::uffd::HandshakeError> {
    stream.set_nonblocking(true).unwrap();
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::from_std(stream).unwrap();
        Handshake::receive(stream, size, PATIENCE).await
    })
}

/// Lets huge pages be made as they are needed; the setting before is restored. One test at a time.
pub struct HugePages(String, #[allow(dead_code)] MutexGuard<'static, ()>);

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const OVERCOMMIT: &str = "/proc/sys/vm/nr_overcommit_hugepages";

impl HugePages {
    /// `None`, with a word on why, where that is not allowed.
    pub fn allow(count: usize) -> Option<Self> {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match std::fs::read_to_string(OVERCOMMIT) {
            Ok(before) => before,
            Err(error) => {
                eprintln!("SKIPPED: no huge pages here, {OVERCOMMIT} cannot be read: {error}");
                return None;
            }
        };
        let open = File::options().write(true).open(OVERCOMMIT);
        match open.and_then(|mut file| file.write_all(count.to_string().as_bytes())) {
            Ok(()) => Some(Self(before, turn)),
            Err(error) => {
                eprintln!("SKIPPED: no huge pages here, {OVERCOMMIT} cannot be written: {error}");
                None
            }
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(OVERCOMMIT, self.0.trim());
    }
}
