//! A process in the place of a VMM: it maps memory, hands its userfaultfd over as Firecracker does,
//! and then does what it is told on a control socket, one line at a time.
//!
//! It is the test (or bench) binary itself, started again with [`DIRECTORY`] set.

use std::{
    fmt::Write as _,
    io::{BufRead, BufReader, IoSlice, Read, Write},
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::Barrier,
    thread,
    time::Instant,
};

use rand::{RngExt, SeedableRng, rngs::SmallRng, seq::SliceRandom};

/// Names, for the child, the directory with the sockets.
pub const DIRECTORY: &str = "NIDUS_UFFD_CHILD";
pub const CONTROL: &str = "control.sock";
pub const MEMORY: &str = "memory.sock";

pub const MISSING: u64 = 1;
pub const WRITE_PROTECT: u64 = 2;
pub const EVENT_FORK: u64 = 1 << 1;
pub const EVENT_REMAP: u64 = 1 << 2;
pub const EVENT_REMOVE: u64 = 1 << 3;
pub const EVENT_UNMAP: u64 = 1 << 6;

/// The directory, if this process is a child.
pub fn directory() -> Option<PathBuf> {
    std::env::var_os(DIRECTORY).map(Into::into)
}

/// A userfaultfd with these features.
pub fn userfaultfd(features: u64) -> OwnedFd {
    // SAFETY: plain values; the result is checked and is a new descriptor.
    let fd = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) as i32;
        assert!(fd >= 0, "userfaultfd: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    // UFFDIO_API: api, features, ioctls.
    ioctl(&fd, 0xc018_aa3f, &mut [0xaa, features, 0]);
    fd
}

fn ioctl<const N: usize>(fd: &OwnedFd, request: u64, args: &mut [u64; N]) {
    // SAFETY: the requests used here read and write `N` words of 8 bytes.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, args.as_mut_ptr()) };
    assert!(result == 0, "ioctl {request:#x}: {}", std::io::Error::last_os_error());
}

/// Sends bytes and descriptors on a socket, in one message.
pub fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

/// The memory: regions with gaps between them, numbered by offset.
struct Memory {
    uffd: OwnedFd,
    regions: Vec<(usize, usize)>,
    page: usize,
}

impl Memory {
    fn map(size: usize, page: usize, regions: usize, features: u64, mode: u64) -> Self {
        let uffd = userfaultfd(features);
        let huge = if page > 4096 { libc::MAP_HUGETLB } else { 0 };
        let len = size / regions / page * page;
        let map = |len, flags, prot| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
            // SAFETY: a new mapping at an address of the kernel's choice.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
            assert_ne!(at, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
            at as usize
        };
        let regions = (0..regions).map(|number| {
            let last = number + 1 == regions;
            let len = if last { size - number * len } else { len };
            // Keeps the kernel from joining neighbours.
            map(page, libc::MAP_NORESERVE, libc::PROT_NONE);
            (map(len, huge, libc::PROT_READ | libc::PROT_WRITE), len)
        });
        let regions: Vec<_> = regions.collect();
        for (base, len) in &regions {
            if page == 4096 {
                // SAFETY: the mapping was just made; the advice changes no content.
                unsafe { libc::madvise(*base as *mut _, *len, libc::MADV_NOHUGEPAGE) };
            }
            ioctl(&uffd, 0xc020_aa00, &mut [*base as u64, *len as u64, mode, 0]);
        }
        Self { uffd, regions, page }
    }

    fn message(&self) -> String {
        let mut text = String::from("[");
        let mut offset = 0;
        for (number, (base, size)) in self.regions.iter().enumerate() {
            let comma = if number > 0 { "," } else { "" };
            let page = self.page;
            write!(
                text,
                r#"{comma}{{"base_host_virt_addr":{base},"size":{size},"offset":{offset},"page_size":{page},"page_size_kib":{page}}}"#
            )
            .unwrap();
            offset += size;
        }
        text + "]"
    }

    /// The address of an offset; what follows up to the region's end can be used with it.
    fn at(&self, offset: usize) -> *mut u8 {
        let mut start = 0;
        for (base, size) in &self.regions {
            if offset < start + size {
                return (base + offset - start) as *mut u8;
            }
            start += size;
        }
        panic!("offset {offset:#x} is outside");
    }

    fn read(&self, offset: usize) -> u8 {
        // SAFETY: `at` checks the offset; the memory is mapped for the child's life.
        unsafe { self.at(offset).read_volatile() }
    }

    fn write(&self, offset: usize, value: u8) {
        // SAFETY: as in `read`; the threads that write take different pages.
        unsafe { self.at(offset).write_volatile(value) }
    }

    fn remove(&self, offset: usize, len: usize) {
        let mut start = 0;
        for (base, size) in &self.regions {
            let (from, to) = (offset.max(start), (offset + len).min(start + size));
            if from < to {
                // SAFETY: the range is mapped, and its content is meant to go.
                let result =
                    unsafe { libc::madvise((base + from - start) as *mut _, to - from, libc::MADV_DONTNEED) };
                assert_eq!(result, 0);
            }
            start += size;
        }
    }
}

/// The writes of the command `hammer`: pages that are `thread` modulo `threads`, an offset within
/// the page and a value for each.
pub fn hammer_writes(
    seed: u64,
    thread: usize,
    threads: usize,
    pages: usize,
    count: usize,
) -> impl Iterator<Item = (usize, usize, u8)> {
    let mut rng = SmallRng::seed_from_u64(seed + thread as u64);
    let mine = pages / threads;
    (0..count).map(move |_| {
        let page = rng.random_range(0..mine) * threads + thread;
        (page, rng.random_range(0..4096), rng.random())
    })
}

/// Serves the commands until the control socket is closed.
pub fn run(directory: &Path) {
    // SAFETY: plain values. So that a killed test leaves nothing.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let control = UnixStream::connect(directory.join(CONTROL)).unwrap();
    let mut commands = BufReader::new(control.try_clone().unwrap());
    let mut replies = control;
    let mut memory = None;
    let mut streams = Vec::new();
    let mut line = String::new();
    while commands.read_line(&mut line).unwrap() > 0 {
        let mut words = line.split_ascii_whitespace();
        let command = words.next().unwrap().to_owned();
        if command == "private" {
            let path = PathBuf::from(words.next().unwrap());
            let n: Vec<usize> = words.map(|word| word.parse().unwrap()).collect();
            let took = time_private(&path, n[0] != 0, n[1]);
            replies.write_all(format!("{took}\n").as_bytes()).unwrap();
            line.clear();
            continue;
        }
        let n: Vec<usize> = words.map(|word| word.parse().unwrap()).collect();
        if command == "map" {
            let made = Memory::map(n[0], n[1], n[2], n[3] as u64, n[4] as u64);
            let stream = UnixStream::connect(directory.join(MEMORY)).unwrap();
            use std::os::fd::AsFd;
            send(&stream, made.message().as_bytes(), &[made.uffd.as_fd()]);
            streams.push(stream);
            memory = Some(made);
            replies.write_all(b"ok\n").unwrap();
        } else if command == "dump" {
            let memory = memory.as_ref().unwrap();
            let bytes: Vec<u8> = (n[0]..n[0] + n[1]).map(|offset| memory.read(offset)).collect();
            replies.write_all(&bytes).unwrap();
        } else {
            let reply = perform(memory.as_ref().unwrap(), &command, &n);
            replies.write_all(format!("{reply}\n").as_bytes()).unwrap();
        }
        line.clear();
    }
}

/// Offsets with this distance, in an order that is random and always the same.
fn shuffled(size: usize, distance: usize) -> Vec<usize> {
    let mut offsets: Vec<_> = (0..size).step_by(distance).collect();
    offsets.shuffle(&mut SmallRng::seed_from_u64(7));
    offsets
}

/// Maps a file private and reads or writes a byte at each of these distances; nanoseconds that it
/// took. What the kernel itself needs for what a handler does.
fn time_private(path: &Path, write: bool, distance: usize) -> u64 {
    let file = std::fs::File::open(path).unwrap();
    let len = file.metadata().unwrap().len() as usize;
    let offsets = shuffled(len, distance);
    // SAFETY: a new mapping at an address of the kernel's choice, of a file that stays as long as
    // it is; the offsets lie within it; it is unmapped when nothing uses it any more.
    unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let at = libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_PRIVATE, file.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED);
        let start = at.cast::<u8>();
        let started = Instant::now();
        for offset in offsets {
            let byte = start.add(offset);
            if write { byte.write_volatile(1) } else { _ = byte.read_volatile() }
        }
        let took = started.elapsed().as_nanos() as u64;
        libc::munmap(at, len);
        took
    }
}

fn perform(memory: &Memory, command: &str, n: &[usize]) -> u64 {
    let page = memory.page;
    match command {
        // Touches all pages of a range from several threads, each in an order of its own.
        "touch" => {
            let (offset, len, threads) = (n[0], n[1], n[2]);
            let barrier = Barrier::new(threads);
            thread::scope(|scope| {
                for number in 0..threads {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        let mut pages: Vec<_> = (offset..offset + len).step_by(page).collect();
                        pages.shuffle(&mut SmallRng::seed_from_u64(number as u64));
                        barrier.wait();
                        for offset in &pages {
                            memory.read(*offset);
                        }
                    });
                }
            });
            0
        }
        // Reads or writes one page after the other, in a random order; nanoseconds that it took.
        "time" => {
            let (write, threads) = (n[0] != 0, n[1]);
            let size: usize = memory.regions.iter().map(|region| region.1).sum();
            let pages = shuffled(size, page);
            let barrier = Barrier::new(threads + 1);
            thread::scope(|scope| {
                for part in pages.chunks(pages.len().div_ceil(threads)) {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        barrier.wait();
                        for offset in part {
                            match write {
                                true => memory.write(*offset, 1),
                                false => _ = memory.read(*offset),
                            }
                        }
                        barrier.wait();
                    });
                }
                barrier.wait();
                let started = Instant::now();
                barrier.wait();
                started.elapsed().as_nanos() as u64
            })
        }
        "write" => {
            (n[0]..n[0] + n[1]).for_each(|offset| memory.write(offset, n[2] as u8));
            0
        }
        "remove" => {
            memory.remove(n[0], n[1]);
            0
        }
        "hammer" => {
            let (seed, threads, pages, count) = (n[0] as u64, n[1], n[2], n[3]);
            thread::scope(|scope| {
                for thread in 0..threads {
                    scope.spawn(move || {
                        for (number, within, value) in hammer_writes(seed, thread, threads, pages, count) {
                            memory.write(number * page + within, value);
                        }
                    });
                }
            });
            0
        }
        // For each page: one thread touches it while another gives it up and then looks. How often
        // it was not zero then.
        "race" => {
            let (first, pages) = (n[0], n[1]);
            let barrier = Barrier::new(2);
            thread::scope(|scope| {
                scope.spawn(|| {
                    for number in first..first + pages {
                        barrier.wait();
                        memory.read(number * page);
                    }
                });
                (first..first + pages)
                    .filter(|number| {
                        barrier.wait();
                        // A little later each time, to meet the copy at all of its stages.
                        (0..(number % 64) * 16).for_each(|_| std::hint::spin_loop());
                        memory.remove(number * page, page);
                        memory.read(number * page) != 0
                    })
                    .count() as u64
            })
        }
        "unregister" => {
            for (base, len) in &memory.regions {
                ioctl(&memory.uffd, 0x8010_aa01, &mut [*base as u64, *len as u64]);
            }
            0
        }
        "unmap" => {
            // SAFETY: the child uses that part of the region no more.
            let result = unsafe { libc::munmap(memory.at(n[0]).cast(), n[1]) };
            assert_eq!(result, 0);
            0
        }
        "blocking" => {
            // SAFETY: an open descriptor and plain values.
            unsafe { libc::fcntl(memory.uffd.as_raw_fd(), libc::F_SETFL, 0) };
            0
        }
        "move" => {
            let (base, len) = memory.regions[0];
            // SAFETY: the child uses the region no more.
            let moved = unsafe { libc::mremap(base as *mut _, len, len * 2, libc::MREMAP_MAYMOVE) };
            assert_ne!(moved, libc::MAP_FAILED);
            u64::from(moved as usize != base)
        }
        // Faults on memory that is registered and was not told of.
        "stray" => {
            let stray = Memory::map(page, page, 1, 0, MISSING);
            let (base, len) = stray.regions[0];
            ioctl(&stray.uffd, 0x8010_aa01, &mut [base as u64, len as u64]);
            ioctl(&memory.uffd, 0xc020_aa00, &mut [base as u64, len as u64, MISSING, 0]);
            u64::from(stray.read(0))
        }
        "exit" => std::process::exit(0),
        other => panic!("no command {other}"),
    }
}

/// The child, from its parent's side. Killed and reaped when dropped.
pub struct Vmm {
    pub process: std::process::Child,
    control: BufReader<UnixStream>,
    listener: std::os::unix::net::UnixListener,
    _directory: tempfile::TempDir,
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Vmm {
    /// Starts this binary again with these arguments.
    pub fn spawn(arguments: &[&str]) -> Self {
        use std::{os::unix::net::UnixListener, process::Stdio};
        let directory = tempfile::TempDir::new().unwrap();
        let listener = UnixListener::bind(directory.path().join(MEMORY)).unwrap();
        let control = UnixListener::bind(directory.path().join(CONTROL)).unwrap();
        let process = std::process::Command::new(std::env::current_exe().unwrap())
            .args(arguments)
            .env(DIRECTORY, directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let control = BufReader::new(control.accept().unwrap().0);
        Self { process, control, listener, _directory: directory }
    }

    /// Has it map memory and hand it over; the connection.
    pub fn map(&mut self, size: usize, page: usize, regions: usize, features: u64, mode: u64) -> UnixStream {
        self.send(&format!("map {size} {page} {regions} {features} {mode}"));
        let stream = self.listener.accept().unwrap().0;
        assert_eq!(self.line(), "ok");
        stream
    }

    pub fn send(&mut self, command: &str) {
        self.control.get_mut().write_all(format!("{command}\n").as_bytes()).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.control.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// The answer to a command; `None` if it died.
    pub fn reply(&mut self) -> Option<u64> {
        self.line().parse().ok()
    }

    pub fn call(&mut self, command: &str) -> u64 {
        self.send(command);
        self.reply().unwrap_or_else(|| panic!("the child died of {command}"))
    }

    /// Its memory, as it sees it.
    pub fn dump(&mut self, offset: usize, len: usize) -> Vec<u8> {
        self.send(&format!("dump {offset} {len}"));
        let mut bytes = vec![0; len];
        self.control.read_exact(&mut bytes).unwrap();
        bytes
    }
}
