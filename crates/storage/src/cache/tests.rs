use super::*;

fn key(build: BuildId, frame: u32) -> FrameKey {
    FrameKey { build, artifact: Artifact::Memfile, frame }
}

fn files(dir: &Path) -> usize {
    walk(dir).len()
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(walk(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found
}

#[test]
fn the_frames_used_longest_ago_make_room() {
    let dir = tempfile::TempDir::new().unwrap();
    let cache = FrameCache::open(dir.path(), 3 * BLOCK).unwrap();
    let build = BuildId::random();
    for frame in 0..3 {
        assert!(cache.put(&key(build, frame), &[frame as u8; 100]));
    }
    assert_eq!(cache.get(&key(build, 0)).unwrap(), [0; 100]);
    assert!(cache.put(&key(build, 3), &[3; 100]));
    assert_eq!(cache.get(&key(build, 1)), None);
    assert_eq!([0, 2, 3].map(|n| cache.get(&key(build, n)).unwrap()[0]), [0, 2, 3]);
    assert_eq!((cache.used(), files(dir.path())), (3 * BLOCK, 3));
    // Larger than all of it: nothing goes for that.
    assert!(!cache.put(&key(build, 9), &vec![0; 4 * BLOCK as usize]));
    assert_eq!((cache.used(), files(dir.path())), (3 * BLOCK, 3));
}

#[test]
fn what_is_pinned_stays() {
    let dir = tempfile::TempDir::new().unwrap();
    let cache = FrameCache::open(dir.path(), 2 * BLOCK).unwrap();
    let [used, idle] = [(); 2].map(|()| BuildId::random());
    assert!(cache.put(&key(used, 0), &[1]));
    let pin = cache.pin(used);
    let second = cache.pin(used);
    assert!(cache.put(&key(idle, 0), &[1]));
    assert!(cache.put(&key(used, 1), &[1]), "an idle frame makes room");
    assert_eq!(cache.get(&key(idle, 0)), None);
    assert!(!cache.put(&key(idle, 0), &[1]), "all that is there is in use");
    drop(pin);
    assert!(!cache.put(&key(idle, 0), &[1]), "another still uses it");
    drop(second);
    assert!(cache.put(&key(idle, 0), &[1]));
    assert_eq!(cache.get(&key(used, 0)), None);
    assert_eq!(files(dir.path()), 2);
}

#[test]
fn a_restart_finds_the_frames_and_removes_what_was_being_written() {
    let dir = tempfile::TempDir::new().unwrap();
    let build = BuildId::random();
    let cache = FrameCache::open(dir.path(), 10 * BLOCK).unwrap();
    for frame in 0..4 {
        assert!(cache.put(&key(build, frame), &[frame as u8]));
        let file = fs::File::open(cache.path(&key(build, frame))).unwrap();
        let age = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(frame.into());
        file.set_times(fs::FileTimes::new().set_modified(age)).unwrap();
    }
    drop(cache);
    fs::write(dir.path().join(TEMPORARY).join("torn"), "x").unwrap();
    fs::write(dir.path().join("foreign"), "x").unwrap();
    fs::write(dir.path().join(build.to_string()).join("memfile.1"), "not a name of ours").unwrap();

    let cache = FrameCache::open(dir.path(), 3 * BLOCK).unwrap();
    assert_eq!(cache.used(), 3 * BLOCK);
    assert_eq!(cache.get(&key(build, 0)), None, "the oldest made room");
    assert_eq!(cache.get(&key(build, 3)).unwrap(), [3]);
    assert!(!dir.path().join(TEMPORARY).join("torn").exists());
    assert!(dir.path().join("foreign").exists());
    cache.forget(build);
    assert_eq!((cache.used(), files(dir.path())), (0, 2));
}

#[test]
fn a_file_that_someone_removed_is_a_miss() {
    let dir = tempfile::TempDir::new().unwrap();
    let build = BuildId::random();
    let cache = FrameCache::open(dir.path(), 10 * BLOCK).unwrap();
    assert!(cache.put(&key(build, 0), &[7]));
    fs::remove_dir_all(dir.path().join(build.to_string())).unwrap();
    assert_eq!(cache.get(&key(build, 0)), None);
    assert_eq!(cache.used(), 0);
    assert!(cache.put(&key(build, 0), &[7]), "its directory is made again");
    assert_eq!(cache.get(&key(build, 0)).unwrap(), [7]);
}

/// Many threads put and get with little room: what is got is what was put, and the bound holds.
#[test]
fn it_holds_under_threads() {
    let dir = tempfile::TempDir::new().unwrap();
    let cache = FrameCache::open(dir.path(), 8 * BLOCK).unwrap();
    let build = BuildId::random();
    std::thread::scope(|threads| {
        for seed in 0..4u32 {
            let cache = &cache;
            threads.spawn(move || {
                for n in 0..500u32 {
                    let frame = (n * 7 + seed * 13) % 20;
                    match cache.get(&key(build, frame)) {
                        Some(bytes) => assert_eq!(bytes, [frame as u8; 50]),
                        None => drop(cache.put(&key(build, frame), &[frame as u8; 50])),
                    }
                    assert!(cache.used() <= 8 * BLOCK);
                }
            });
        }
    });
    drop(cache);
    let cache = FrameCache::open(dir.path(), 8 * BLOCK).unwrap();
    assert!(cache.used() <= 8 * BLOCK && cache.used() == files(dir.path()) as u64 * BLOCK);
}
