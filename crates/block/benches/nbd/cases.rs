//! What is measured.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use rand::{RngExt, SeedableRng, rngs::SmallRng};

use crate::SIZE;

pub struct Case {
    pub name: &'static str,
    pub write: bool,
    pub random: bool,
    /// Bytes of a request.
    pub len: u32,
    /// Requests in flight.
    pub depth: usize,
    /// Requests of a round.
    pub count: u64,
}

const fn random(name: &'static str, write: bool, depth: usize, count: u64) -> Case {
    Case { name, write, random: true, len: 4096, depth, count }
}

const fn sequential(name: &'static str, write: bool, depth: usize) -> Case {
    Case { name, write, random: false, len: 1 << 20, depth, count: SIZE >> 20 }
}

pub const CASES: [Case; 8] = [
    random("4 KiB random read, 1 in flight", false, 1, 15_000),
    random("4 KiB random read, 32 in flight", false, 32, 60_000),
    random("4 KiB random write, 1 in flight", true, 1, 10_000),
    random("4 KiB random write, 32 in flight", true, 32, 30_000),
    sequential("1 MiB sequential read, 1 in flight", false, 1),
    sequential("1 MiB sequential read, 4 in flight", false, 4),
    sequential("1 MiB sequential write, 1 in flight", true, 1),
    sequential("1 MiB sequential write, 4 in flight", true, 4),
];

impl Case {
    /// Where the requests go: the same for everyone in every round.
    pub fn offsets(&self, count: u64) -> Vec<u64> {
        let mut rng = SmallRng::seed_from_u64(7);
        let places = SIZE / u64::from(self.len);
        (0..count)
            .map(|i| if self.random { rng.random_range(0..places) } else { i % places } * u64::from(self.len))
            .collect()
    }
}

/// Requests per second by system calls on the file, one at a time.
pub fn raw(file: &File, case: &Case, offsets: &[u64]) -> f64 {
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
