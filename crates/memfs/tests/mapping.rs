//! Served files that another process maps, as a VMM does with its memory. Needs root, /dev/fuse and Python.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    error::Error,
    io::{BufRead, BufReader, Write},
    os::unix::process::ExitStatusExt,
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
};

use nidus_memfs::{Content, MemFs, ServedFile};
use nidus_memory::{Memfile, PageSize, ProcessMemory, pagemap::written_ranges};

const PAGE: u64 = 4096;
const PAGES: u64 = 1024;
const BAD: u64 = 700;

/// Each page is full of its number; one of them cannot be read.
struct Numbers;

impl Content for Numbers {
    fn size(&self) -> u64 {
        PAGES * PAGE
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        for (n, byte) in buf.iter_mut().enumerate() {
            let page = (offset + n as u64) / PAGE;
            if page == BAD {
                return Err("page 700 is damaged".into());
            }
            *byte = page as u8;
        }
        Ok(())
    }
}

/// Maps a file privately, and obeys: `r PAGE` reads a byte of a page, `w PAGE` writes one. Answers with
/// the page's first byte.
const MAPPER: &str = "
import mmap, os, sys
m = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
for line in sys.stdin:
    what, page = line.split()
    at = int(page) * 4096
    if what == 'w':
        m[at + 9] = 255
    print(m[at], flush=True)
";

struct Mapper {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Mapper {
    fn start(served: &ServedFile) -> Self {
        // The path as another process sees it.
        let path = served.path().to_str().unwrap().replace("self", &std::process::id().to_string());
        let mut command = Command::new("python3");
        command.args(["-c", MAPPER, &path]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self { child, answers }
    }

    /// The first byte of the page; nothing if the process died of it.
    fn touch(&mut self, what: &str, page: u64) -> Option<u64> {
        writeln!(self.child.stdin.as_ref().unwrap(), "{what} {page}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim().parse().ok()
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A served file and two processes that have it mapped; nothing, and a word about it, where mounting is not
/// allowed.
fn two_mappers() -> Option<(MemFs, ServedFile, [Mapper; 2])> {
    let Ok(fs) = MemFs::start(2) else {
        assert!(!rustix::process::geteuid().is_root());
        eprintln!("skipped: mounting needs root");
        return None;
    };
    let served = fs.serve(Arc::new(Numbers)).unwrap();
    let mappers = [Mapper::start(&served), Mapper::start(&served)];
    Some((fs, served, mappers))
}

#[test]
fn written_pages_are_told_from_read_ones_and_stay_with_their_process() {
    let Some((_fs, served, [mut one, mut other])) = two_mappers() else { return };
    for page in [3, 4, 5, 90, 1023] {
        assert_eq!(one.touch("r", page), Some(page % 256));
    }
    for page in [4, 5, 600] {
        assert_eq!(one.touch("w", page), Some(page % 256));
    }
    for page in [8, 10] {
        assert_eq!(other.touch("w", page), Some(page));
    }
    let memfile = Memfile::open(served.path(), PageSize::Small, Some(PAGES * PAGE)).unwrap();
    let pages = |mapper: &Mapper| -> Vec<_> {
        let written = written_ranges(mapper.child.id(), &memfile).unwrap();
        written.into_iter().map(|r| r.start / PAGE..r.end / PAGE).collect()
    };
    assert_eq!(pages(&one), [4..6, 600..601]);
    assert_eq!(pages(&other), [8..9, 10..11]);
    let memory = ProcessMemory::open(one.child.id(), &memfile).unwrap();
    let mut buf = [0; 10];
    memory.read_at(600 * PAGE, &mut buf).unwrap();
    assert_eq!((buf[0], buf[9]), (88, 255));
    // Nobody else sees it.
    assert_eq!(other.touch("r", 600), Some(88));
    assert!(std::fs::read(served.path()).is_err(), "of which one page is damaged");
    assert_eq!(served.failure(), Some("page 700 is damaged"));
}

#[test]
fn a_page_that_cannot_be_read_ends_who_touches_it_and_nobody_else() {
    let Some((_fs, served, [mut one, mut other])) = two_mappers() else { return };
    // Its neighbours, although the kernel reads around them.
    assert_eq!(one.touch("r", BAD - 1), Some((BAD - 1) % 256));
    assert_eq!(one.touch("r", BAD), None);
    let status = one.child.wait().unwrap();
    assert_eq!(status.signal(), Some(rustix::process::Signal::BUS.as_raw()), "{status}");
    assert_eq!(served.failure(), Some("page 700 is damaged"));
    assert_eq!(other.touch("r", BAD + 1), Some((BAD + 1) % 256));
}
