//! Reads of a disk after many pauses, before and after compaction, beside reads after two pauses.
//!
//! Each pause stores 5 MiB in runs of 1 to 16 blocks at random places. All data is in the page cache, first
//! as it was written, then as it comes from the disk. Rounds of the three devices alternate, and medians
//! are compared.
//!
//! `cargo bench --profile release -p nidus-block --bench chain`

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use std::{fs::File, time::Instant};

use nidus_block::{DiffWriter, MappedDevice, compact, header::Header, wants_compaction};
use nidus_storage::{Artifact, BuildId, LocalStore};
use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};
use tokio::runtime::Runtime;

const SIZE: u64 = 256 << 20;
const BLOCK: u64 = 4096;
const PAUSE: u64 = 5 << 20;
const ROUNDS: usize = 21;
const RANDOM_READS: u64 = 20_000;

struct Bench {
    runtime: Runtime,
    store: LocalStore,
    rng: SmallRng,
}

impl Bench {
    fn open(&self, header: &Header) -> MappedDevice {
        let store = self.store.clone();
        let open = move |build| store.open_artifact(build, Artifact::Rootfs);
        self.runtime.block_on(MappedDevice::open(header.clone(), open)).unwrap()
    }

    fn publish(&self, build: BuildId, write: impl FnOnce(&File, &std::path::Path) -> Header) -> Header {
        let staged = self.runtime.block_on(self.store.stage(build)).unwrap();
        let path = staged.path(Artifact::Rootfs);
        let header = write(&File::create_new(&path).unwrap(), &path);
        self.runtime.block_on(staged.write(Artifact::Metadata, "{}")).unwrap();
        self.runtime.block_on(staged.commit()).unwrap();
        header
    }

    fn template(&mut self) -> Header {
        use std::os::unix::fs::FileExt;
        let (build, mut piece) = (BuildId::random(), vec![0; 1 << 20]);
        let mut rng = self.rng.clone();
        self.publish(build, |file, _| {
            for at in (0..SIZE).step_by(piece.len()) {
                rng.fill_bytes(&mut piece);
                file.write_all_at(&piece, at).unwrap();
            }
            Header::identity(build, SIZE, BLOCK).unwrap()
        })
    }

    fn pause(&mut self, parent: &Header) -> Header {
        let (build, device) = (BuildId::random(), self.open(parent));
        let mut runs = Vec::new();
        let mut left = PAUSE / BLOCK;
        while left > 0 {
            let len = self.rng.random_range(1..=16u64).min(left);
            runs.push((self.rng.random_range(0..SIZE / BLOCK - len) * BLOCK, len * BLOCK));
            left -= len;
        }
        runs.sort_unstable();
        let mut rng = self.rng.clone();
        self.publish(build, |file, path| {
            let (mut diff, mut end) = (DiffWriter::new(&device, build, file, path), 0);
            for (at, len) in runs {
                let at = at.max(end);
                let mut data = vec![0; len as usize];
                rng.fill_bytes(&mut data);
                end = (at + len).min(SIZE);
                diff.push(at, &data[..(end - at) as usize]).unwrap();
            }
            diff.finish().unwrap().header
        })
    }

    fn line(&mut self, base: &Header, pauses: usize) -> Header {
        (0..pauses).fold(base.clone(), |parent, _| self.pause(&parent))
    }

    /// Drops all files from the page cache; the first round brings them back.
    fn drop_caches(&self) {
        for build in self.runtime.block_on(self.store.list()).unwrap() {
            let file = File::open(self.store.path(build, Artifact::Rootfs)).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
    }

    /// The same device with its own blocks and those of all pauses before in one file.
    fn compacted(&mut self, header: &Header) -> MappedDevice {
        assert!(wants_compaction(header));
        let (device, staged) = (self.open(header), self.store.stage_again(header.build()).unwrap());
        let path = staged.path(Artifact::Rootfs);
        let file = File::create_new(&path).unwrap();
        let own = self.store.open_artifact(header.build(), Artifact::Rootfs).unwrap();
        own.copy_to(&file, &path).unwrap();
        let begin = Instant::now();
        let done = compact(&device, &file, &path, || true).unwrap().unwrap();
        println!(
            "compaction: {} to {} mappings, {} to {} MiB stored, {} ms",
            header.mappings().len(),
            done.header.mappings().len(),
            own.size() >> 20,
            done.stored >> 20,
            begin.elapsed().as_millis(),
        );
        assert!(!wants_compaction(&done.header));
        self.runtime.block_on(staged.write(Artifact::Metadata, "{}")).unwrap();
        self.store.replace(staged).unwrap();
        self.open(&done.header)
    }
}

fn sequential(device: &MappedDevice) -> f64 {
    let (begin, mut buf) = (Instant::now(), vec![0; 1 << 20]);
    for at in (0..SIZE).step_by(buf.len()) {
        device.read_blocking(at, &mut buf).unwrap();
    }
    begin.elapsed().as_secs_f64()
}

fn random(device: &MappedDevice) -> f64 {
    let (mut rng, mut buf) = (SmallRng::seed_from_u64(5), vec![0; BLOCK as usize]);
    let begin = Instant::now();
    for _ in 0..RANDOM_READS {
        device.read_blocking(rng.random_range(0..SIZE / BLOCK) * BLOCK, &mut buf).unwrap();
    }
    begin.elapsed().as_secs_f64()
}

/// Name, what is timed, how much of what it reads.
type Case = (&'static str, fn(&MappedDevice) -> f64, u64, &'static str);

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let dir = tempfile::TempDir::new().unwrap();
    let store = LocalStore::open(dir.path()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let mut bench = Bench { runtime, store, rng: SmallRng::seed_from_u64(1) };
    let base = bench.template();
    let (short, long) = (bench.line(&base, 2), bench.line(&base, 20));
    let (short, before) = (bench.open(&short), bench.open(&long));
    let after = bench.compacted(&long);
    let devices = [("2 pauses", &short), ("20 pauses", &before), ("20 pauses, compacted", &after)];
    compare("as written", &devices);
    bench.drop_caches();
    compare("from the disk", &devices);
    check_speed(&bench.store, base.build());
}

/// Times the devices beside each other.
fn compare(state: &str, devices: &[(&str, &MappedDevice)]) {
    println!("{state}:");
    let cases: [Case; 2] = [
        ("1 MiB sequential", sequential, SIZE >> 20, "MiB/s"),
        ("4 KiB random", random, RANDOM_READS, "reads/s"),
    ];
    for (case, read, count, unit) in cases {
        let mut times = vec![Vec::new(); devices.len()];
        for round in 0..ROUNDS {
            for n in 0..devices.len() {
                let n = (n + round) % devices.len();
                times[n].push(read(devices[n].1));
            }
        }
        let times: Vec<f64> = times.into_iter().map(median).collect();
        for ((name, device), time) in devices.iter().zip(&times) {
            println!(
                "{case:>17}  {name:<21} {:>4} mappings {:>9.0} {unit:<8} x {:.2} of the time after 2 pauses",
                device.header().mappings().len(),
                count as f64 / time,
                time / times[0]
            );
        }
    }
}

/// The sums alone, of bytes in the processor's cache.
fn check_speed(store: &LocalStore, build: BuildId) {
    use std::os::unix::fs::FileExt;
    let artifact = store.open_artifact(build, Artifact::Rootfs).unwrap();
    let mut bytes = vec![0; 256 << 10];
    artifact.file().read_exact_at(&mut bytes, 0).unwrap();
    let begin = Instant::now();
    let rounds = 20_000;
    (0..rounds).for_each(|_| artifact.check(0, &bytes).unwrap());
    let gigabytes = rounds as f64 * bytes.len() as f64 / 1e9;
    println!("checksums: {:.1} GB/s", gigabytes / begin.elapsed().as_secs_f64());
}
