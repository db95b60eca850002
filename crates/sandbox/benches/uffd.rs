//! What a page fault costs that the handler answers, beside what the kernel itself needs for a
//! fault on a private mapping of the same file.
//!
//! All in one run and by the same child process code: the child touches each page of its memory
//! once, in a random order, and tells how long that took. Rounds alternate, so that a slow moment of
//! the machine hits all cases; the figures are medians. The memory file is in the page cache.
//!
//! The kernel's private fault for a *write* does the same work as ours (a page of its own with
//! the file's bytes). Its fault for a *read* maps the page cache without a copy, and fifteen
//! neighbours with it; "one fault" touches one page in sixteen, so that each touch is a fault.
//!
//! The handler serves a published build of a local store as a node serves it: each page is read and its
//! checksum looked at; the kernel checks nothing.
//!
//! `cargo bench --workspace --bench uffd -- [--quick] [--json FILE]`

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

#[allow(dead_code)]
#[path = "../../memory/tests/uffd/child.rs"]
mod child;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use child::{EVENT_REMOVE, MISSING, Vmm};
use nidus_block::{MappedDevice, header::Header};
use nidus_memory::{
    PageSize,
    uffd::{Config, Handler, Handshake, Recorded, Recording},
};
use nidus_sandbox::{AROUND, BuildPages};
use nidus_storage::{Artifact, BuildId, LocalStore};
use tokio::runtime::Runtime;

const SMALL: usize = 4096;
const HUGE: usize = 2 << 20;
const SIZE: usize = 64 << 20;

/// One line of the table.
struct Case {
    name: &'static str,
    kind: Kind,
}

enum Kind {
    /// The kernel: write, and the distance of the pages touched.
    Kernel { write: bool, distance: usize },
    /// The handler.
    Handler { write: bool, readers: usize, threads: usize, around: usize },
    /// Everything is there before it is touched.
    Prefetched,
}

const CASES: [Case; 13] = [
    Case { name: "kernel, read, one fault", kind: Kind::Kernel { write: false, distance: 16 * SMALL } },
    Case { name: "kernel, read, all pages", kind: Kind::Kernel { write: false, distance: SMALL } },
    Case { name: "kernel, write", kind: Kind::Kernel { write: true, distance: SMALL } },
    handler("handler, read", false, 1, 1, 1),
    handler("handler, write", true, 1, 1, 1),
    handler("handler, read, as nodes do", false, 1, 1, AROUND),
    handler("handler, write, as nodes do", true, 1, 1, AROUND),
    handler("handler, read, 16 around", false, 1, 1, 16),
    handler("1 reader, 2 threads touch", false, 1, 2, 1),
    handler("2 readers, 1 thread touches", false, 2, 1, 1),
    handler("2 readers, 2 threads touch", false, 2, 2, 1),
    handler("2 readers, 4 threads touch", false, 2, 4, 1),
    Case { name: "handler, after a prefetch", kind: Kind::Prefetched },
];

const fn handler(name: &'static str, write: bool, readers: usize, threads: usize, around: usize) -> Case {
    Case { name, kind: Kind::Handler { write, readers, threads, around } }
}

/// A published build with a memory file.
async fn build(store: &LocalStore) -> BuildId {
    let build = BuildId::random();
    let memory: Vec<u8> = (0..SIZE).map(|at| (at >> 20) as u8 + 1).collect();
    let staged = store.stage(build).await.unwrap();
    staged.write(Artifact::Memfile, memory).await.unwrap();
    staged.write(Artifact::Metadata, "{}").await.unwrap();
    staged.commit().await.unwrap();
    build
}

/// The build's memory as a node opens it.
async fn open(store: &LocalStore, build: BuildId, page: PageSize) -> Arc<BuildPages> {
    let header = Header::identity(build, SIZE as u64, SMALL as u64).unwrap();
    let store = store.clone();
    let memory =
        MappedDevice::open(header, move |b| store.open_artifact(b, Artifact::Memfile)).await.unwrap();
    Arc::new(BuildPages { memory: Arc::new(memory), page })
}

/// A child whose memory is served.
fn serve(runtime: &Runtime, source: &Arc<BuildPages>, page: usize, config: Config) -> (Vmm, Handler) {
    let mut vmm = Vmm::spawn(&[]);
    let stream = vmm.map(SIZE, page, 1, EVENT_REMOVE, MISSING);
    stream.set_nonblocking(true).unwrap();
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::from_std(stream).unwrap();
        let handshake = Handshake::receive(stream, SIZE as u64, Duration::from_secs(10)).await.unwrap();
        let handler = Handler::start(handshake, source.clone(), config).unwrap();
        (vmm, handler)
    })
}

/// The child ends first, then its handler.
fn end(runtime: &Runtime, vmm: Vmm, handler: Handler) {
    drop(vmm);
    runtime.block_on(handler.stop()).unwrap();
}

/// Microseconds for each page touched.
fn measure(runtime: &Runtime, kind: &Kind, file: &Path, source: &Arc<BuildPages>) -> f64 {
    match *kind {
        Kind::Kernel { write, distance } => {
            let took =
                Vmm::spawn(&[]).call(&format!("private {} {} {distance}", file.display(), u8::from(write)));
            took as f64 / 1e3 / (SIZE / distance) as f64
        }
        Kind::Handler { write, readers, threads, around } => {
            let (mut vmm, handler) =
                serve(runtime, source, SMALL, Config { readers, around, ..Config::default() });
            let took = vmm.call(&format!("time {} {threads}", u8::from(write)));
            end(runtime, vmm, handler);
            took as f64 / 1e3 / (SIZE / SMALL) as f64
        }
        Kind::Prefetched => {
            let (mut vmm, handler) = serve(runtime, source, SMALL, Config::default());
            let pages = (0..(SIZE / SMALL) as u32).map(|page| Recorded { page, write: false });
            let recording = Recording::new(PageSize::Small, SIZE as u64, pages);
            let mut prefetch = handler.prefetch(&recording).unwrap();
            assert!(runtime.block_on(prefetch.finished()));
            let took = vmm.call("time 0 1");
            end(runtime, vmm, handler);
            took as f64 / 1e3 / (SIZE / SMALL) as f64
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Huge pages, if they may be had: microseconds for each.
fn huge(runtime: &Runtime, source: &Arc<BuildPages>, rounds: usize) -> Option<f64> {
    const OVERCOMMIT: &str = "/proc/sys/vm/nr_overcommit_hugepages";
    let before = std::fs::read_to_string(OVERCOMMIT).ok()?;
    std::fs::write(OVERCOMMIT, (SIZE / HUGE).to_string()).ok()?;
    let figures = (0..=rounds).map(|_| {
        let (mut vmm, handler) = serve(runtime, source, HUGE, Config::default());
        let took = vmm.call("time 0 1");
        end(runtime, vmm, handler);
        took as f64 / 1e3 / (SIZE / HUGE) as f64
    });
    let figures: Vec<f64> = figures.skip(1).collect();
    let _ = std::fs::write(OVERCOMMIT, before.trim());
    Some(median(figures))
}

fn main() {
    if let Some(directory) = child::directory() {
        return child::run(&directory);
    }
    let args: Vec<String> = std::env::args().collect();
    let rounds = if args.iter().any(|a| a == "--quick") { 3 } else { 11 };
    let json = args.iter().position(|a| a == "--json").map(|i| PathBuf::from(&args[i + 1]));

    let directory = tempfile::TempDir::new().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let store = LocalStore::open(directory.path()).unwrap();
    let build = runtime.block_on(build(&store));
    let file = store.path(build, Artifact::Memfile);
    let source = |page| runtime.block_on(open(&store, build, page));
    let small = source(PageSize::Small);
    let mut figures: Vec<Vec<f64>> = CASES.iter().map(|_| Vec::new()).collect();
    for round in 0..=rounds {
        for (case, figures) in CASES.iter().zip(&mut figures) {
            let figure = measure(&runtime, &case.kind, &file, &small);
            // The first round warms up.
            if round > 0 {
                figures.push(figure);
            }
        }
    }
    let medians: Vec<f64> = figures.into_iter().map(median).collect();
    let (one_read, write) = (medians[0], medians[2]);
    println!(
        "{:<36}{:>10}{:>11}{:>16}{:>15}",
        "4 KiB pages, median", "us/page", "pages/s", "x kernel write", "x kernel read"
    );
    let mut report = Vec::new();
    for (case, us) in CASES.iter().zip(&medians) {
        let (per_second, by_write, by_read) = (1e6 / us, us / write, us / one_read);
        println!("{:<36}{us:>10.2}{per_second:>11.0}{by_write:>16.2}{by_read:>15.2}", case.name);
        report.push(format!("{{\"case\":\"{}\",\"us_per_page\":{us:.3}}}", case.name));
    }
    match huge(&runtime, &source(PageSize::Huge), rounds) {
        Some(us) => {
            let for_small = us / (HUGE / SMALL) as f64;
            println!(
                "{:<36}{us:>10.0}{:>11.0}   ({for_small:.2} us for each 4 KiB)",
                "handler, read, 2 MiB pages",
                1e6 / us
            );
            report.push(format!("{{\"case\":\"handler, read, 2 MiB pages\",\"us_per_page\":{us:.1}}}"));
        }
        None => println!("2 MiB pages: not measured, /proc/sys/vm/nr_overcommit_hugepages cannot be written"),
    }
    if let Some(path) = json {
        std::fs::write(path, format!("[{}]\n", report.join(","))).unwrap();
    }
}
