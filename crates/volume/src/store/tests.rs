use std::io::Read;
use std::os::unix::fs::{MetadataExt, symlink};

use super::*;

struct Made {
    dir: tempfile::TempDir,
    volumes: Volumes,
    id: Uuid,
}

fn made() -> Made {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { file_bytes: 100, entries: 50, depth: 8 };
    let volumes = Volumes::open(dir.path().join("volumes"), limits).unwrap();
    let id = Uuid::new_v4();
    volumes.create(id).unwrap();
    Made { dir, volumes, id }
}

fn path(text: &str) -> VolumePath {
    VolumePath::parse(text).unwrap()
}

impl Made {
    fn put(&self, at: &str, text: &str, force: bool) -> Result<(), VolumeError> {
        let mut upload = self.volumes.write(self.id, &path(at), Attributes::default(), force)?;
        upload.write(text.as_bytes())?;
        upload.finish()
    }

    fn get(&self, at: &str) -> Result<String, VolumeError> {
        let (mut file, size) = self.volumes.read(self.id, &path(at))?;
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text.len() as u64, size);
        Ok(text)
    }

    fn host(&self, at: &str) -> PathBuf {
        self.volumes.path_of(self.id).join(at)
    }

    fn names(&self, at: &str, depth: u32) -> Vec<String> {
        self.volumes.list(self.id, &path(at), depth).unwrap().into_iter().map(|e| e.path).collect()
    }
}

#[test]
fn files_are_written_whole_and_replaced_only_when_that_is_asked_for() {
    let m = made();
    m.put("/a", "one", false).unwrap();
    assert!(matches!(m.put("/a", "two", false), Err(VolumeError::Exists(p)) if p == "/a"));
    assert_eq!(m.get("a").unwrap(), "one");
    m.put("/a", "two", true).unwrap();
    assert_eq!(m.get("/a").unwrap(), "two");
    assert!(matches!(m.put("/none/b", "", false), Err(VolumeError::NotFound(_))));
    assert!(matches!(m.put("/", "", true), Err(VolumeError::NotAFile(_))));
    // Broken off, and too large: the old one stays and nothing is left.
    let mut upload = m.volumes.write(m.id, &path("/a"), Attributes::default(), true).unwrap();
    upload.write(b"three").unwrap();
    assert_eq!(m.names("/", 1), ["/a"], "drafts are not listed");
    drop(upload);
    assert!(matches!(m.put("/a", &"x".repeat(101), true), Err(VolumeError::TooMuch { limit: 100, .. })));
    assert_eq!(m.get("/a").unwrap(), "two");
    assert_eq!(std::fs::read_dir(m.host("")).unwrap().count(), 1);
    // One that came while another was written.
    let upload = m.volumes.write(m.id, &path("/b"), Attributes::default(), false).unwrap();
    m.put("/b", "first", false).unwrap();
    assert!(matches!(upload.finish(), Err(VolumeError::Exists(_))));
    assert_eq!(m.get("/b").unwrap(), "first");
}

#[test]
fn directories_are_made_listed_and_removed() {
    let m = made();
    let none = Attributes::default();
    assert!(matches!(m.volumes.make_dir(m.id, &path("/a/b/c"), none, false), Err(VolumeError::NotFound(_))));
    let mine = Attributes { mode: Some(0o6750), uid: Some(1000), gid: Some(1001) };
    let made = m.volumes.make_dir(m.id, &path("/a/b/c"), mine, true).unwrap();
    assert_eq!((made.kind, made.mode, made.uid, made.gid), (Kind::Directory, 0o750, 1000, 1001));
    assert!(matches!(m.volumes.make_dir(m.id, &path("/a"), none, false), Err(VolumeError::Exists(_))));
    m.volumes.make_dir(m.id, &path("/a"), none, true).unwrap();
    m.put("/a/f", "x", false).unwrap();
    assert!(matches!(m.volumes.make_dir(m.id, &path("/a/f"), none, true), Err(VolumeError::Exists(_))));
    assert!(matches!(
        m.volumes.make_dir(m.id, &path("/a/f/g"), none, true),
        Err(VolumeError::NotADirectory(_))
    ));
    assert_eq!(m.names("/", 1), ["/a"]);
    assert_eq!(m.names("/", 3), ["/a", "/a/b", "/a/b/c", "/a/f"]);
    assert_eq!(m.names("/a", 1), ["/a/b", "/a/f"]);
    for depth in [0, 9] {
        assert!(matches!(m.volumes.list(m.id, &path("/"), depth), Err(VolumeError::Depth(..))));
    }
    assert!(matches!(m.volumes.list(m.id, &path("/a/f"), 1), Err(VolumeError::NotADirectory(_))));
    assert!(matches!(m.volumes.read(m.id, &path("/a")), Err(VolumeError::NotAFile(_))));
    m.volumes.remove(m.id, &path("/a")).unwrap();
    assert!(m.names("/", 8).is_empty());
    assert!(matches!(m.volumes.remove(m.id, &path("/a")), Err(VolumeError::NotFound(_))));
    assert!(matches!(m.volumes.remove(m.id, &path("/x/..")), Err(VolumeError::Root)));
    for n in 0..51 {
        std::fs::write(m.host(&n.to_string()), "").unwrap();
    }
    assert!(matches!(m.volumes.list(m.id, &path("/"), 1), Err(VolumeError::TooMuch { limit: 50, .. })));
}

#[test]
fn owner_and_mode_change() {
    let m = made();
    m.put("/a", "x", false).unwrap();
    let plain = m.volumes.stat(m.id, &path("/a"), true).unwrap();
    assert_eq!((plain.mode, plain.uid, plain.size, plain.kind), (0o644, 0, 1, Kind::File));
    let to = Attributes { mode: Some(0o600), uid: Some(5), gid: None };
    let changed = m.volumes.update(m.id, &path("/a"), to).unwrap();
    assert_eq!((changed.mode, changed.uid, changed.gid), (0o600, 5, 0));
    let again = m.volumes.update(m.id, &path("/a"), Attributes::default()).unwrap();
    assert_eq!((again.mode, again.uid), (0o600, 5));
    let root = m.volumes.update(m.id, &path("/"), Attributes { mode: Some(0o700), ..to }).unwrap();
    assert_eq!((root.mode, root.name.as_str()), (0o700, "/"));
    assert!(matches!(m.volumes.update(m.id, &path("/no"), to), Err(VolumeError::NotFound(_))));
}

/// A guest may make any link, and none of them leads out, by no call.
#[test]
fn links_do_not_lead_out() {
    let m = made();
    let outside = m.dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "s").unwrap();
    let before = std::fs::metadata(outside.join("secret")).unwrap();
    let up = "../".repeat(30);
    for (name, to) in [
        ("absolute", outside.display().to_string()),
        ("relative", format!("{up}{}", outside.display())),
        ("file", outside.join("secret").display().to_string()),
        ("proc", "/proc/self/root".to_owned()),
        ("loop", "loop".to_owned()),
        ("parent", "..".to_owned()),
    ] {
        symlink(to, m.host(name)).unwrap();
    }
    let none = Attributes::default();
    for at in [
        "/absolute/secret",
        "/relative/secret",
        "/file",
        "/loop",
        "/parent/outside/secret",
        "/proc/etc/passwd",
    ] {
        assert!(m.get(at).is_err(), "{at}");
        assert!(m.volumes.stat(m.id, &path(at), true).is_err(), "{at}");
    }
    for at in ["/absolute/new", "/relative/new", "/proc/tmp/new", "/parent/../outside/new"] {
        assert!(m.put(at, "x", true).is_err(), "{at}");
        assert!(m.volumes.make_dir(m.id, &path(at), none, false).is_err(), "{at}");
        assert!(m.volumes.remove(m.id, &path(at)).is_err(), "{at}");
    }
    // A link itself is seen, changed, replaced and removed, and what it leads to stays.
    let seen = m.volumes.stat(m.id, &path("/file"), false).unwrap();
    assert_eq!((seen.kind, seen.target.as_deref()), (Kind::Symlink, outside.join("secret").to_str()));
    m.volumes
        .update(m.id, &path("/file"), Attributes { mode: Some(0o777), uid: Some(7), gid: None })
        .unwrap();
    m.put("/file", "mine", true).unwrap();
    assert_eq!(m.get("/file").unwrap(), "mine");
    assert_eq!(m.names("/", 8).len(), 6);
    for at in ["/absolute", "/relative", "/proc", "/loop", "/parent"] {
        m.volumes.remove(m.id, &path(at)).unwrap();
    }
    let after = std::fs::metadata(outside.join("secret")).unwrap();
    assert_eq!((before.uid(), before.mode(), before.len()), (after.uid(), after.mode(), after.len()));
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
}

/// One that leads to somewhere within its volume is followed.
#[test]
fn links_within_a_volume_work() {
    let m = made();
    m.volumes.make_dir(m.id, &path("/d"), Attributes::default(), false).unwrap();
    m.put("/d/f", "x", false).unwrap();
    symlink("/d", m.host("l")).unwrap();
    assert_eq!(m.get("/l/f").unwrap(), "x");
    m.put("/l/g", "y", false).unwrap();
    assert_eq!(m.get("/d/g").unwrap(), "y");
}

#[test]
fn pipes_and_devices_are_not_read() {
    let m = made();
    rustix::fs::mknodat(rustix::fs::CWD, m.host("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    assert!(matches!(m.get("/pipe"), Err(VolumeError::NotAFile(_))));
    assert_eq!(m.volumes.stat(m.id, &path("/pipe"), true).unwrap().kind, Kind::Other);
}

/// `deep/deep/deep…`, as guests make it by handles: no path is as long.
fn make_deep(m: &Made, levels: usize) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut fd = rustix::fs::open(m.host(""), flags, Mode::empty()).unwrap();
    for n in 0..levels {
        mkdirat(&fd, "deep", Mode::RWXU).unwrap();
        if n % 100 == 0 {
            drop(rustix::fs::openat(&fd, "f", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap());
        }
        fd = rustix::fs::openat(&fd, "deep", flags, Mode::empty()).unwrap();
    }
}

#[test]
fn a_tree_of_any_depth_is_removed() {
    let m = made();
    make_deep(&m, 3000);
    m.volumes.remove(m.id, &path("/deep")).unwrap();
    assert_eq!(m.names("/", 1), ["/f"]);
    make_deep(&m, 20_000);
    m.volumes.delete(m.id).unwrap();
    assert_eq!(std::fs::read_dir(&m.volumes.root).unwrap().count(), 0);
}

#[test]
fn the_key_of_handles_is_made_once_and_is_the_owners() {
    let m = made();
    let key = m.volumes.handle_key().unwrap();
    assert_eq!(m.volumes.handle_key().unwrap(), key);
    let file = m.volumes.root.join("handles.key");
    assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
    std::fs::write(&file, "short").unwrap();
    assert!(m.volumes.handle_key().unwrap_err().to_string().contains("32 bytes"));
    assert_ne!(made().volumes.handle_key().unwrap(), key);
    m.volumes.reclaim().unwrap();
    assert!(file.exists());
}

#[test]
fn volumes_come_and_go() {
    let m = made();
    m.volumes.create(m.id).unwrap();
    m.put("/a", "x", false).unwrap();
    let other = Uuid::new_v4();
    assert!(matches!(m.volumes.stat(other, &path("/"), true), Err(VolumeError::NoVolume(_))));
    assert!(matches!(m.volumes.delete(other), Err(VolumeError::NoVolume(_))));
    m.volumes.delete(m.id).unwrap();
    assert!(matches!(m.get("/a"), Err(VolumeError::NoVolume(_))));
    // As if a deletion had been cut off.
    std::fs::create_dir_all(m.volumes.root.join("x.deleted/y")).unwrap();
    m.volumes.reclaim().unwrap();
    assert_eq!(std::fs::read_dir(&m.volumes.root).unwrap().count(), 0);
    let mode = std::fs::metadata(&m.volumes.root).unwrap().mode();
    assert_eq!(mode & 0o777, 0o700);
}
