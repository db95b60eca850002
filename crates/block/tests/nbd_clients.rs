//! The NBD server with clients that others wrote: QEMU's tools.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{path::Path, process::Stdio, sync::Arc};

use nidus_block::{BlockDevice, FileDevice, Overlay, ReadDevice, nbd::NbdServer};
use tempfile::TempDir;
use tokio::process::Command;

const SIZE: u64 = 64 << 20;

struct Fixture {
    dir: TempDir,
    server: NbdServer,
    device: Arc<Overlay>,
}

/// `None`, with the reason printed, where QEMU's tools are not installed.
async fn fixture() -> Option<Fixture> {
    for tool in ["qemu-io", "qemu-img"] {
        let version = Command::new(tool).arg("--version").stdout(Stdio::null()).status().await;
        if version.is_err() {
            eprintln!("skipped: {tool} is not installed (Debian package qemu-utils)");
            return None;
        }
    }
    let dir = TempDir::new().unwrap();
    let mut original = vec![0u8; SIZE as usize];
    for (i, block) in original.chunks_mut(4096).enumerate().filter(|(i, _)| i % 3 > 0) {
        block.fill((i % 255) as u8 + 1);
    }
    std::fs::write(dir.path().join("rootfs"), &original).unwrap();
    let base = Arc::new(FileDevice::open(dir.path().join("rootfs")).await.unwrap());
    let device = Arc::new(Overlay::create(base, dir.path().join("cache")).await.unwrap());
    let server = NbdServer::bind(dir.path().join("nbd.sock"), "root", device.clone()).unwrap();
    Some(Fixture { dir, server, device })
}

impl Fixture {
    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.server.socket_path().display())
    }

    fn qemu_io(&self, commands: &[&str]) -> Command {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", &self.uri("root")]).kill_on_drop(true);
        commands.iter().for_each(|c| {
            command.args(["-c", c]);
        });
        command
    }

    async fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        self.device.read_at(0, &mut bytes).await.unwrap();
        bytes
    }
}

async fn output(command: &mut Command) -> (bool, String) {
    let output = command.output().await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

async fn convert(from: &str, to: &Path) {
    let mut command = Command::new("qemu-img");
    let (ok, text) = output(command.args(["convert", "-f", "raw", "-O", "raw", from]).arg(to)).await;
    assert!(ok, "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_io_finds_what_it_wrote() {
    let Some(fixture) = fixture().await else { return };
    let (ok, text) = output(&mut fixture.qemu_io(&[
        "write -P 0xab 0 64k",
        "write -P 0xcd 1000001 70001",
        "write -f -P 0x11 32M 8M",
        "aio_write -P 0x21 2M 1M",
        "aio_write -P 0x22 3M 1M",
        "aio_write -P 0x23 4097k 4k",
        "aio_flush",
        "write -z 16M 1M",
        "write -z -u 20M 1M",
        "discard 24M 2M",
        "flush",
        "read -P 0xab 0 64k",
        "read -P 0xcd 1000001 70001",
        "read -P 0x11 32M 8M",
        "read -P 0x21 2M 1M",
        "read -P 0x22 3M 1M",
        "read -P 0x23 4097k 4k",
        "read -P 0 16M 1M",
        "read -P 0 20M 1M",
        "read -P 0 24M 2M",
    ]))
    .await;
    assert!(ok && !text.contains("failed") && !text.contains("error"), "{text}");
    let mut expected = std::fs::read(fixture.dir.path().join("rootfs")).unwrap();
    let mut fill = |start: usize, len: usize, byte| expected[start..start + len].fill(byte);
    fill(0, 64 << 10, 0xab);
    fill(1_000_001, 70_001, 0xcd);
    fill(32 << 20, 8 << 20, 0x11);
    fill(2 << 20, 1 << 20, 0x21);
    fill(3 << 20, 1 << 20, 0x22);
    fill(4097 << 10, 4096, 0x23);
    fill(16 << 20, 1 << 20, 0);
    fill(20 << 20, 1 << 20, 0);
    fill(24 << 20, 2 << 20, 0);
    assert!(fixture.contents().await == expected, "the device differs from what qemu-io wrote");
    // A wrong pattern is noticed: the checks above can fail.
    let (ok, text) = output(&mut fixture.qemu_io(&["read -P 0xac 0 64k"])).await;
    assert!(!ok || text.contains("Pattern verification failed"), "{text}");
    fixture.server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_img_copies_the_device_out_and_in_several_at_once() {
    let Some(fixture) = fixture().await else { return };
    fixture.device.write_at(5_000_001, vec![0x77; 3_000_000].into()).await.unwrap();
    let expected = fixture.contents().await;
    let uri = fixture.uri("root");
    let paths: Vec<_> = (0..4).map(|i| fixture.dir.path().join(format!("out{i}"))).collect();
    futures::future::join_all(paths.iter().map(|path| convert(&uri, path))).await;
    for path in &paths {
        assert!(std::fs::read(path).unwrap() == expected, "{} differs", path.display());
    }
    // In again, over something else.
    fixture.device.write_at(0, vec![0x55; SIZE as usize].into()).await.unwrap();
    let mut command = Command::new("qemu-img");
    let (ok, text) =
        output(command.args(["convert", "-n", "-f", "raw", "-O", "raw"]).arg(&paths[0]).arg(&uri)).await;
    assert!(ok, "{text}");
    assert!(fixture.contents().await == expected, "the device differs from the image copied in");
    fixture.server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_export_is_named_as_the_reason() {
    let Some(fixture) = fixture().await else { return };
    let mut command = Command::new("qemu-img");
    let (ok, text) = output(command.args(["info", "-f", "raw", &fixture.uri("nothing")])).await;
    assert!(!ok && text.contains("no export of this name"), "{text}");
    let mut command = Command::new("qemu-img");
    let (ok, text) = output(command.args(["info", "-f", "raw", &fixture.uri("root")])).await;
    assert!(ok && text.contains("64 MiB"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_killed_in_mid_request_harms_nobody() {
    let Some(fixture) = fixture().await else { return };
    for round in 0..8u8 {
        let commands: Vec<String> =
            (0..200).map(|i| format!("aio_write -P {:#x} {}M 1M", round + 1, i % 32)).collect();
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        let mut victim =
            fixture.qemu_io(&commands).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // Once something of this round has arrived, the rest is on its way.
        let mut byte = [0];
        while byte[0] != round + 1 {
            assert!(victim.try_wait().unwrap().is_none() || byte[0] == round + 1);
            fixture.device.read_at(0, &mut byte).await.unwrap();
            tokio::task::yield_now().await;
        }
        // SIGKILL.
        victim.kill().await.unwrap();
        let at = 40 + u64::from(round);
        let write = format!("write -P 0x99 {at}M 1M");
        let read = format!("read -P 0x99 {at}M 1M");
        let (ok, text) = output(&mut fixture.qemu_io(&[&write, &read])).await;
        assert!(ok && !text.contains("failed"), "{text}");
    }
    fixture.server.shutdown().await;
}
