//! The jail from the inside: this very test program, which is static, is run in one.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use crate::jail::Jail;
use crate::mount::Access;
use crate::process::{Process, Spawn, socket_pair};

const UID: u32 = 64_123;

/// What the program does in the jail: says what it sees, a line each, until its input ends.
#[test]
#[ignore = "a role that another test runs in a jail"]
fn inside() {
    if nix::unistd::getuid().as_raw() != UID {
        return;
    }
    let names = |dir: &str| {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names.join(" ")
    };
    let say = |what: &str, value: String| println!("@{what}: {value}");
    say("root", names("/"));
    say("dev", names("/dev"));
    say("uid", format!("{} {}", nix::unistd::getuid(), nix::unistd::getgid()));
    say("groups", nix::unistd::getgroups().unwrap().len().to_string());
    let bounding = (0..40).filter(|c| prctl(libc::PR_CAPBSET_READ, *c) == 1).count();
    say("capabilities", bounding.to_string());
    say("no new privileges", prctl(libc::PR_GET_NO_NEW_PRIVS, 0).to_string());
    let (soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    say("files", format!("{soft} {hard}"));
    let open: Vec<i32> =
        (3..256).filter(|fd| nix::fcntl::fcntl(borrow(*fd), nix::fcntl::FcntlArg::F_GETFD).is_ok()).collect();
    say("descriptors", format!("{open:?}"));
    say("write /", fs::write("/new", "x").unwrap_err().to_string());
    say("write /run", fs::write("/run/new", "x").is_ok().to_string());
    say("replace", fs::remove_file("/given").unwrap_err().to_string());
    say("given", fs::read_to_string("/given").unwrap());
    say("change given", File::options().write(true).open("/given").unwrap_err().to_string());
    say("zero", fs::read("/dev/zero").map(|_| ()).err().map_or("?".into(), |e| e.to_string()));
    say("null", fs::read("/dev/null").unwrap().len().to_string());
    File::options().write(true).open("/log").unwrap().write_all(b"into the log\n").unwrap();
    say("ready", String::new());
    // The other test binds a file here now and says so by removing /run/wait.
    while Path::new("/run/wait").exists() {
        std::thread::yield_now();
    }
    say("late", fs::read_to_string("/late").unwrap());
    File::options().write(true).open("/late").unwrap().write_all_at(b"INSIDE", 0).unwrap();
    say("end", String::new());
    loop {
        std::thread::park();
    }
}

fn borrow(fd: i32) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: only asked about, whether it is open or not.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}

fn prctl(option: i32, value: u64) -> i32 {
    // SAFETY: these options take numbers only.
    unsafe { libc::prctl(option, value, 0, 0, 0) }
}

#[tokio::test]
async fn a_jailed_process_sees_and_can_do_only_what_it_was_given() {
    let host = tempfile::tempdir().unwrap();
    let given = host.path().join("given");
    fs::write(&given, "from the host").unwrap();
    let late = host.path().join("late");
    fs::write(&late, "bound later").unwrap();
    fs::set_permissions(&late, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let mounts_before = fs::read_to_string("/proc/self/mountinfo").unwrap();

    let mut jail = Jail::new(UID, 1 << 20).unwrap();
    jail.dir(c"dev").unwrap();
    jail.own_dir(c"run").unwrap();
    jail.device(c"dev/null", Path::new("/dev/null")).unwrap();
    jail.optional_device(c"dev/missing", Path::new("/dev/missing")).unwrap();
    assert!(jail.device(c"dev/file", &given).is_err());
    jail.bind(c"program", &File::open("/proc/self/exe").unwrap(), Access::Run).unwrap();
    jail.bind(c"given", &File::open(&given).unwrap(), Access::Read).unwrap();
    jail.place(c"late").unwrap();
    let log = jail.pipe(c"log").unwrap();
    fs::write(jail.path(c"run/wait"), "").unwrap();
    // Nothing that the daemon has open gets in, even without close-on-exec.
    let leak = File::open("/etc/passwd").unwrap();
    // SAFETY: changes a flag of a file that this test owns.
    unsafe { libc::fcntl(leak.as_raw_fd(), libc::F_SETFD, 0) };
    let (out, child_out) = socket_pair().unwrap();
    let spawn = Spawn {
        program: "/program".into(),
        args: ["--exact", "jail_tests::inside", "--ignored", "--nocapture", "--test-threads=1"]
            .map(Into::into)
            .into(),
        keep: Vec::new(),
        netns: File::open("/proc/self/ns/net").unwrap().into(),
        uid: UID,
        cgroup_procs: Vec::new(),
        jail: Some(jail.entry().unwrap()),
        stdout: Some(child_out),
        log: Some(log),
        max_files: 256,
    };
    let process = Process::spawn("jailed", spawn).await.unwrap();
    out.set_nonblocking(true).unwrap();
    let out = tokio::net::UnixStream::from_std(out).unwrap();
    let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(out));
    let mut said = std::collections::BTreeMap::new();
    let mut until = async |last: &str| {
        loop {
            let line =
                lines.next_line().await.unwrap().unwrap_or_else(|| panic!("it ended: {}", process.log()));
            // The first line begins with what the test harness says.
            let Some((_, line)) = line.split_once('@') else { continue };
            let (what, value) = line.split_once(": ").unwrap();
            said.insert(what.to_owned(), value.to_owned());
            if what == last {
                return std::mem::take(&mut said);
            }
        }
    };
    let said = until("ready").await;
    let get = |what: &str| said.get(what).unwrap_or_else(|| panic!("nothing about {what}")).as_str();
    assert_eq!(get("root"), "dev given late log program run");
    assert_eq!(get("dev"), "null");
    assert_eq!(get("uid"), format!("{UID} {UID}"));
    assert_eq!(get("groups"), "0");
    assert_eq!(get("capabilities"), "0");
    assert_eq!(get("no new privileges"), "1");
    assert_eq!(get("files"), "256 256");
    assert_eq!(get("descriptors"), "[]");
    assert!(get("write /").contains("Permission denied"));
    assert_eq!(get("write /run"), "true");
    assert!(get("replace").contains("Permission denied"));
    assert_eq!(get("given"), "from the host");
    assert_eq!(get("null"), "0");
    assert!(get("change given").contains("Permission denied") || get("change given").contains("Read-only"));
    assert!(get("zero").contains("No such file"));

    // A file that is bound into the running process's namespace, and taken out again.
    let mounts = File::open(format!("/proc/{}/ns/mnt", process.pid())).unwrap();
    let file = File::options().read(true).write(true).open(&late).unwrap();
    jail.attach(&mounts, c"late", &file, Access::Write).unwrap();
    fs::remove_file(jail.path(c"run/wait")).unwrap();
    assert_eq!(until("end").await["late"], "bound later");
    assert_eq!(fs::read_to_string(&late).unwrap(), "INSIDElater");
    let inside = |name: &str| fs::metadata(format!("/proc/{}/root/{name}", process.pid())).unwrap();
    assert_eq!(inside("late").ino(), file.metadata().unwrap().ino());
    jail.detach(&mounts, c"late").unwrap();
    assert_eq!(inside("late").len(), 0);

    // A symbolic link in its own directory leads nowhere.
    std::os::unix::fs::symlink("/run/some.sock", jail.path(c"run/sock")).unwrap();
    assert!(jail.socket(c"run/sock").is_err());
    jail.take_back(c"run").unwrap();
    assert_eq!(fs::metadata(jail.path(c"run")).unwrap().uid(), 0);

    let mut exit = process.exit();
    process.kill().await;
    assert!(exit.wait().await.contains("SIGKILL"));
    drop((jail, mounts));
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), mounts_before);
}

#[tokio::test]
async fn the_log_is_complete_when_the_exit_is_known() {
    let mut jail = Jail::new(UID, 1 << 20).unwrap();
    jail.dir(c"dev").unwrap();
    jail.bind(c"program", &File::open("/proc/self/exe").unwrap(), Access::Run).unwrap();
    let log = jail.pipe(c"log").unwrap();
    let writer = File::options().write(true).open(jail.path(c"log")).unwrap();
    let spawn = Spawn {
        program: "/program".into(),
        args: vec!["--no-such-option".into()],
        keep: Vec::new(),
        netns: File::open("/proc/self/ns/net").unwrap().into(),
        uid: UID,
        cgroup_procs: Vec::new(),
        jail: Some(jail.entry().unwrap()),
        stdout: None,
        log: Some(log),
        max_files: 256,
    };
    (&writer).write_all(b"the last words\n").unwrap();
    let process = Process::spawn("failing", spawn).await.unwrap();
    assert!(process.exit().wait().await.contains("exit status"));
    let log = process.log();
    assert!(log.contains("the last words") && log.contains("no-such-option"), "{log}");
}
