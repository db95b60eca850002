//! The ways that a request can take through the server: on the connection's thread, on the runtime, or
//! first the one and then the other.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod client;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use client::{Answer, Client, connect};
use nidus_block::nbd::{NbdServer, wire::command, wire::command_flag};
use nidus_block::{BlockDevice, BlockError, FileDevice, Overlay, ReadDevice, Zeroing};
use tempfile::TempDir;

const SIZE: usize = 8 << 20;
/// Reading there panics on the runtime.
const PANIC_AT: u64 = 4096;

/// What an inline write does, by how many there were before. Where the machine is slow, the server may
/// stop writing inline in the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inline {
    Taken,
    Refused,
    NoSpace,
}

fn no_space() -> BlockError {
    BlockError::NoSpace { action: "write", path: PathBuf::from("x") }
}

/// An overlay with moods.
struct Moody {
    inner: Overlay,
    moods: Vec<Inline>,
    inline_writes: AtomicUsize,
    other_writes: AtomicUsize,
}

#[async_trait]
impl ReadDevice for Moody {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> Result<bool, BlockError> {
        if offset == PANIC_AT { Ok(false) } else { self.inner.try_read_at(offset, buf) }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        assert_ne!(offset, PANIC_AT, "this read is meant to panic");
        self.inner.read_at(offset, buf).await
    }
}

#[async_trait]
impl BlockDevice for Moody {
    fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<bool, BlockError> {
        let number = self.inline_writes.fetch_add(1, Ordering::SeqCst);
        match self.moods.get(number).unwrap_or(&Inline::Taken) {
            Inline::Taken => self.inner.try_write_at(offset, data),
            Inline::Refused => Ok(false),
            Inline::NoSpace => Err(no_space()),
        }
    }

    async fn write_at(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        self.other_writes.fetch_add(1, Ordering::SeqCst);
        if self.moods.contains(&Inline::NoSpace) {
            return Err(no_space());
        }
        self.inner.write_at(offset, data).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: Zeroing) -> Result<(), BlockError> {
        self.inner.write_zeroes(offset, len, how).await
    }

    async fn flush(&self) -> Result<(), BlockError> {
        self.inner.flush().await
    }
}

struct Fixture {
    _dir: TempDir,
    server: NbdServer,
    device: Arc<Moody>,
    model: Vec<u8>,
}

async fn fixture(moods: &[Inline]) -> Fixture {
    let dir = TempDir::new().unwrap();
    let model: Vec<u8> = (0..SIZE).map(|i| (i % 241) as u8).collect();
    std::fs::write(dir.path().join("base"), &model).unwrap();
    let base = Arc::new(FileDevice::open(dir.path().join("base")).await.unwrap());
    let inner = Overlay::create(base, dir.path().join("cache")).await.unwrap();
    let (inline_writes, other_writes) = Default::default();
    let device = Arc::new(Moody { inner, moods: moods.to_vec(), inline_writes, other_writes });
    let server = NbdServer::bind(dir.path().join("nbd.sock"), "root", device.clone()).unwrap();
    Fixture { _dir: dir, server, device, model }
}

impl Fixture {
    async fn client(&self) -> Client {
        Client::go(connect(self.server.socket_path()).await, "root", false).await
    }
}

fn data(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 239) as u8 ^ 0x80).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_is_whole_whichever_way_it_takes() {
    use Inline::{Refused, Taken};
    for moods in [&[][..], &[Refused], &[Taken, Refused], &[Taken, Taken, Taken, Refused]] {
        for (offset, len) in [(0, 4096), (4096, 3 << 20), (1000, 2 << 20), (8192, (2 << 20) + 777), (77, 5)] {
            let mut fixture = fixture(moods).await;
            let mut client = fixture.client().await;
            let data = data(len);
            // The next request follows at once: the server must know where the payload ends.
            client.send(command::WRITE, 0, 1, offset as u64, len as u32, &data).await;
            client.send(command::READ, 0, 2, 6 << 20, 4096, &[]).await;
            let mut answers = vec![client.receive().await.unwrap(), client.receive().await.unwrap()];
            answers.sort_by_key(|(cookie, _)| *cookie);
            let other = fixture.model[6 << 20..(6 << 20) + 4096].to_vec();
            assert_eq!(answers, [(1, Answer::Done(vec![])), (2, Answer::Done(other))]);
            fixture.model[offset..offset + len].copy_from_slice(&data);
            let read = client.read(0, SIZE as u32).await.data();
            assert!(read == fixture.model, "{moods:?}: {len} bytes at {offset} went wrong");
            fixture.server.shutdown().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whole_blocks_are_written_by_the_connections_thread_and_parts_are_not() {
    let fixture = fixture(&[]).await;
    let device = &fixture.device;
    let counts = || [&device.inline_writes, &device.other_writes].map(|n| n.load(Ordering::SeqCst));
    // Each by a connection of its own, whose first write is never held up.
    assert_eq!(fixture.client().await.write(8192, &data(4096)).await.errno(), 0);
    assert_eq!(counts(), [1, 0]);
    // The first block is the overlay's already.
    assert_eq!(fixture.client().await.write(8192 + 5, &data(10)).await.errno(), 0);
    assert_eq!(counts(), [2, 0]);
    assert_eq!(fixture.client().await.write((3 << 20) + 5, &data(10)).await.errno(), 0);
    assert_eq!(counts(), [3, 1]);
    // Durable writes are answered after a flush, which waits.
    let mut client = fixture.client().await;
    let written = client.call(command::WRITE, command_flag::FUA, 0, 4096, &data(4096)).await;
    assert_eq!(written.errno(), 0);
    assert_eq!(counts(), [3, 2]);
    drop(client);
    fixture.server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_fails_in_its_middle_is_an_error_and_the_connection_goes_on() {
    for moods in [&[Inline::NoSpace][..], &[Inline::Taken, Inline::Taken, Inline::NoSpace]] {
        for len in [4096, 2 << 20] {
            let fixture = fixture(moods).await;
            let mut client = fixture.client().await;
            let fails = moods.len() == 1 || len > 4096;
            let answer = client.write(0, &data(len)).await;
            assert_eq!(answer.errno(), if fails { 28 } else { 0 }, "{moods:?} {len}");
            let at = 5 << 20;
            assert_eq!(client.read(at, 4096).await.data(), fixture.model[at as usize..at as usize + 4096]);
            fixture.server.shutdown().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_panics_ends_its_connection_and_no_other() {
    let fixture = fixture(&[]).await;
    let (mut victim, mut other) = (fixture.client().await, fixture.client().await);
    victim.send(command::READ, 0, 1, PANIC_AT, 4096, &[]).await;
    assert!(victim.receive().await.is_err());
    assert_eq!(other.read(0, 4096).await.data(), fixture.model[..4096]);
    fixture.server.shutdown().await;
    assert_eq!(Arc::strong_count(&fixture.device), 1);
}
