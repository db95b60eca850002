//! A client of one's own against a server over a directory: what a guest's kernel does, and what it would never do.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use proptest::prelude::*;
use uuid::Uuid;

use crate::status::Status;
use crate::xdr::{Reader, Writer};
use crate::{Export, HandleKey, Limits, Server};

const ROOT: u32 = 0;
const USER: u32 = 1000;

struct Client {
    server: Arc<Server>,
    uid: u32,
    xid: AtomicU32,
    /// Held so that it is removed when the client goes.
    dir: tempfile::TempDir,
}

fn export(dir: &Path, id: u128, limits: Limits) -> Export {
    let fd: OwnedFd = File::open(dir).unwrap().into();
    Export::new(Uuid::from_u128(id), &fd, &HandleKey::new(&[3; 32]), limits).unwrap()
}

/// Free space is not what these are about.
const ROOMY: Limits = Limits { file_bytes: 1 << 20, free_bytes: 0 };

impl Client {
    fn new() -> Self {
        Self::with(ROOMY)
    }

    fn with(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let server = Server::new(vec![export(dir.path(), 1, limits)]);
        Self { server, uid: ROOT, xid: AtomicU32::new(1), dir }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn record(&self, program: u32, procedure: u32, arguments: &[u8]) -> Vec<u8> {
        let mut who = Writer::default();
        who.u32(0).opaque(b"guest").u32(self.uid).u32(self.uid).u32(0);
        let mut w = Writer::default();
        w.u32(self.xid.fetch_add(1, Relaxed)).u32(0).u32(2).u32(program).u32(3).u32(procedure);
        w.u32(1).opaque(&who.into_bytes()).u32(0).opaque(&[]).fixed(arguments);
        w.into_bytes()
    }

    /// The results of a call that is accepted.
    fn call(&self, program: u32, procedure: u32, arguments: &Writer) -> Vec<u8> {
        let answer = self.server.answer(&self.record(program, procedure, &bytes(arguments))).unwrap();
        let mut r = Reader::new(&answer);
        for wanted in [None, Some(1), Some(0), Some(0), Some(0), Some(0)] {
            let word = r.u32().unwrap();
            assert!(wanted.is_none_or(|w| w == word), "{answer:?}");
        }
        answer[24..].to_vec()
    }

    fn nfs(&self, procedure: u32, arguments: &Writer) -> (u32, Vec<u8>) {
        let results = self.call(100_003, procedure, arguments);
        let status = Reader::new(&results).u32().unwrap();
        (status, results[4..].to_vec())
    }

    fn root(&self) -> Vec<u8> {
        let mut w = Writer::default();
        w.opaque(format!("/{}", Uuid::from_u128(1)).as_bytes());
        let results = self.call(100_005, 1, &w);
        let mut r = Reader::new(&results);
        assert_eq!(r.u32(), Ok(0));
        r.opaque(64).unwrap().to_vec()
    }

    fn lookup(&self, dir: &[u8], name: &[u8]) -> Result<Vec<u8>, u32> {
        let (status, results) = self.nfs(3, &place(dir, name));
        if status == 0 { Ok(Reader::new(&results).opaque(64).unwrap().to_vec()) } else { Err(status) }
    }

    /// Handle of what was made.
    fn made(&self, procedure: u32, arguments: &Writer) -> Result<Vec<u8>, u32> {
        let (status, results) = self.nfs(procedure, arguments);
        if status != 0 {
            return Err(status);
        }
        let mut r = Reader::new(&results);
        assert_eq!(r.bool(), Ok(true));
        Ok(r.opaque(64).unwrap().to_vec())
    }

    fn create(&self, dir: &[u8], name: &[u8]) -> Result<Vec<u8>, u32> {
        let mut w = place(dir, name);
        w.u32(0).append(&attributes(Some(0o644), None));
        self.made(8, &w)
    }

    fn mkdir(&self, dir: &[u8], name: &[u8]) -> Result<Vec<u8>, u32> {
        let mut w = place(dir, name);
        w.append(&attributes(Some(0o755), None));
        self.made(9, &w)
    }

    fn write(&self, file: &[u8], offset: u64, data: &[u8]) -> u32 {
        let mut w = Writer::default();
        w.opaque(file).u64(offset).u32(data.len() as u32).u32(0).opaque(data);
        self.nfs(7, &w).0
    }

    fn read(&self, file: &[u8], offset: u64, count: u32) -> Result<(Vec<u8>, bool), u32> {
        let mut w = Writer::default();
        w.opaque(file).u64(offset).u32(count);
        let (status, results) = self.nfs(6, &w);
        if status != 0 {
            return Err(status);
        }
        let mut r = Reader::new(&results);
        skip_attributes(&mut r);
        let (n, is_last) = (r.u32().unwrap(), r.bool().unwrap());
        let data = r.opaque(1 << 20).unwrap().to_vec();
        assert_eq!(data.len(), n as usize);
        Ok((data, is_last))
    }

    fn set(&self, file: &[u8], attributes: &Writer) -> u32 {
        let mut w = Writer::default();
        w.opaque(file).append(attributes).bool(false);
        self.nfs(2, &w).0
    }

    fn rename(&self, from: &[u8], to: &[u8]) -> u32 {
        let root = self.root();
        let mut w = place(&root, from);
        w.append(&place(&root, to));
        self.nfs(14, &w).0
    }

    fn names(&self, dir: &[u8], bytes: u32, procedure: u32) -> Vec<String> {
        let (mut found, mut cookie) = (Vec::new(), 0);
        loop {
            let mut w = Writer::default();
            w.opaque(dir).u64(cookie).u64(0);
            if procedure == 17 {
                w.u32(bytes);
            }
            let (status, results) = self.nfs(procedure, w.u32(bytes));
            assert_eq!(status, 0);
            assert!(results.len() <= bytes as usize);
            let mut r = Reader::new(&results);
            skip_attributes(&mut r);
            r.u64().unwrap();
            while r.bool().unwrap() {
                r.u64().unwrap();
                found.push(String::from_utf8(r.opaque(255).unwrap().to_vec()).unwrap());
                cookie = r.u64().unwrap();
                if procedure == 17 {
                    skip_attributes(&mut r);
                    assert!(!r.optional(|r| r.opaque(64)).unwrap().unwrap().is_empty());
                }
            }
            if r.bool().unwrap() {
                found.sort();
                return found;
            }
        }
    }
}

fn bytes(w: &Writer) -> Vec<u8> {
    let mut copy = Writer::default();
    copy.append(w);
    copy.into_bytes()
}

fn place(dir: &[u8], name: &[u8]) -> Writer {
    let mut w = Writer::default();
    w.opaque(dir).opaque(name);
    w
}

fn attributes(mode: Option<u32>, size: Option<u64>) -> Writer {
    let mut w = Writer::default();
    match mode {
        Some(mode) => w.bool(true).u32(mode),
        None => w.bool(false),
    };
    w.bool(false).bool(false);
    match size {
        Some(size) => w.bool(true).u64(size),
        None => w.bool(false),
    };
    w.u32(0).u32(0);
    w
}

fn skip_attributes(r: &mut Reader<'_>) {
    r.optional(|r| r.fixed::<84>()).unwrap();
}

#[test]
fn a_files_life() {
    let c = Client::new();
    let root = c.root();
    let file = c.create(&root, b"f").unwrap();
    assert_eq!(c.write(&file, 0, b"hello"), 0);
    assert_eq!(c.write(&file, 7, b"!"), 0);
    assert_eq!(c.read(&file, 0, 100).unwrap(), (b"hello\0\0!".to_vec(), true));
    assert_eq!(c.read(&file, 1, 3).unwrap(), (b"ell".to_vec(), false));
    assert_eq!(c.read(&file, u64::MAX - 1, 100).unwrap(), (vec![], true));
    assert_eq!(c.set(&file, &attributes(None, Some(2))), 0);
    assert_eq!(fs::read(c.path("f")).unwrap(), b"he");
    assert_eq!(c.rename(b"f", b"g"), 0);
    // A handle follows its file.
    assert_eq!(c.read(&file, 0, 9).unwrap().0, b"he");
    assert_eq!(c.lookup(&root, b"f"), Err(Status::NoEnt as u32));
    assert_eq!(c.nfs(12, &place(&root, b"g")).0, 0);
    assert_eq!(c.read(&file, 0, 9).unwrap_err(), Status::Stale as u32);
}

#[test]
fn no_name_and_no_handle_leads_out() {
    let c = Client::new();
    let root = c.root();
    let dir = c.mkdir(&root, b"d").unwrap();
    assert_eq!(c.lookup(&root, b"..").unwrap(), root, "above the root is the root");
    assert_eq!(c.lookup(&dir, b"..").unwrap(), root);
    for bad in [&b"../etc"[..], b"/etc/passwd", b"d/..", b"a\0b", b"", &[b'x'; 300]] {
        assert!(c.lookup(&root, bad).is_err());
        assert!(c.create(&root, bad).is_err());
        assert!(c.rename(b"d", bad) != 0);
        assert!(c.rename(bad, b"e") != 0);
    }
    for dots in [&b"."[..], b".."] {
        assert!(c.create(&dir, dots).is_err() && c.mkdir(&dir, dots).is_err());
        assert_ne!(c.nfs(13, &place(&dir, dots)).0, 0);
    }
    // A link is told, and never followed.
    let mut w = place(&root, b"out");
    w.append(&attributes(None, None)).opaque(b"/etc");
    let link = c.made(10, &w).unwrap();
    assert_eq!(c.lookup(&root, b"out").unwrap(), link);
    assert_eq!(c.lookup(&link, b"passwd"), Err(Status::NotDir as u32));
    assert!(c.read(&link, 0, 10).is_err());
    assert_eq!(c.set(&link, &attributes(Some(0o777), Some(0))), Status::Inval as u32);
    // Another volume's handles, and those of other keys.
    let outside = tempfile::tempdir().unwrap();
    let other = Server::new(vec![export(outside.path(), 2, ROOMY)]);
    let c2 = Client { server: other, uid: ROOT, xid: AtomicU32::new(1), dir: outside };
    let (status, _) = c2.nfs(1, Writer::default().opaque(&root));
    assert_eq!(status, Status::Stale as u32);
    for handle in [&b""[..], &[0; 64], &[1; 28], &root[..root.len() - 1]] {
        assert_ne!(c.nfs(1, Writer::default().opaque(handle)).0, 0);
    }
    let mut w = Writer::default();
    w.opaque(format!("/{}", Uuid::from_u128(1)).as_bytes());
    assert_eq!(Reader::new(&c2.call(100_005, 1, &w)).u32(), Ok(2), "an export that it has not");
}

#[test]
fn permissions_are_the_callers() {
    let mut c = Client::new();
    let root = c.root();
    let secret = c.create(&root, b"secret").unwrap();
    assert_eq!(c.write(&secret, 0, b"x"), 0);
    assert_eq!(c.set(&secret, &attributes(Some(0o600), None)), 0);
    let closed = c.mkdir(&root, b"closed").unwrap();
    let inside = c.create(&closed, b"f").unwrap();
    assert_eq!(c.set(&closed, &attributes(Some(0o700), None)), 0);
    c.uid = USER;
    let denied = Err(Status::Acces as u32);
    assert_eq!(c.read(&secret, 0, 1).map(drop), denied);
    assert_eq!(c.write(&secret, 0, b"y"), Status::Acces as u32);
    assert_eq!(c.set(&secret, &attributes(Some(0o666), None)), Status::Perm as u32);
    assert_eq!(c.lookup(&closed, b"f"), denied.map(|()| vec![]));
    assert!(c.create(&closed, b"g").is_err());
    // A handle that it was told is as good as an open file: as on a local disk, where it is got by opening.
    assert!(c.read(&inside, 0, 1).is_ok());
    let mine = c.create(&root, b"mine").unwrap();
    let made = fs::metadata(c.path("mine")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o7777), (USER, USER, 0o644));
    // Whoever owns a file goes on writing what was opened before its mode changed.
    assert_eq!(c.set(&mine, &attributes(Some(0o400), None)), 0);
    assert_eq!(c.write(&mine, 0, b"still"), 0);
    let ask = |c: &Client, file: &[u8]| {
        let (status, results) = c.nfs(4, Writer::default().opaque(file).u32(0x3f));
        let mut r = Reader::new(&results);
        skip_attributes(&mut r);
        (status, r.u32().unwrap())
    };
    assert_eq!(ask(&c, &mine), (0, 0x01));
    assert_eq!(ask(&c, &secret), (0, 0));
    // All ones would be "no change", by which root stays root.
    c.uid = u32::MAX;
    assert_eq!(c.read(&secret, 0, 1).map(drop), denied);
    c.uid = ROOT;
    assert_eq!(ask(&c, &secret), (0, 0x0d));
    // No file lends its owner's rights.
    assert_eq!(c.set(&secret, &attributes(Some(0o6755), None)), 0);
    assert_eq!(fs::metadata(c.path("secret")).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(unsafe_ids(), (0, 0), "the thread is itself again");
}

fn unsafe_ids() -> (i32, i32) {
    // SAFETY: an id that is none changes nothing (setfsuid(2)).
    unsafe { (libc::setfsuid(u32::MAX), libc::setfsgid(u32::MAX)) }
}

#[test]
fn creations_are_done_once() {
    let c = Client::new();
    let root = c.root();
    let mut guarded = place(&root, b"f");
    guarded.u32(1).append(&attributes(Some(0o600), None));
    assert!(c.made(8, &guarded).is_ok());
    assert_eq!(c.made(8, &guarded), Err(Status::Exist as u32));
    // Unchecked, what is there stays, and is cut if that is asked for.
    fs::write(c.path("f"), "content").unwrap();
    c.create(&root, b"f").unwrap();
    assert_eq!(fs::read(c.path("f")).unwrap(), b"content");
    let mut cut = place(&root, b"f");
    cut.u32(0).append(&attributes(None, Some(0)));
    assert!(c.made(8, &cut).is_ok());
    assert_eq!(fs::read(c.path("f")).unwrap(), b"");
    let exclusive = |verifier: &[u8; 8]| {
        let mut w = place(&root, b"e");
        w.u32(2).fixed(verifier);
        c.made(8, &w)
    };
    let first = exclusive(b"\xffbcdefgh").unwrap();
    assert_eq!(exclusive(b"\xffbcdefgh").unwrap(), first, "the same asked again");
    assert_eq!(exclusive(b"another!"), Err(Status::Exist as u32));
    // The same record again is the same call again.
    let remove = c.record(100_003, 12, &bytes(&place(&root, b"e")));
    let answer = c.server.answer(&remove).unwrap();
    assert!(!c.path("e").exists());
    assert_eq!(c.server.answer(&remove).unwrap(), answer);
    assert_ne!(c.nfs(12, &place(&root, b"e")).0, 0);
}

#[test]
fn directories_are_listed_whole_however_little_is_asked_for() {
    let c = Client::new();
    let root = c.root();
    let mut wanted: Vec<String> = (0..300).map(|n| format!("file-with-a-long-name-{n}")).collect();
    for name in &wanted {
        fs::write(c.path(name), "").unwrap();
    }
    wanted.extend([".".to_owned(), "..".to_owned()]);
    wanted.sort();
    for (size, procedure) in [(512, 16), (4096, 16), (1 << 20, 16), (1024, 17), (8192, 17), (1 << 20, 17)] {
        assert_eq!(c.names(&root, size, procedure), wanted, "{size} {procedure}");
    }
    let mut w = Writer::default();
    w.opaque(&root).u64(0).u64(0).u32(64);
    assert_eq!(c.nfs(16, &w).0, Status::TooSmall as u32);
    let mut w = Writer::default();
    w.opaque(&root).u64(u64::MAX).u64(0).u32(4096);
    assert_eq!(c.nfs(16, &w).0, Status::BadCookie as u32);
}

#[test]
fn links_pipes_and_no_devices() {
    let c = Client::new();
    let root = c.root();
    let file = c.create(&root, b"f").unwrap();
    let mut w = Writer::default();
    w.opaque(&file).append(&place(&root, b"also"));
    assert_eq!(c.nfs(15, &w).0, 0);
    assert_eq!(fs::metadata(c.path("also")).unwrap().nlink(), 2);
    let special = |name: &[u8], kind: u32| {
        let mut w = place(&root, name);
        w.u32(kind).append(&attributes(Some(0o600), None));
        if matches!(kind, 3 | 4) {
            w.u32(1).u32(3);
        }
        c.made(11, &w)
    };
    let pipe = special(b"pipe", 7).unwrap();
    special(b"socket", 6).unwrap();
    for device in [3, 4] {
        assert_eq!(special(b"device", device), Err(Status::NotSupp as u32));
    }
    // Nobody waits for its other end.
    assert_eq!(c.read(&pipe, 0, 1).map(drop), Err(Status::Inval as u32));
    assert_eq!(c.write(&pipe, 0, b"x"), Status::Inval as u32);
    let mut w = place(&root, b"l");
    w.append(&attributes(None, None)).opaque(b"../anywhere");
    let link = c.made(10, &w).unwrap();
    let (status, results) = c.nfs(5, Writer::default().opaque(&link));
    let mut r = Reader::new(&results);
    skip_attributes(&mut r);
    assert_eq!((status, r.opaque(99)), (0, Ok(&b"../anywhere"[..])));
}

#[test]
fn the_disk_has_limits() {
    let c = Client::new();
    let file = c.create(&c.root(), b"f").unwrap();
    assert_eq!(c.write(&file, (1 << 20) - 1, b"x"), 0);
    assert_eq!(c.write(&file, 1 << 20, b"x"), Status::FBig as u32);
    assert_eq!(c.write(&file, u64::MAX, b"x"), Status::FBig as u32);
    assert_eq!(c.set(&file, &attributes(None, Some((1 << 20) + 1))), Status::FBig as u32);
    let full = Client::with(Limits { free_bytes: u64::MAX, ..ROOMY });
    let root = full.root();
    assert_eq!(full.create(&root, b"f"), Err(Status::NoSpc as u32));
    assert_eq!(full.mkdir(&root, b"d"), Err(Status::NoSpc as u32));
    fs::write(full.path("there"), "x").unwrap();
    let there = full.lookup(&root, b"there").unwrap();
    assert_eq!(full.write(&there, 0, b"y"), Status::NoSpc as u32);
    assert_eq!(full.nfs(12, &place(&root, b"there")).0, 0, "room is made by removing");
}

#[test]
fn what_is_not_served_is_said_so() {
    let c = Client::new();
    let front = |record: &[u8]| {
        let answer = c.server.answer(record).unwrap();
        let mut r = Reader::new(&answer);
        assert!((0..5).all(|_| r.u32().is_ok()));
        r.u32().unwrap()
    };
    assert_eq!(front(&c.record(100_227, 0, &[])), 1, "no access lists");
    let mut version = c.record(100_003, 0, &[]);
    version[19] = 4;
    assert_eq!(front(&version), 2);
    assert_eq!(front(&c.record(100_003, 22, &[])), 3);
    assert_eq!(front(&c.record(100_003, 1, &[0, 0])), 4);
    assert!(c.server.answer(b"GET / HTTP/1.1\r\n\r\n").is_none());
}

/// What a program may do to five names in a directory.
#[derive(Debug, Clone)]
enum Step {
    Create(u8),
    Write(u8, u16, Vec<u8>),
    Cut(u8, u16),
    Remove(u8),
    Rename(u8, u8),
    Mkdir(u8),
    Rmdir(u8),
}

fn steps() -> impl Strategy<Value = Step> {
    let name = 0u8..5;
    prop_oneof![
        name.clone().prop_map(Step::Create),
        (name.clone(), 0u16..3000, proptest::collection::vec(any::<u8>(), 0..50))
            .prop_map(|(n, at, data)| Step::Write(n, at, data)),
        (name.clone(), 0u16..3000).prop_map(|(n, size)| Step::Cut(n, size)),
        name.clone().prop_map(Step::Remove),
        (name.clone(), name.clone()).prop_map(|(a, b)| Step::Rename(a, b)),
        name.clone().prop_map(Step::Mkdir),
        name.prop_map(Step::Rmdir),
    ]
}

/// The simplest that it could be: names, and what files have in them; directories have nothing.
type Model = BTreeMap<u8, Option<Vec<u8>>>;

fn model_step(model: &mut Model, step: &Step) -> bool {
    match step {
        Step::Create(n) => match model.get(n) {
            Some(None) => false,
            Some(Some(_)) => true,
            None => model.insert(*n, Some(Vec::new())).is_none(),
        },
        Step::Write(n, at, data) => match model.get_mut(n) {
            Some(Some(content)) => {
                let (at, end) = (usize::from(*at), usize::from(*at) + data.len());
                if content.len() < end && !data.is_empty() {
                    content.resize(end, 0);
                }
                if !data.is_empty() {
                    content[at..end].copy_from_slice(data);
                }
                true
            }
            _ => false,
        },
        Step::Cut(n, size) => match model.get_mut(n) {
            Some(Some(content)) => {
                content.resize(usize::from(*size), 0);
                true
            }
            _ => false,
        },
        Step::Remove(n) => matches!(model.get(n), Some(Some(_))) && model.remove(n).is_some(),
        Step::Rmdir(n) => matches!(model.get(n), Some(None)) && model.remove(n).is_some(),
        Step::Mkdir(n) => !model.contains_key(n) && model.insert(*n, None).is_none(),
        Step::Rename(a, b) => {
            let fits = match (model.get(a), model.get(b)) {
                (Some(_), _) if a == b => true,
                (Some(_), None) => true,
                (Some(x), Some(y)) => x.is_some() == y.is_some(),
                (None, _) => false,
            };
            if fits && let Some(moved) = model.remove(a) {
                model.insert(*b, moved);
            }
            fits
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn it_does_what_a_simple_model_does(steps in proptest::collection::vec(steps(), 1..40)) {
        let c = Client::new();
        let root = c.root();
        let mut model = Model::new();
        for step in &steps {
            let with = |n: &u8, f: &dyn Fn(&[u8]) -> u32| c.lookup(&root, &[b'a' + n]).is_ok_and(|h| f(&h) == 0);
            let done = match step {
                Step::Create(n) => c.create(&root, &[b'a' + n]).is_ok(),
                Step::Write(n, at, data) => with(n, &|h| c.write(h, u64::from(*at), data)),
                Step::Cut(n, size) => with(n, &|h| c.set(h, &attributes(None, Some(u64::from(*size))))),
                Step::Remove(n) => c.nfs(12, &place(&root, &[b'a' + n])).0 == 0,
                Step::Rmdir(n) => c.nfs(13, &place(&root, &[b'a' + n])).0 == 0,
                Step::Mkdir(n) => c.mkdir(&root, &[b'a' + n]).is_ok(),
                Step::Rename(a, b) => c.rename(&[b'a' + a], &[b'a' + b]) == 0,
            };
            prop_assert_eq!(done, model_step(&mut model, step), "{:?}", step);
        }
        for n in 0..5 {
            let there = c.lookup(&root, &[b'a' + n]);
            match model.get(&n) {
                None => prop_assert!(there.is_err()),
                Some(None) => prop_assert_eq!(c.names(&there.unwrap(), 4096, 16), [".", ".."]),
                Some(Some(content)) => prop_assert_eq!(&c.read(&there.unwrap(), 0, 8000).unwrap().0, content),
            }
        }
    }
}
