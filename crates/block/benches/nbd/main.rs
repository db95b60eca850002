//! Throughput of the NBD server with an overlay behind it, beside `qemu-nbd` and `nbdkit`.
//!
//! In the same run, with the same client over the same kind of socket, on images with the same
//! contents in the same directory: the overlay through our server, a plain file through the two others,
//! and `pread`/`pwrite` on a plain file as the floor. Reads find half of the overlay's blocks in the
//! template and half in the cache; writes find all in the cache, so that nobody's file system has to
//! find room for them. Rounds alternate in changing order, so that a slow moment of the machine hits
//! all. Two ratios are told: the median of the rounds' ratios, and that of the best rounds, which is
//! what is left when other work on the machine does not decide. All data is in the page cache.
//!
//! `cargo bench --profile release -p nidus-block --bench nbd -- [--quick] [--only TEXT] [--rounds N]
//! [--json FILE]`

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod cases;
mod client;
mod servers;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cases::{CASES, Case, raw};
use nidus_block::{BlockDevice, FileDevice, Overlay, nbd::NbdServer};
use servers::{Baseline, nbdkit, qemu_nbd};

/// The images' size.
const SIZE: u64 = 256 << 20;
const MIB: u64 = 1 << 20;

fn image(path: PathBuf) -> PathBuf {
    use std::os::unix::fs::FileExt;
    let file = File::create(&path).unwrap();
    (0..SIZE / MIB).for_each(|i| file.write_all_at(&vec![i as u8; MIB as usize], i * MIB).unwrap());
    file.sync_all().unwrap();
    path
}

/// Our server on `socket`, and what keeps it alive.
async fn ours(dir: &Path, socket: &Path) -> (NbdServer, Arc<Overlay>) {
    let base = Arc::new(FileDevice::open(image(dir.join("template"))).await.unwrap());
    let device = Arc::new(Overlay::create(base, dir.join("cache")).await.unwrap());
    copy_up(&device, 0).await;
    (NbdServer::bind(socket, "root", device.clone()).unwrap(), device)
}

/// Brings every other MiB into the cache.
async fn copy_up(device: &Overlay, first: u64) {
    for i in (first..SIZE / MIB).step_by(2) {
        device.write_at(i * MIB, vec![i as u8; MIB as usize].into()).await.unwrap();
    }
    device.flush().await.unwrap();
}

fn best(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::NAN, f64::max)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Operations per second of each, in the order ours, qemu-nbd, nbdkit, raw; a list a round.
fn measure(case: &Case, sockets: &[PathBuf], file: &File, rounds: usize, shorter: u64) -> Vec<Vec<f64>> {
    let offsets = case.offsets((case.count / shorter).max(32));
    let mut all = Vec::new();
    // The first round warms up.
    for round in 0..=rounds {
        let mut figures = vec![f64::NAN; sockets.len() + 1];
        for i in 0..figures.len() {
            let turn = (i + round) % figures.len();
            figures[turn] = match sockets.get(turn) {
                Some(socket) if socket.exists() => client::run(socket, case, &offsets),
                Some(_) => f64::NAN,
                None => raw(file, case, &offsets),
            };
        }
        all.push(figures);
    }
    all.split_off(1)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().position(|a| a == name).map(|i| args[i + 1].clone());
    let quick = args.iter().any(|a| a == "--quick");
    let rounds = value("--rounds").map_or(if quick { 3 } else { 21 }, |n| n.parse().unwrap());
    let only = value("--only").unwrap_or_default();

    let dir = tempfile::TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    let sockets = ["ours.sock", "qemu.sock", "nbdkit.sock"].map(path);
    let serving = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (server, device) = serving.block_on(ours(dir.path(), &sockets[0]));
    let baselines: [Option<Baseline>; 2] =
        [qemu_nbd(&image(path("qemu")), &sockets[1]), nbdkit(&image(path("nbdkit")), &sockets[2])];
    let file = File::options().read(true).write(true).open(image(path("raw"))).unwrap();

    println!(
        "{:<36}{:>9}{:>9}{:>9}{:>9} | x qemu-nbd: median, best | x nbdkit: median, best",
        "per second, median", "nidus", "qemu-nbd", "nbdkit", "raw"
    );
    let mut report = Vec::new();
    let mut whole = false;
    for case in CASES.iter().filter(|c| c.name.contains(&only)) {
        if case.write && !whole {
            serving.block_on(copy_up(&device, 1));
            whole = true;
        }
        let rounds = measure(case, &sockets, &file, rounds, if quick { 8 } else { 1 });
        let figure = |i: usize| median(rounds.iter().map(|r| r[i]).collect());
        let ratio = |i: usize| median(rounds.iter().map(|r| r[0] / r[i]).collect());
        let peak = |i: usize| best(rounds.iter().map(|r| r[0])) / best(rounds.iter().map(|r| r[i]));
        println!(
            "{:<36}{:>9.0}{:>9.0}{:>9.0}{:>9.0} | {:>18.2}{:>6.2} | {:>16.2}{:>6.2}",
            case.name,
            figure(0),
            figure(1),
            figure(2),
            figure(3),
            ratio(1),
            peak(1),
            ratio(2),
            peak(2)
        );
        let number = |value: f64| if value.is_nan() { "null".to_owned() } else { format!("{value:.3}") };
        report.push(format!(
            "{{\"case\":\"{}\",\"nidus\":{},\"qemu_nbd\":{},\"nbdkit\":{},\"raw\":{},\"per_qemu_nbd\":{},\
             \"per_nbdkit\":{},\"best_per_qemu_nbd\":{},\"best_per_nbdkit\":{}}}",
            case.name,
            number(figure(0)),
            number(figure(1)),
            number(figure(2)),
            number(figure(3)),
            number(ratio(1)),
            number(ratio(2)),
            number(peak(1)),
            number(peak(2))
        ));
    }
    if let Some(path) = value("--json") {
        std::fs::write(path, format!("[{}]\n", report.join(","))).unwrap();
    }
    drop(baselines);
    serving.block_on(server.shutdown());
    drop(device);
}
