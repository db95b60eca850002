//! The tests.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use libtest_mimic::Failed;
use nidus_vmm::{Disk, Memory, MemorySaved, SaveMemory, Tap, VmConfig, Vmm};
use tokio::sync::oneshot;

use crate::bed::{Bed, From, MEMORY_MB, Machine, Test, create, file, new_disk};
use crate::guest::{self, DISK_TEXT, MEMORY, PAGE};
use crate::host::{self, Loop};
use crate::net::Namespace;
use crate::pages::PageServer;

/// What `sum` must answer when the first pages were filled again.
fn expected_sum(refilled: usize) -> String {
    let mut memory = vec![0; MEMORY];
    guest::fill(&mut memory, 1);
    guest::fill(&mut memory[..refilled * PAGE], 2);
    guest::sum(&memory).to_string()
}

pub fn boots(bed: &Bed) -> Test {
    let disk = new_disk(&bed.file("boots.disk"))?;
    let machine = bed.boot("boots", &disk, |_| ())?;
    assert_eq!(machine.ask("sum")?, expected_sum(0));
    assert_eq!(machine.ask("disk")?.as_bytes(), DISK_TEXT);
    assert!(machine.vm.console().contains("nidus: guest is up"), "{}", machine.vm.console());
    let mut begin = [0; DISK_TEXT.len()];
    machine.kill(&bed.runtime)?;
    // The loop device writes through to its file.
    File::open(&disk)?.read_exact_at(&mut begin, 0)?;
    assert_eq!(begin, DISK_TEXT);
    Ok(())
}

fn runs_on(bed: &Bed, mut machine: Machine) -> Result<u64, Failed> {
    machine.resume(&bed.runtime)?;
    // The guest went on from where it was, and goes on.
    let first = machine.number("ticks")?;
    assert!(first >= bed.template()?.ticks, "{first}");
    while machine.number("ticks")? <= first {}
    assert_eq!(machine.ask("sum")?, expected_sum(0));
    assert_eq!(machine.ask("disk")?.as_bytes(), DISK_TEXT);
    assert_eq!(machine.vm.console(), "");
    machine.kill(&bed.runtime)
}

pub fn resumes_served(bed: &Bed) -> Test {
    let machine = bed.clone_of_template("served", From::Served)?;
    let served = runs_on(bed, machine)?;
    // Everything that `sum` has read, and less than all there is.
    let pages = u64::from(MEMORY_MB) << 20 >> 12;
    assert!(served >= (MEMORY / PAGE) as u64 && served < pages, "{served} pages were served");
    Ok(())
}

pub fn resumes_mapped(bed: &Bed) -> Test {
    let machine = bed.clone_of_template("mapped", From::Mapped)?;
    let before = fs::metadata(&bed.template()?.memory)?.mtime_nsec();
    runs_on(bed, machine)?;
    assert_eq!(fs::metadata(&bed.template()?.memory)?.mtime_nsec(), before);
    Ok(())
}

pub fn clones(bed: &Bed) -> Test {
    let mut a = bed.clone_of_template("clone-a", From::Served)?;
    let mut b = bed.clone_of_template("clone-b", From::Served)?;
    a.resume(&bed.runtime)?;
    b.resume(&bed.runtime)?;
    a.ask("fill 100")?;
    assert_eq!(b.ask("sum")?, expected_sum(0));
    assert_eq!(a.ask("sum")?, expected_sum(100));
    b.kill(&bed.runtime)?;
    assert_eq!(a.ask("sum")?, expected_sum(100));
    a.kill(&bed.runtime)?;
    Ok(())
}

pub fn diff(bed: &Bed) -> Test {
    let (filled, slack) = (64, 4096);
    let mut machine = bed.clone_of_template("diff", From::Served)?;
    machine.resume(&bed.runtime)?;
    machine.ask("fill 64")?;
    let memory = create(&bed.file("diff.memory"))?;
    let saved = machine.save(&bed.runtime, &bed.file("diff.state"), SaveMemory::Diff(memory.try_clone()?))?;
    let MemorySaved::Diff(ranges) = saved else { panic!("{saved:?}") };
    let bytes: u64 = ranges.iter().map(|r| r.end - r.start).sum();
    let pages = bytes / PAGE as u64;
    assert!(bytes.is_multiple_of(PAGE as u64));
    assert!((filled..filled + slack).contains(&pages), "{pages} pages in {} ranges", ranges.len());
    // The file is the caller's again, and has no more on disk than that.
    let meta = memory.metadata()?;
    assert_eq!((meta.uid(), meta.gid(), meta.len()), (0, 0, u64::from(MEMORY_MB) << 20));
    assert!(meta.blocks() * 512 <= bytes + (1 << 20), "{} blocks", meta.blocks());
    // It stands where it was, and can go on.
    machine.resume(&bed.runtime)?;
    assert_eq!(machine.ask("sum")?, expected_sum(64));
    machine.kill(&bed.runtime)?;
    Ok(())
}

pub fn diff_resumes(bed: &Bed) -> Test {
    let mut machine = bed.clone_of_template("base", From::Served)?;
    machine.resume(&bed.runtime)?;
    machine.ask("fill 200")?;
    let (state, disk) = (bed.file("second.state"), bed.file("base.disk"));
    let change = create(&bed.file("second.diff"))?;
    let saved = machine.save(&bed.runtime, &state, SaveMemory::Diff(change.try_clone()?))?;
    machine.kill(&bed.runtime)?;
    let MemorySaved::Diff(ranges) = saved else { panic!("{saved:?}") };
    let memory = bed.file("second.memory");
    fs::copy(&bed.template()?.memory, &memory)?;
    let merged = file(&memory)?;
    for range in ranges {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        change.read_exact_at(&mut bytes, range.start)?;
        merged.write_all_at(&bytes, range.start)?;
    }
    let mut second = bed.load("second", From::Served, (&state, &memory, &disk), |_| ())?;
    second.resume(&bed.runtime)?;
    assert_eq!(second.ask("sum")?, expected_sum(200));
    second.kill(&bed.runtime)?;
    Ok(())
}

fn status_field(pid: u32, name: &str) -> Result<String, Failed> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.ok_or(format!("no {name}"))?.split_whitespace().collect::<Vec<_>>().join(" "))
}

pub fn confined(bed: &Bed) -> Test {
    let mut machine = bed.clone_of_template("confined", From::Served)?;
    machine.resume(&bed.runtime)?;
    machine.ask("ticks")?;
    let pid = machine.vm.pid();
    let uid = machine.uid;
    assert_eq!(status_field(pid, "Uid")?, format!("{uid} {uid} {uid} {uid}"));
    assert_eq!(status_field(pid, "Gid")?, format!("{uid} {uid} {uid} {uid}"));
    assert_eq!(status_field(pid, "Groups")?, "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status_field(pid, set)?, "0000000000000000", "{set}");
    }
    assert_eq!(status_field(pid, "NoNewPrivs")?, "1");
    // Firecracker's own filter, on every thread.
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        assert!(status.contains("Seccomp:\t2"), "{status}");
    }
    // Its root holds what it was given.
    let mut names: Vec<String> = fs::read_dir(format!("/proc/{pid}/root"))?
        .map(|e| Ok(e?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<_>>()?;
    names.sort();
    assert_eq!(names, ["dev", "disk", "firecracker", "log", "memfile", "run"]);
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    assert_eq!(mounts.lines().count(), 2, "{mounts}");
    assert_eq!(fs::metadata(format!("/proc/{pid}/root/run"))?.uid(), 0);
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    assert!(limits.lines().any(|l| l.starts_with("Max open files") && l.contains("2048")), "{limits}");
    let group = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    assert!(group.contains(&format!("{}/confined", bed.cgroup)), "{group}");
    let namespace = |p: &str| fs::read_link(format!("/proc/{p}/ns/net"));
    assert_ne!(namespace(&pid.to_string())?, namespace("self")?);
    machine.kill(&bed.runtime)?;
    Ok(())
}

pub fn leaves_nothing(bed: &Bed) -> Test {
    let look = || -> Result<(String, usize), Failed> {
        let descriptors = fs::read_dir("/proc/self/fd")?.count();
        Ok((fs::read_to_string("/proc/self/mountinfo")?, descriptors))
    };
    bed.template()?;
    let before = look()?;
    for ending in 0..3 {
        let mut machine = bed.clone_of_template("leaves", From::Served)?;
        let pid = machine.vm.pid();
        if ending > 0 {
            machine.resume(&bed.runtime)?;
            machine.ask("sum")?;
        }
        if ending == 2 {
            // Dropped instead of killed: nobody waits, but it ends all the same.
            let mut exit = machine.vm.exit();
            let Machine { vm, pages, network, _disk: disk, .. } = machine;
            drop(vm);
            bed.runtime.block_on(exit.wait());
            pages.map(PageServer::stop).transpose()?;
            drop((network, disk));
        } else {
            machine.kill(&bed.runtime)?;
        }
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        let left = find_dirs(Path::new("/sys/fs/cgroup"), "leaves");
        assert!(left.is_empty(), "{left:?}");
    }
    let after = look()?;
    assert_eq!(before.0, after.0);
    assert_eq!(before.1, after.1, "descriptors are left open");
    Ok(())
}

fn find_dirs(dir: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            if entry.file_name() == name {
                found.push(entry.path());
            }
            found.extend(find_dirs(&entry.path(), name));
        }
    }
    found
}

pub fn ends(bed: &Bed) -> Test {
    // Killed from outside.
    let mut machine = bed.clone_of_template("killed", From::Served)?;
    machine.resume(&bed.runtime)?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(machine.vm.pid())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
    let mut exit = machine.vm.exit();
    let status = bed.runtime.block_on(exit.wait());
    assert!(status.contains("SIGKILL"), "{status}");
    let e = bed.runtime.block_on(machine.vm.pause()).unwrap_err().to_string();
    assert!(e.contains("exited") && e.contains("pausing"), "{e}");
    machine.kill(&bed.runtime)?;
    // A guest that resets itself ends its VMM.
    let mut machine = bed.clone_of_template("reset", From::Served)?;
    machine.resume(&bed.runtime)?;
    // It must be up; and there is no answer to what comes then, the connection breaks.
    machine.ask("ticks")?;
    machine.network.tell("crash")?;
    let mut exit = machine.vm.exit();
    let status = bed.runtime.block_on(exit.wait());
    assert!(status.contains("exit status: 0"), "{status}");
    machine.kill(&bed.runtime)?;
    Ok(())
}

pub fn refused(bed: &Bed) -> Test {
    let t = bed.template()?;
    let disk = new_disk(&bed.file("refused.disk"))?;
    let error = |change: &dyn Fn(&mut VmConfig)| match bed.boot("refused", &disk, change) {
        Ok(_) => panic!("it booted"),
        Err(e) => e.message().unwrap_or_default().to_owned(),
    };
    let (socket, _other) = std::os::unix::net::UnixStream::pair()?;
    let e = error(&|c| c.disk = Disk::Nbd(socket.try_clone().unwrap().into()));
    assert!(e.contains("needs a block device"), "{e}");
    let e = error(&|c| c.disk = Disk::Device("/etc/passwd".into()));
    assert!(e.contains("/etc/passwd") && e.contains("no device"), "{e}");
    let e = error(&|c| c.memory = Memory::Shared(File::open("/dev/null").unwrap()));
    assert!(e.contains("shared memory file"), "{e}");
    // Firecracker's own refusals come through.
    let e = error(&|c| c.vcpus = 33);
    assert!(e.contains("/machine-config was refused (400)") && e.contains("vCPU"), "{e}");
    let e = error(&|c| c.tap = Tap::Name("tap7".into()));
    assert!(e.contains("/network-interfaces/eth0 was refused") || e.contains("/actions was refused"), "{e}");
    let e = error(&|c| c.mac = "nonsense".into());
    assert!(e.contains("/network-interfaces/eth0 was refused (400)"), "{e}");
    // A state is loaded once, and saved with its memory.
    let mut machine = bed.clone_of_template("twice", From::Mapped)?;
    let e = bed.runtime.block_on(machine.vm.load(File::open(&t.state)?)).unwrap_err().to_string();
    assert!(e.contains("cannot load a state"), "{e}");
    let e = machine.save(&bed.runtime, &bed.file("x"), SaveMemory::Stay).unwrap_err();
    assert!(e.message().unwrap_or_default().contains("without its memory"));
    machine.kill(&bed.runtime)?;
    Ok(())
}

pub fn bad_state(bed: &Bed) -> Test {
    let t = bed.template()?;
    let message = |r: Result<Machine, Failed>| match r {
        Ok(_) => panic!("it was loaded"),
        Err(e) => e.message().unwrap_or_default().to_owned(),
    };
    let damaged = bed.file("damaged.state");
    let mut bytes = fs::read(&t.state)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    fs::write(&damaged, &bytes)?;
    let e = message(bed.load("damaged", From::Mapped, (&damaged, &t.memory, &t.disk), |_| ()));
    assert!(e.contains("loading the state") && e.to_lowercase().contains("snapshot"), "{e}");
    fs::write(&damaged, b"")?;
    let e = message(bed.load("empty", From::Mapped, (&damaged, &t.memory, &t.disk), |_| ()));
    assert!(e.contains("0 bytes"), "{e}");
    // Nobody serves the memory.
    let uid = host::new_uid();
    let network = Namespace::new(uid)?;
    let disk = Loop::new(&file(&t.disk)?)?;
    let (sender, receiver) = oneshot::channel();
    drop(receiver);
    let config = bed.config("unserved", uid, &network, &disk, Memory::Served(sender));
    let e = bed.runtime.block_on(async {
        let mut vm = bed.vmm.prepare(config).await.unwrap();
        let e = vm.load(File::open(&t.state).unwrap()).await.unwrap_err();
        vm.kill().await.unwrap();
        e.to_string()
    });
    assert!(e.contains("memory's server is gone"), "{e}");
    Ok(())
}

/// How many seconds the clock of a guest is behind ours when it has just gone on.
fn behind(bed: &Bed, advance: bool) -> Result<u64, Failed> {
    let t = bed.template()?;
    let disk = bed.file("clock.disk");
    fs::copy(&t.disk, &disk)?;
    let files = (t.state.as_path(), t.memory.as_path(), disk.as_path());
    let mut machine = bed.load("clock", From::Served, files, |c| c.advance_clock = advance)?;
    machine.resume(&bed.runtime)?;
    let theirs = machine.number("clock")?;
    let ours = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    machine.kill(&bed.runtime)?;
    Ok(ours.saturating_sub(theirs))
}

pub fn clock(bed: &Bed) -> Test {
    let saved = fs::metadata(&bed.template()?.state)?.modified()?;
    // The snapshot must have an age for this to show.
    while saved.elapsed()?.as_secs() < 5 {
        std::thread::sleep(Duration::from_millis(100));
    }
    let with = match behind(bed, true) {
        Ok(seconds) => seconds,
        // Hosts whose clock is not the processors' counter save no time with the state.
        Err(e) if e.message().unwrap_or_default().contains("clock_realtime") => {
            println!("this host's snapshots have no time: {}", e.message().unwrap_or_default());
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    let without = behind(bed, false)?;
    assert!(with < without, "{with} s behind when moved on, {without} s when not");
    Ok(())
}

pub fn huge_pages(bed: &Bed) -> Test {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    let wanted = MEMORY_MB / 2 + 2;
    let before = fs::read_to_string(POOL)?;
    fs::write(POOL, wanted.to_string())?;
    let result = huge_pages_with_pool(bed);
    fs::write(POOL, before.trim())?;
    result
}

fn huge_pages_with_pool(bed: &Bed) -> Test {
    let disk = new_disk(&bed.file("huge.disk"))?;
    let mut machine = bed.boot("huge", &disk, |c| c.huge_pages = true)?;
    assert_eq!(machine.ask("sum")?, expected_sum(0));
    let (state, memory) = (bed.file("huge.state"), bed.file("huge.memory"));
    machine.save(&bed.runtime, &state, SaveMemory::Full(create(&memory)?))?;
    machine.kill(&bed.runtime)?;
    let files = (state.as_path(), memory.as_path(), disk.as_path());
    let mut machine = bed.load("huge-again", From::Served, files, |c| c.huge_pages = true)?;
    machine.resume(&bed.runtime)?;
    assert_eq!(machine.ask("sum")?, expected_sum(0));
    let served = machine.kill(&bed.runtime)?;
    assert!(served <= u64::from(MEMORY_MB) / 2, "{served} faults: they were not of 2 MiB");
    Ok(())
}
