//! The store's promises, on a real directory.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    sync::Arc,
};

use nidus_storage::{Artifact, BuildId, LocalStore, StagedBuild, StorageError};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use tempfile::TempDir;

fn store() -> (TempDir, LocalStore) {
    let dir = TempDir::new().unwrap();
    let store = LocalStore::open(dir.path().join("templates")).unwrap();
    (dir, store)
}

async fn stage(store: &LocalStore, build: BuildId, text: &str) -> StagedBuild {
    let staged = store.stage(build).await.unwrap();
    staged.write(Artifact::Metadata, text).await.unwrap();
    staged.write(Artifact::Rootfs, vec![7; 8192]).await.unwrap();
    staged
}

fn staging_is_empty(store: &LocalStore) -> bool {
    fs::read_dir(store.root().join(".staging")).unwrap().next().is_none()
}

#[tokio::test]
async fn a_build_appears_whole_and_read_only_when_committed() {
    let (_dir, store) = store();
    let build = BuildId::random();
    let staged = stage(&store, build, "{}").await;
    assert!(!store.exists(build).await.unwrap());
    assert!(store.list().await.unwrap().is_empty());
    // As a VMM under its own user leaves it.
    fs::set_permissions(staged.path(Artifact::Rootfs), fs::Permissions::from_mode(0o666)).unwrap();
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(staged.path(Artifact::Rootfs), Some(65534), Some(65534)).unwrap();
    }
    staged.commit().await.unwrap();

    assert!(store.exists(build).await.unwrap());
    assert_eq!(store.list().await.unwrap(), [build]);
    assert_eq!(fs::read(store.path(build, Artifact::Rootfs)).unwrap(), vec![7; 8192]);
    for (path, mode) in [
        (store.dir(build), 0o755),
        (store.path(build, Artifact::Rootfs), 0o444),
        (store.path(build, Artifact::Metadata), 0o444),
        (store.path(build, Artifact::Checksums), 0o444),
    ] {
        let meta = fs::metadata(&path).unwrap();
        assert_eq!(meta.mode() & 0o7777, mode, "{}", path.display());
        assert_eq!(meta.uid(), nix::unistd::geteuid().as_raw(), "{}", path.display());
    }
    assert!(staging_is_empty(&store));
}

#[tokio::test]
async fn the_first_commit_wins_and_the_second_changes_nothing() {
    let (_dir, store) = store();
    let build = BuildId::random();
    let (first, second) = (stage(&store, build, "first").await, stage(&store, build, "second").await);
    let (a, b) = tokio::join!(first.commit(), second.commit());
    let loser = a.and(b).unwrap_err();
    assert!(matches!(loser, StorageError::AlreadyExists(id) if id == build), "{loser}");
    let kept = fs::read_to_string(store.path(build, Artifact::Metadata)).unwrap();
    assert!(["first", "second"].contains(&kept.as_str()));
    assert!(matches!(store.stage(build).await, Err(StorageError::AlreadyExists(_))));
    assert!(staging_is_empty(&store));
}

#[tokio::test]
async fn a_dropped_staging_leaves_nothing() {
    let (_dir, store) = store();
    let build = BuildId::random();
    drop(stage(&store, build, "{}").await);
    assert!(staging_is_empty(&store));
    assert!(!store.exists(build).await.unwrap());
}

#[tokio::test]
async fn what_is_not_a_build_is_refused() {
    let (_dir, store) = store();
    let build = BuildId::random();

    let bare = store.stage(build).await.unwrap();
    bare.write(Artifact::Memfile, "x").await.unwrap();
    let error = bare.commit().await.unwrap_err();
    assert!(matches!(error, StorageError::Incomplete { artifact: Artifact::Metadata, .. }), "{error}");

    let linked = stage(&store, build, "{}").await;
    symlink("/etc/passwd", linked.path(Artifact::Snapfile)).unwrap();
    assert!(matches!(linked.commit().await, Err(StorageError::Unexpected { .. })));

    let hard = stage(&store, build, "{}").await;
    fs::hard_link(hard.path(Artifact::Rootfs), hard.path(Artifact::Memfile)).unwrap();
    assert!(matches!(hard.commit().await, Err(StorageError::Unexpected { .. })));

    let extra = stage(&store, build, "{}").await;
    fs::write(extra.dir().join("qmp.sock"), "").unwrap();
    assert!(matches!(extra.commit().await, Err(StorageError::Unexpected { .. })));

    // Sums are the store's to make.
    let summed = stage(&store, build, "{}").await;
    summed.write(Artifact::Checksums, "x").await.unwrap();
    assert!(matches!(summed.commit().await, Err(StorageError::Unexpected { .. })));

    assert!(matches!(store.stage(BuildId::NIL).await, Err(StorageError::NilId)));
    assert!(store.list().await.unwrap().is_empty());
    assert!(staging_is_empty(&store));
}

#[tokio::test]
async fn removing_frees_the_id_and_keeps_open_files_readable() {
    let (_dir, store) = store();
    let build = BuildId::random();
    stage(&store, build, "{}").await.commit().await.unwrap();
    let mut open = fs::File::open(store.path(build, Artifact::Rootfs)).unwrap();
    store.remove(build).await.unwrap();
    assert!(!store.exists(build).await.unwrap());
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut open, &mut bytes).unwrap();
    assert_eq!(bytes, vec![7; 8192]);
    assert!(matches!(store.remove(build).await, Err(StorageError::NotFound(_))));
    stage(&store, build, "again").await.commit().await.unwrap();
    assert!(staging_is_empty(&store));
}

#[tokio::test]
async fn a_small_artifact_is_read_whole_or_not_at_all() {
    let (_dir, store) = store();
    let build = BuildId::random();
    stage(&store, build, "contents").await.commit().await.unwrap();
    assert_eq!(store.read(build, Artifact::Metadata).await.unwrap(), b"contents");
    let missing = store.read(build, Artifact::Snapfile).await.unwrap_err();
    assert!(missing.is_damage() && matches!(missing, StorageError::NoArtifact { .. }), "{missing}");
    assert_eq!(missing.to_string(), format!("build {build} has no snapfile"));
    let other = BuildId::random();
    assert!(
        matches!(store.read(other, Artifact::Metadata).await, Err(StorageError::NotFound(b)) if b == other)
    );

    let path = store.path(build, Artifact::Metadata);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&path, "contentz").unwrap();
    let flipped = store.read(build, Artifact::Metadata).await.unwrap_err().to_string();
    assert_eq!(
        flipped,
        format!("metadata.json of build {build} is damaged at offset 0: the checksum is wrong")
    );
    // A build that was removed and published again has other sums.
    store.remove(build).await.unwrap();
    stage(&store, build, "new").await.commit().await.unwrap();
    assert_eq!(store.read(build, Artifact::Metadata).await.unwrap(), b"new");
}

#[tokio::test]
async fn a_range_is_read_exactly_or_not_at_all() {
    let (_dir, store) = store();
    let build = BuildId::random();
    let staged = stage(&store, build, "{}").await;
    let content: Vec<u8> = (0..10_000u32).map(|n| (n % 251) as u8).collect();
    staged.write(Artifact::Memfile, content.clone()).await.unwrap();
    staged.commit().await.unwrap();
    assert!(store.find_artifact(build, Artifact::Snapfile).unwrap().is_none());
    assert!(store.find_artifact(BuildId::random(), Artifact::Memfile).unwrap().is_none());
    let memfile = Arc::new(store.find_artifact(build, Artifact::Memfile).unwrap().unwrap());
    for (start, end) in [(0, 10_000), (0, 1), (4095, 4097), (4096, 8192), (5, 9_999), (9_999, 10_000), (7, 7)]
    {
        let bytes = memfile.read_range(start..end).await.unwrap();
        assert!(bytes == content[start as usize..end as usize], "{start}..{end}");
    }
    assert_eq!(memfile.read_range(9_998..20_000).await.unwrap(), content[9_998..]);
    assert!(memfile.read_range(20_000..30_000).await.unwrap().is_empty());

    let path = store.path(build, Artifact::Memfile);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let mut flipped = content.clone();
    flipped[8192] ^= 1;
    fs::write(&path, flipped).unwrap();
    assert!(memfile.read_range(0..8192).await.unwrap() == content[..8192]);
    let damaged = memfile.read_range(8200..8201).await.unwrap_err().to_string();
    assert_eq!(damaged, format!("memfile of build {build} is damaged at offset 8192: the checksum is wrong"));
}

#[tokio::test]
async fn reclaim_removes_what_a_killed_process_left_and_no_build() {
    let (_dir, store) = store();
    let (whole, half) = (BuildId::random(), BuildId::random());
    stage(&store, whole, "{}").await.commit().await.unwrap();
    // A killed process runs no Drop.
    std::mem::forget(stage(&store, half, "{}").await);
    fs::create_dir(store.root().join("not-a-build")).unwrap();
    assert_eq!(store.reclaim().await.unwrap(), 1);
    assert_eq!(store.reclaim().await.unwrap(), 0);
    assert_eq!(store.list().await.unwrap(), [whole]);
    assert!(staging_is_empty(&store));
}

/// Runs `test` in a thread with a mount namespace of its own, whose mounts go with the thread.
fn in_own_mount_namespace(test: impl FnOnce() + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: mounting a small tmpfs needs root");
        return;
    }
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        test();
    })
    .join()
    .unwrap();
}

#[test]
fn a_full_disk_is_named_with_the_path() {
    in_own_mount_namespace(|| {
        let dir = TempDir::new().unwrap();
        mount(Some("nidus-test"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some("size=256k")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let store = LocalStore::open(dir.path().join("templates")).unwrap();
            let staged = store.stage(BuildId::random()).await.unwrap();
            let error = staged.write(Artifact::Memfile, vec![1; 1 << 20]).await.unwrap_err();
            assert!(error.is_disk_full(), "{error}");
            let text = error.to_string();
            assert!(text.contains("no space left") && text.contains("memfile"), "{text}");
        });
        drop(runtime);
        nix::mount::umount(dir.path()).unwrap();
    });
}
