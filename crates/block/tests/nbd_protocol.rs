//! The NBD server against the specification, by a client that is free to misbehave.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod client;

use std::{
    os::unix::fs::{MetadataExt, PermissionsExt},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use client::{Answer, Client, connect, info_request};
use nidus_block::{
    BlockDevice, BlockError, FileDevice, Overlay, ReadDevice, Zeroing,
    nbd::{
        Export, HandshakeError, NbdServer, SessionError, SocketAccess, serve,
        wire::{Errno, MAX_PAYLOAD, command, command_flag, option, option_reply},
    },
};
use proptest::prelude::*;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::Notify,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const SIZE: usize = 4 << 20;
/// A limit for what must happen at all, far above what it takes.
const SOON: Duration = Duration::from_secs(30);

struct Fixture {
    dir: TempDir,
    server: NbdServer,
    original: Vec<u8>,
    device: Arc<Overlay>,
}

async fn overlay(dir: &TempDir) -> (Arc<Overlay>, Vec<u8>) {
    let original: Vec<u8> = (0..SIZE).map(|i| (i % 253) as u8).collect();
    std::fs::write(dir.path().join("rootfs"), &original).unwrap();
    let base = Arc::new(FileDevice::open(dir.path().join("rootfs")).await.unwrap());
    (Arc::new(Overlay::create(base, dir.path().join("cache")).await.unwrap()), original)
}

async fn fixture() -> Fixture {
    let dir = TempDir::new().unwrap();
    let (device, original) = overlay(&dir).await;
    let server = NbdServer::bind(dir.path().join("nbd.sock"), "root", device.clone()).unwrap();
    Fixture { dir, server, original, device }
}

impl Fixture {
    async fn client(&self, structured: bool) -> Client {
        Client::go(connect(self.server.socket_path()).await, "root", structured).await
    }
}

#[tokio::test]
async fn reads_and_writes_with_both_kinds_of_replies() {
    let fixture = fixture().await;
    let mut model = fixture.original.clone();
    for structured in [false, true] {
        let mut client = fixture.client(structured).await;
        assert_eq!(client.size, SIZE as u64);
        assert_eq!(client.flags, 0b1_0110_1101 | if structured { 1 << 7 } else { 0 });
        let seed = if structured { 3 } else { 5 };
        for (offset, len) in
            [(0, 4096), (4096 * 3 + 7, 1), (100_000, 70_001), (SIZE - 9, 9), (1 << 20, 2 << 20)]
        {
            let data: Vec<u8> = (0..len).map(|i| (i * seed) as u8).collect();
            assert_eq!(client.write(offset as u64, &data).await, Answer::Done(vec![]));
            model[offset..offset + len].copy_from_slice(&data);
        }
        assert_eq!(client.call(command::TRIM, 0, 8192, 12288, &[]).await.errno(), 0);
        model[8192..8192 + 12288].fill(0);
        for (flags, at) in [(0, 50_000), (command_flag::NO_HOLE, 60_000), (command_flag::FUA, 70_000)] {
            assert_eq!(client.call(command::WRITE_ZEROES, flags, at, 5000, &[]).await.errno(), 0);
            model[at as usize..at as usize + 5000].fill(0);
        }
        assert_eq!(client.call(command::WRITE, command_flag::FUA, 77, 2, b"ab").await.errno(), 0);
        model[77..79].copy_from_slice(b"ab");
        assert_eq!(client.call(command::FLUSH, 0, 0, 0, &[]).await.errno(), 0);
        assert_eq!(client.call(command::READ, 0, 5, 0, &[]).await, Answer::Done(vec![]));
        assert_eq!(client.read(0, SIZE as u32).await.data(), model);
        assert_eq!(client.read(12_345, 6_789).await.data(), &model[12_345..12_345 + 6_789]);
    }
    assert_eq!(std::fs::read(fixture.dir.path().join("rootfs")).unwrap(), fixture.original);
    fixture.server.shutdown().await;
    assert!(!fixture.dir.path().join("nbd.sock").exists());
}

#[tokio::test]
async fn many_requests_in_flight_get_their_own_answers() {
    // More than the server takes at once: it must hold back, not fail.
    const COUNT: u64 = 500;
    let fixture = fixture().await;
    for structured in [false, true] {
        let mut client = fixture.client(structured).await;
        // Reads of even blocks and writes of odd ones; few answers are taken before all are sent.
        for cookie in 0..COUNT {
            let offset = cookie * 4096;
            match cookie % 2 {
                0 => client.send(command::READ, 0, cookie, offset, 4096, &[]).await,
                _ => client.send(command::WRITE, 0, cookie, offset, 4096, &[cookie as u8; 4096]).await,
            }
            // The socket's buffers hold about 50 requests.
            if cookie >= 40 {
                check(&fixture, client.receive().await.unwrap());
            }
        }
        let mut seen = 0;
        while seen < 40 {
            check(&fixture, client.receive().await.unwrap());
            seen += 1;
        }
        for cookie in (1..COUNT).step_by(2) {
            assert_eq!(client.read(cookie * 4096, 4096).await.data(), [cookie as u8; 4096]);
        }
    }
    fn check(fixture: &Fixture, (cookie, answer): (u64, Answer)) {
        let at = (cookie * 4096) as usize;
        match cookie % 2 {
            0 => assert_eq!(answer.data(), &fixture.original[at..at + 4096]),
            _ => assert_eq!(answer, Answer::Done(vec![])),
        }
    }
}

#[tokio::test]
async fn refused_requests_say_why_and_the_connection_goes_on() {
    let fixture = fixture().await;
    let end = SIZE as u64;
    for structured in [false, true] {
        let mut client = fixture.client(structured).await;
        let too_long = if structured { Errno::Overflow } else { Errno::Invalid };
        for (command, flags, offset, len, errno) in [
            (command::READ, 0, end, 1, Errno::Invalid),
            (command::READ, 0, u64::MAX, 4096, Errno::Invalid),
            (command::READ, 0, 0, MAX_PAYLOAD + 1, too_long),
            (command::TRIM, 0, end - 1, 2, Errno::Invalid),
            (command::WRITE, 0, end - 2048, 4096, Errno::NoSpace),
            (command::WRITE_ZEROES, 0, 0, u32::MAX, Errno::NoSpace),
            (command::WRITE_ZEROES, 1 << 4, 0, 4096, Errno::Invalid),
            (command::READ, command_flag::NO_HOLE, 0, 4096, Errno::Invalid),
            (7, 0, 0, 4096, Errno::Invalid),
            (999, 0, 0, 0, Errno::Invalid),
        ] {
            let data = vec![1; if command == command::WRITE { len as usize } else { 0 }];
            let answer = client.call(command, flags, offset, len, &data).await;
            let Answer::Error(got, text) = answer else { panic!("{command} was accepted") };
            assert_eq!(got, errno as u32, "command {command}");
            assert_eq!(text.is_empty(), !structured);
        }
        let dont_fragment = client.call(command::READ, command_flag::DF, 0, 10, &[]).await;
        assert_eq!(dont_fragment.errno() == 0, structured);
        assert_eq!(client.read(0, SIZE as u32).await.data(), fixture.original);
    }
    assert_eq!(fixture.device.dirty().count(), 0);
}

#[tokio::test]
async fn haggling() {
    let fixture = fixture().await;
    let mut client = Client::greet(connect(fixture.server.socket_path()).await, 3).await;
    let kinds = |replies: Vec<(u32, Vec<u8>)>| replies.into_iter().map(|(kind, _)| kind).collect::<Vec<_>>();
    let listed = client.option(option::LIST, &[]).await;
    assert_eq!(listed, [(option_reply::SERVER, b"\0\0\0\x04root".to_vec()), (option_reply::ACK, vec![])]);
    assert_eq!(kinds(client.option(option::LIST, b"x").await), [option_reply::ERR_INVALID]);
    assert_eq!(kinds(client.option(option::STRUCTURED_REPLY, b"x").await), [option_reply::ERR_INVALID]);
    assert_eq!(kinds(client.option(option::GO, &info_request("other")).await), [option_reply::ERR_UNKNOWN]);
    assert_eq!(kinds(client.option(option::GO, b"\0\0\0\xffroot").await), [option_reply::ERR_INVALID]);
    assert_eq!(kinds(client.option(option::GO, &[]).await), [option_reply::ERR_INVALID]);
    for unknown in [4, 5, 9, 10, 11, 12345] {
        assert_eq!(kinds(client.option(unknown, b"some data").await), [option_reply::ERR_UNSUP]);
    }
    assert_eq!(kinds(client.option(option::LIST, &[0; 20_000]).await), [option_reply::ERR_TOO_BIG]);
    let info = client.option(option::INFO, &info_request("root")).await;
    assert_eq!(info.len(), 3);
    assert_eq!(info[1].1, [0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0], "block sizes 1, 4096, 32 MiB");
    // After all this the client is still welcome, also by the empty name.
    assert_eq!(client.option(option::GO, &info_request("")).await.len(), 3);
    assert_eq!(client.read(0, 512).await.data(), &fixture.original[..512]);

    let mut client = Client::greet(connect(fixture.server.socket_path()).await, 3).await;
    assert_eq!(client.option(option::ABORT, b"bye").await, [(option_reply::ACK, vec![])]);
    assert_eq!(client.reader.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn the_old_way_in() {
    let fixture = fixture().await;
    for (flags, zeros) in [(1, 124), (3, 0), (0, 124)] {
        let mut client = Client::greet(connect(fixture.server.socket_path()).await, flags).await;
        client.send_option(option::EXPORT_NAME, b"root").await;
        assert_eq!(client.reader.read_u64().await.unwrap(), SIZE as u64);
        assert_eq!(client.reader.read_u16().await.unwrap(), 0b1_0110_1101);
        let mut padding = vec![1; zeros];
        client.reader.read_exact(&mut padding).await.unwrap();
        assert_eq!(padding, vec![0; zeros]);
        assert_eq!(client.read(7, 9).await.data(), &fixture.original[7..16]);
    }
    let mut client = Client::greet(connect(fixture.server.socket_path()).await, 3).await;
    client.send_option(option::EXPORT_NAME, b"other").await;
    assert_eq!(client.reader.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn who_breaks_the_protocol_is_sent_away_alone() {
    let fixture = fixture().await;
    let mut good = fixture.client(true).await;
    let gone = async |client: &mut Client| {
        let mut rest = Vec::new();
        // Reset or closed, either way at once.
        let _ = timeout(SOON, client.reader.read_to_end(&mut rest)).await.unwrap();
    };
    let mut client = Client::greet(connect(fixture.server.socket_path()).await, 0xff).await;
    gone(&mut client).await;
    let mut client = Client::greet(connect(fixture.server.socket_path()).await, 3).await;
    client.writer.write_all(&[0x55; 16]).await.unwrap();
    gone(&mut client).await;
    let mut client = Client::greet(connect(fixture.server.socket_path()).await, 3).await;
    client.writer.write_all(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff").await.unwrap();
    gone(&mut client).await;
    let mut client = fixture.client(true).await;
    client.send(command::WRITE, 0, 1, 0, u32::MAX, &[]).await;
    gone(&mut client).await;
    let mut client = fixture.client(true).await;
    client.writer.write_all(&[0; 28]).await.unwrap();
    gone(&mut client).await;
    // What was asked before the nonsense is still answered.
    let mut client = fixture.client(true).await;
    client.send(command::READ, 0, 9, 0, 100, &[]).await;
    client.writer.write_all(&[0; 28]).await.unwrap();
    assert_eq!(client.receive().await.unwrap(), (9, Answer::Done(fixture.original[..100].to_vec())));
    gone(&mut client).await;
    let mut client = fixture.client(true).await;
    client.send(command::READ, 0, 9, 0, 100, &[]).await;
    client.send(command::DISC, 0, 0, 0, 0, &[]).await;
    assert_eq!(client.receive().await.unwrap().1.data().len(), 100);
    gone(&mut client).await;
    assert_eq!(good.read(0, 100).await.data(), &fixture.original[..100]);
    assert_eq!(fixture.device.dirty().count(), 0);
}

/// A device whose writes wait until they are let go, and whose other operations fail in their ways.
#[derive(Default)]
struct Awkward {
    started: Notify,
    go: Notify,
}

#[async_trait]
impl ReadDevice for Awkward {
    fn size(&self) -> u64 {
        SIZE as u64
    }
    fn try_read_at(&self, offset: u64, _: &mut [u8]) -> Result<bool, BlockError> {
        match offset {
            0 => Ok(true),
            4096 => Ok(false),
            _ => Err(BlockError::Truncated { path: "/secret/path".into(), offset }),
        }
    }
    async fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), BlockError> {
        Err(BlockError::Io {
            action: "read",
            path: "/secret/path".into(),
            source: std::io::Error::other("x"),
        })
    }
}

#[async_trait]
impl BlockDevice for Awkward {
    async fn write_at(&self, _: u64, _: Bytes) -> Result<(), BlockError> {
        self.started.notify_one();
        self.go.notified().await;
        Ok(())
    }
    async fn write_zeroes(&self, _: u64, _: u64, _: Zeroing) -> Result<(), BlockError> {
        Err(BlockError::NoSpace { action: "zero", path: "/secret/path".into() })
    }
    async fn flush(&self) -> Result<(), BlockError> {
        Err(BlockError::Shutdown)
    }
}

#[tokio::test]
async fn device_errors_are_told_by_kind_and_slow_requests_are_overtaken() {
    let dir = TempDir::new().unwrap();
    let device = Arc::new(Awkward::default());
    let server = NbdServer::bind(dir.path().join("s"), "root", device.clone()).unwrap();
    let mut client = Client::go(connect(server.socket_path()).await, "root", true).await;
    client.send(command::WRITE, 0, 1, 0, 1, b"x").await;
    device.started.notified().await;
    for (cookie, command, offset, errno) in [
        (2, command::READ, 0, 0),
        (3, command::READ, 4096, Errno::Io as u32),
        (4, command::READ, 8192, Errno::Io as u32),
        (5, command::TRIM, 0, Errno::NoSpace as u32),
        (6, command::FLUSH, 0, Errno::Shutdown as u32),
    ] {
        client.send(command, 0, cookie, offset, 10, &[]).await;
        let (answered, answer) = client.receive().await.unwrap();
        assert_eq!((answered, answer.errno()), (cookie, errno));
        if let Answer::Error(_, text) = answer {
            assert!(!text.is_empty() && !text.contains("secret"), "{text}");
        }
    }
    // Shutdown lets the write finish and be answered, and takes nothing new.
    let shutdown = tokio::spawn(server.shutdown());
    while tokio::net::UnixStream::connect(dir.path().join("s")).await.is_ok() {
        tokio::task::yield_now().await;
    }
    device.go.notify_one();
    assert_eq!(client.receive().await.unwrap(), (1, Answer::Done(vec![])));
    assert!(client.receive().await.is_err());
    timeout(SOON, shutdown).await.unwrap().unwrap();
    assert!(!dir.path().join("s").exists());
}

#[tokio::test]
async fn a_client_that_takes_no_answers_does_not_hold_up_shutdown() {
    let fixture = fixture().await;
    let mut client = fixture.client(true).await;
    for cookie in 0..20 {
        client.send(command::READ, 0, cookie, 0, 2 << 20, &[]).await;
    }
    let idle = Client::greet(connect(fixture.server.socket_path()).await, 3).await;
    timeout(SOON, fixture.server.shutdown()).await.unwrap();
    drop((client, idle));
}

#[tokio::test]
async fn the_socket_is_for_whom_it_was_made_and_goes_with_the_server() {
    let dir = TempDir::new().unwrap();
    let (device, _) = overlay(&dir).await;
    let path = dir.path().join("nbd.sock");
    let root = nix::unistd::geteuid().is_root();
    let owner = root.then_some((65534, 65533));
    let server =
        NbdServer::bind_with(&path, "root", device.clone(), SocketAccess { mode: 0o660, owner }).unwrap();
    let meta = std::fs::metadata(&path).unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o660);
    assert!(!root || (meta.uid(), meta.gid()) == (65534, 65533));
    let error = NbdServer::bind(&path, "root", device.clone()).unwrap_err();
    assert!(error.to_string().contains("cannot listen on the socket"), "{error}");
    assert!(path.exists(), "a failed second server leaves the first's socket");
    let mut client = Client::go(connect(&path).await, "root", true).await;
    drop(server);
    assert!(!path.exists());
    assert!(client.receive().await.is_err());
    let long = dir.path().join("x".repeat(200));
    assert!(NbdServer::bind(&long, "root", device).is_err());
}

async fn serve_bytes(device: Arc<Overlay>, input: Vec<u8>) -> Result<(), SessionError> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut reader, mut writer) = ours.into_split();
    let export = Export::new("root", device);
    let stop = CancellationToken::new();
    let client = async {
        let mut sink = tokio::io::sink();
        let send = async {
            // The server may leave before it has taken everything.
            let _ = writer.write_all(&input).await;
            let _ = writer.shutdown().await;
        };
        // A connection closed with input unread is reset.
        let _ = tokio::join!(send, tokio::io::copy(&mut reader, &mut sink));
    };
    let server = serve(theirs, &export, &stop);
    let (end, ()) = timeout(SOON, async { tokio::join!(server, client) }).await.expect("the session hangs");
    end
}

fn requests() -> impl Strategy<Value = Vec<u8>> {
    let request = (0u16..9, 0u16..8, any::<u64>(), 0u64..SIZE as u64 + 9000, 0u32..20_000, any::<bool>())
        .prop_map(|(command, flags, cookie, offset, len, honest)| {
            let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
            out.extend(flags.to_be_bytes());
            out.extend(command.to_be_bytes());
            out.extend(cookie.to_be_bytes());
            out.extend(offset.to_be_bytes());
            out.extend(len.to_be_bytes());
            if command == 1 && honest {
                out.resize(out.len() + len as usize, 7);
            }
            out
        });
    let piece = prop_oneof![9 => request, 1 => prop::collection::vec(any::<u8>(), 0..60)];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_input_hangs_or_breaks_the_server(
        opening in 0usize..3, noise in prop::collection::vec(any::<u8>(), 0..300), requests in requests(),
    ) {
        let mut input = Vec::new();
        // Nothing valid; valid up to the options; valid up to the requests.
        if opening > 0 {
            input.extend(3u32.to_be_bytes());
            input.extend(b"IHAVEOPT\0\0\0\x08\0\0\0\0");
        }
        if opening > 1 {
            input.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04root\0\0");
            input.extend(requests);
        } else {
            input.extend(noise);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let end = runtime.block_on(async {
            let dir = TempDir::new().unwrap();
            let (device, _) = overlay(&dir).await;
            serve_bytes(device, input).await
        });
        if let Err(SessionError::Handshake(e)) = end {
            prop_assert!(opening < 2 || matches!(e, HandshakeError::Io(_)), "{}", e);
        }
    }
}
