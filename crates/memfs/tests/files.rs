//! Served files on the real kernel. Needs root, and /dev/fuse.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    error::Error,
    fs,
    io::{Read, Seek, SeekFrom},
    os::unix::{
        fs::{FileExt, MetadataExt},
        process::CommandExt,
    },
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use nidus_memfs::{Content, MemFs, ServedFile};

/// Bytes that follow from their offsets, of which one page may be damaged.
struct Pattern {
    size: u64,
    seed: u64,
    bad: Option<u64>,
    reads: AtomicUsize,
}

const PAGE: u64 = 4096;

impl Pattern {
    fn new(size: u64, seed: u64) -> Arc<Self> {
        Arc::new(Self { size, seed, bad: None, reads: AtomicUsize::new(0) })
    }

    fn byte(&self, at: u64) -> u8 {
        ((at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) ^ self.seed) as u8
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        (at..at + len as u64).map(|at| self.byte(at)).collect()
    }
}

impl Content for Pattern {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        assert!(!buf.is_empty() && offset + buf.len() as u64 <= self.size);
        self.reads.fetch_add(1, Ordering::Relaxed);
        if self.bad.is_some_and(|bad| (offset..offset + buf.len() as u64).contains(&(bad * PAGE))) {
            return Err("page is bad".into());
        }
        buf.copy_from_slice(&self.bytes(offset, buf.len()));
        Ok(())
    }
}

fn fs_or_skip() -> Option<MemFs> {
    match MemFs::start(3) {
        Ok(fs) => Some(fs),
        Err(e) if !rustix::process::geteuid().is_root() => {
            eprintln!("skipped: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

fn read_at(file: &fs::File, at: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut buf = vec![0; len];
    file.read_exact_at(&mut buf, at)?;
    Ok(buf)
}

#[test]
fn bytes_are_those_of_the_content_and_are_kept() {
    let Some(fs) = fs_or_skip() else { return };
    // A last page that is short.
    let pattern = Pattern::new(3 << 20 | 77, 1);
    let served = fs.serve(pattern.clone()).unwrap();
    let mut file = served.open().unwrap();
    let meta = file.metadata().unwrap();
    assert_eq!((meta.len(), meta.mode(), meta.nlink()), (pattern.size, 0o100_444, 1));
    for (at, len) in [(0, 1), (4095, 2), (1 << 20, 300_000), ((3 << 20) - 5, 82), (12345, 1 << 20)] {
        assert!(read_at(&file, at, len).unwrap() == pattern.bytes(at, len), "{len} bytes at {at}");
    }
    let mut all = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut all).unwrap();
    assert!(all == pattern.bytes(0, pattern.size as usize));
    // From here on it is in the page cache, whoever opens it.
    let reads = pattern.reads.load(Ordering::Relaxed);
    assert!(reads < 100, "{reads} reads");
    drop(file);
    assert!(fs::read(served.path()).unwrap() == all);
    assert_eq!(pattern.reads.load(Ordering::Relaxed), reads);
    assert!(fs::File::options().write(true).open(served.path()).is_err());
    assert_eq!(served.failure(), None);
}

#[test]
fn other_users_can_read_what_they_are_given() {
    let Some(fs) = fs_or_skip() else { return };
    let pattern = Pattern::new(10_000, 2);
    let served = fs.serve(pattern.clone()).unwrap();
    // Opened again, as QEMU does with the descriptor it inherits.
    let mut cat = Command::new("cat");
    cat.arg("/proc/self/fd/0").stdin(Stdio::from(served.open().unwrap()));
    let output = cat.uid(65534).gid(65534).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == pattern.bytes(0, 10_000));
}

#[test]
fn an_error_is_kept_and_stays_with_its_page() {
    let Some(fs) = fs_or_skip() else { return };
    let bad = Arc::new(Pattern { bad: Some(40), ..Arc::into_inner(Pattern::new(64 * PAGE, 3)).unwrap() });
    let (served, good) = (fs.serve(bad.clone()).unwrap(), fs.serve(Pattern::new(PAGE, 4)).unwrap());
    let file = served.open().unwrap();
    let error = read_at(&file, 40 * PAGE, 10).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    assert_eq!(served.failure(), Some("page is bad"));
    // All others, although the kernel reads ahead over the bad one.
    for page in (0..64).filter(|page| *page != 40) {
        assert!(read_at(&file, page * PAGE, 4096).unwrap() == bad.bytes(page * PAGE, 4096), "page {page}");
    }
    assert_eq!(good.failure(), None);
    assert!(read_at(&good.open().unwrap(), 0, 9).is_ok());
}

#[test]
fn a_dropped_file_is_gone_with_its_content() {
    let Some(fs) = fs_or_skip() else { return };
    let pattern = Pattern::new(64 * PAGE, 5);
    let served = fs.serve(pattern.clone()).unwrap();
    let file = served.open().unwrap();
    read_at(&file, 0, 10).unwrap();
    drop(served);
    assert!(read_at(&file, 63 * PAGE, 10).is_err());
    drop(file);
    assert_eq!(Arc::strong_count(&pattern), 1);
}

#[test]
fn many_read_many_files_at_once() {
    let Some(fs) = fs_or_skip() else { return };
    let files: Vec<(Arc<Pattern>, ServedFile)> = (0..8)
        .map(|seed| {
            let pattern = Pattern::new(300 * PAGE + seed, seed);
            (pattern.clone(), fs.serve(pattern).unwrap())
        })
        .collect();
    std::thread::scope(|scope| {
        for thread in 0..6u64 {
            let files = &files;
            scope.spawn(move || {
                for round in 0..200u64 {
                    let (pattern, served) = &files[((thread + round) % 8) as usize];
                    let at = (thread * 7919 + round * 104_729) % (299 * PAGE);
                    let file = served.open().unwrap();
                    assert!(read_at(&file, at, 3000).unwrap() == pattern.bytes(at, 3000));
                }
            });
        }
    });
}

#[test]
fn threads_and_mount_end_with_the_last_file() {
    let Some(fs) = fs_or_skip() else { return };
    let pattern = Pattern::new(64 * PAGE, 6);
    let served = fs.serve(pattern.clone()).unwrap();
    let file = served.open().unwrap();
    drop(fs);
    assert!(read_at(&file, 0, 10).is_ok(), "a file outlives the value that it came from");
    drop(file);
    drop(served);
    assert_eq!(Arc::strong_count(&pattern), 1);
}
