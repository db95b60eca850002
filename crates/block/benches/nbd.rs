//! Throughput and latency of the NBD server with an overlay behind it.
//!
//! In the same run, on files of the same size in the same directory: the overlay through our
//! server, a plain file through `qemu-nbd` (driven by the same client over the same kind of
//! socket), and `pread`/`pwrite` on a plain file. Rounds alternate, so that a slow moment of the
//! machine hits all three; the figures are medians. All data is in the page cache.
//!
//! `cargo bench --profile release -p nidus-block --bench nbd -- [--quick] [--json FILE]`

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

#[path = "../tests/client/mod.rs"]
mod client;

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use client::{Client, connect};
use nidus_block::{BlockDevice, FileDevice, Overlay, nbd::NbdServer, nbd::wire::command};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

const SIZE: u64 = 256 << 20;

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    write: bool,
    random: bool,
    len: u32,
    depth: usize,
    count: u64,
}

const CASES: [Case; 8] = [
    Case {
        name: "4 KiB random read, 1 in flight",
        write: false,
        random: true,
        len: 4096,
        depth: 1,
        count: 20_000,
    },
    Case {
        name: "4 KiB random read, 16 in flight",
        write: false,
        random: true,
        len: 4096,
        depth: 16,
        count: 60_000,
    },
    Case {
        name: "4 KiB random write, 1 in flight",
        write: true,
        random: true,
        len: 4096,
        depth: 1,
        count: 10_000,
    },
    Case {
        name: "4 KiB random write, 16 in flight",
        write: true,
        random: true,
        len: 4096,
        depth: 16,
        count: 30_000,
    },
    Case {
        name: "1 MiB sequential read, 1 in flight",
        write: false,
        random: false,
        len: 1 << 20,
        depth: 1,
        count: 256,
    },
    Case {
        name: "1 MiB sequential read, 4 in flight",
        write: false,
        random: false,
        len: 1 << 20,
        depth: 4,
        count: 256,
    },
    Case {
        name: "1 MiB sequential write, 1 in flight",
        write: true,
        random: false,
        len: 1 << 20,
        depth: 1,
        count: 256,
    },
    Case {
        name: "1 MiB sequential write, 4 in flight",
        write: true,
        random: false,
        len: 1 << 20,
        depth: 4,
        count: 256,
    },
];

impl Case {
    fn offsets(&self, count: u64) -> Vec<u64> {
        let mut rng = SmallRng::seed_from_u64(7);
        let places = SIZE / u64::from(self.len);
        (0..count)
            .map(|i| if self.random { rng.random_range(0..places) } else { i % places } * u64::from(self.len))
            .collect()
    }
}

/// Requests per second through a socket.
async fn over_nbd(socket: &Path, case: &Case, offsets: &[u64]) -> f64 {
    let mut client = Client::go(connect(socket).await, "root", false).await;
    let data = vec![0x5a; case.len as usize];
    let (mut sent, mut received) = (0, 0);
    let start = Instant::now();
    while received < offsets.len() {
        while sent < offsets.len() && sent - received < case.depth {
            let (cookie, offset) = (sent as u64, offsets[sent]);
            match case.write {
                true => client.send(command::WRITE, 0, cookie, offset, case.len, &data).await,
                false => client.send(command::READ, 0, cookie, offset, case.len, &[]).await,
            }
            sent += 1;
        }
        let (_, answer) = client.receive().await.unwrap();
        assert_eq!(answer.errno(), 0);
        received += 1;
    }
    offsets.len() as f64 / start.elapsed().as_secs_f64()
}

/// Requests per second by system calls on the file, one at a time.
fn raw(file: &File, case: &Case, offsets: &[u64]) -> f64 {
    let mut data = vec![0x5a; case.len as usize];
    let start = Instant::now();
    for offset in offsets {
        match case.write {
            true => file.write_all_at(&data, *offset).unwrap(),
            false => file.read_exact_at(&mut data, *offset).unwrap(),
        }
    }
    offsets.len() as f64 / start.elapsed().as_secs_f64()
}

/// `qemu-nbd` on a file; killed when dropped.
struct QemuNbd(Child);

impl QemuNbd {
    fn start(file: &Path, socket: &Path) -> Option<Self> {
        let child = Command::new("qemu-nbd")
            .args(["-t", "-f", "raw", "-x", "root", "--cache=writeback", "--aio=threads", "-k"])
            .args([socket, file])
            .stderr(Stdio::inherit())
            .spawn()
            .ok()?;
        let started = Instant::now();
        while !socket.exists() {
            assert!(started.elapsed() < Duration::from_secs(10), "qemu-nbd does not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(Self(child))
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn filled(path: PathBuf) -> PathBuf {
    let file = File::create(&path).unwrap();
    (0..SIZE >> 20).for_each(|i| file.write_all_at(&vec![i as u8; 1 << 20], i << 20).unwrap());
    file.sync_all().unwrap();
    path
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let quick = args.iter().any(|a| a == "--quick");
    let json = args.iter().position(|a| a == "--json").map(|i| PathBuf::from(&args[i + 1]));
    let (rounds, shorter) = if quick { (3, 8) } else { (7, 1) };

    let dir = tempfile::TempDir::new().unwrap();
    let (ours, qemus) = (dir.path().join("ours.sock"), dir.path().join("qemu.sock"));
    let serving = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let driving = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let template = filled(dir.path().join("template"));
    let (server, device) = serving.block_on(async {
        let base = Arc::new(FileDevice::open(&template).await.unwrap());
        let device = Arc::new(Overlay::create(base, dir.path().join("cache")).await.unwrap());
        // Half of the blocks come from the template, half from the cache, in runs of 1 MiB.
        for i in (0..SIZE >> 20).step_by(2) {
            device.write_at(i << 20, vec![1; 1 << 20].into()).await.unwrap();
        }
        device.flush().await.unwrap();
        (NbdServer::bind(&ours, "root", device.clone()).unwrap(), device)
    });
    let raw_file = File::options().read(true).write(true).open(filled(dir.path().join("raw"))).unwrap();
    let qemu = QemuNbd::start(&filled(dir.path().join("qemu")), &qemus);
    if qemu.is_none() {
        println!("qemu-nbd is not installed (Debian package qemu-utils): its column is empty");
    }

    println!(
        "{:<37}{:>12}{:>12}{:>12}{:>12}{:>10}",
        "requests per second, median", "nidus", "qemu-nbd", "raw", "x qemu-nbd", "x raw"
    );
    let mut report = Vec::new();
    for case in &CASES {
        let offsets = case.offsets((case.count / shorter).max(32));
        let mut figures: [Vec<f64>; 3] = Default::default();
        for round in 0..=rounds {
            let of_qemu =
                if qemu.is_some() { driving.block_on(over_nbd(&qemus, case, &offsets)) } else { f64::NAN };
            let of_round =
                [driving.block_on(over_nbd(&ours, case, &offsets)), of_qemu, raw(&raw_file, case, &offsets)];
            // The first round warms up.
            if round > 0 {
                figures.iter_mut().zip(of_round).for_each(|(all, one)| all.push(one));
            }
        }
        let [nidus, qemu_nbd, raw] = figures.map(median);
        println!(
            "{:<37}{nidus:>12.0}{qemu_nbd:>12.0}{raw:>12.0}{:>12.2}{:>10.3}",
            case.name,
            nidus / qemu_nbd,
            nidus / raw
        );
        report.push(format!(
            "{{\"case\":\"{}\",\"nidus\":{nidus:.0},\"qemu_nbd\":{},\"raw\":{raw:.0}}}",
            case.name,
            if qemu_nbd.is_nan() { "null".to_owned() } else { format!("{qemu_nbd:.0}") },
        ));
    }
    if let Some(path) = json {
        std::fs::write(path, format!("[{}]\n", report.join(","))).unwrap();
    }
    serving.block_on(server.shutdown());
    drop(device);
}
