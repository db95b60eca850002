//! Uploads, removals and sweeps that end at every possible step.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use nidus_storage::{
    Artifact, BuildId, StorageError,
    remote::{RemoteError, RemoteOptions, RemoteStore, Sweep},
};
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, path::Path};
use support::{Faulty, Local, SMALL, content};
use tempfile::TempDir;

async fn local() -> Local {
    Local::with(&[
        (Artifact::Memfile, content(1, 400_000)),
        (Artifact::MemfileHeader, content(2, 100)),
        (Artifact::Rootfs, content(3, 123_457)),
        (Artifact::Snapfile, Vec::new()),
    ])
    .await
}

fn everything() -> Sweep {
    Sweep { older_than: Duration::ZERO, keep: HashSet::new(), dry_run: false }
}

async fn objects(store: &Arc<Faulty>) -> Vec<Path> {
    use futures::TryStreamExt;
    store.list(None).map_ok(|o| o.location).try_collect().await.unwrap()
}

#[tokio::test]
async fn a_build_is_read_as_it_was_uploaded_and_uploaded_once() {
    let (local, store) = (local().await, Faulty::new(Duration::ZERO));
    let remote = store.remote();
    assert!(matches!(remote.manifest(local.build).await, Err(RemoteError::NotFound(b)) if b == local.build));
    let first = remote.upload(&local.store, local.build, SMALL).await.unwrap();
    assert!(first.sent > 10 && first.kept == 0, "{first:?}");
    assert_eq!(remote.list().await.unwrap(), [local.build]);
    assert!(remote.exists(local.build).await.unwrap());
    local.assert_whole(&remote).await;

    let puts = store.puts.load(SeqCst);
    assert_eq!(remote.upload(&local.store, local.build, SMALL).await.unwrap(), Default::default());
    assert_eq!(store.puts.load(SeqCst), puts);
    let missing = remote.upload(&local.store, BuildId::random(), SMALL).await.unwrap_err();
    assert!(
        matches!(&missing, RemoteError::Local(e) if matches!(**e, StorageError::NotFound(_))),
        "{missing}"
    );
}

/// An upload dies at its first, second, ... operation; the next one finds what was sent.
#[tokio::test]
async fn an_upload_that_dies_anywhere_is_invisible_and_resumed() {
    let local = local().await;
    for effect in [false, true] {
        let mut resumed = 0;
        for step in 0.. {
            let store = Faulty::new(Duration::ZERO);
            let remote = store.remote();
            store.fail_after(step, effect);
            let died = remote.upload(&local.store, local.build, SMALL).await;
            let died = match died {
                // The last step is the removal of the mark, whose failure is only logged.
                Ok(_) => {
                    assert!(step > 15, "{step}");
                    break;
                }
                Err(e) => e,
            };
            assert!(died.to_string().contains("told to fail"), "{died}");
            store.fail_after(u64::MAX, false);
            let visible = remote.exists(local.build).await.unwrap();
            if visible {
                // Only if the manifest itself was written and its answer lost.
                assert!(effect);
                local.assert_whole(&remote).await;
                continue;
            }
            assert_eq!(remote.list().await.unwrap(), []);
            assert!(matches!(remote.manifest(local.build).await, Err(RemoteError::NotFound(_))));

            let there = objects(&store).await.iter().filter(|p| p.filename() != Some("upload")).count();
            let done = remote.upload(&local.store, local.build, SMALL).await.unwrap();
            assert_eq!(done.kept, there, "what is there is not sent again, at step {step}");
            resumed += done.kept;
            local.assert_whole(&remote).await;
            assert_eq!(remote.sweep(&everything()).await.unwrap(), [], "nothing is left over");
        }
        assert!(resumed > 100, "{resumed}");
    }
}

#[tokio::test]
async fn what_a_dead_upload_left_is_found_and_removed() {
    let (local, store) = (local().await, Faulty::new(Duration::ZERO));
    let remote = store.remote();
    store.fail_after(8, false);
    remote.upload(&local.store, local.build, SMALL).await.unwrap_err();
    store.fail_after(u64::MAX, false);
    let count = objects(&store).await.len();
    assert!(count > 2);

    let young = Sweep { older_than: Duration::from_secs(3600), ..everything() };
    assert_eq!(remote.sweep(&young).await.unwrap(), [], "someone may be at work");
    let kept = Sweep { keep: [local.build].into(), ..everything() };
    assert_eq!(remote.sweep(&kept).await.unwrap(), [], "it is still to be uploaded");
    let dry = remote.sweep(&Sweep { dry_run: true, ..everything() }).await.unwrap();
    assert_eq!((dry.len(), dry[0].build, dry[0].published), (1, local.build, false));
    assert_eq!((dry[0].objects, objects(&store).await.len()), (count, count));
    assert_eq!(remote.sweep(&everything()).await.unwrap(), dry);
    assert_eq!(objects(&store).await, []);
}

#[tokio::test]
async fn a_sweep_leaves_builds_whole_and_takes_what_they_do_not_name() {
    let (local, store) = (local().await, Faulty::new(Duration::ZERO));
    let remote = store.remote();
    remote.upload(&local.store, local.build, SMALL).await.unwrap();
    let order = nidus_storage::remote::AccessOrder::new([3, 1]);
    remote.put_order(local.build, Artifact::Memfile, &order).await.unwrap();
    let stray = Path::from(format!("data/{}/memfile.00112233445566778899aabbccddeeff", local.build));
    store.put(&stray, PutPayload::from_static(b"of another cut")).await.unwrap();
    let found = remote.sweep(&everything()).await.unwrap();
    assert_eq!((found.len(), found[0].objects, found[0].bytes, found[0].published), (1, 1, 14, true));
    local.assert_whole(&remote).await;
    assert_eq!(remote.order(local.build, Artifact::Memfile).await.unwrap(), Some(order));
    assert_eq!(remote.order(local.build, Artifact::Rootfs).await.unwrap(), None);
}

#[tokio::test]
async fn what_is_uploaded_is_marked_as_its_owners() {
    let (local, store) = (local().await, Faulty::new(Duration::ZERO));
    let [a, b] = [(); 2].map(|()| uuid::Uuid::new_v4());
    let mine = store.remote().owned_by(a);
    mine.upload(&local.store, local.build, SMALL).await.unwrap();
    assert_eq!(mine.sweep(&everything()).await.unwrap(), [], "a mark is not left over");
    let held = mine.inventory().await.unwrap().remove(&local.build).unwrap();
    assert_eq!(held.owners, [a]);
    let mut bytes = 0;
    for path in objects(&store).await {
        bytes += store.head(&path).await.unwrap().size;
    }
    assert_eq!(held.bytes, bytes);
    // What is there is not another's by its uploading it too, unless it really does.
    let other = store.remote().owned_by(b);
    other.upload(&local.store, local.build, SMALL).await.unwrap();
    assert_eq!(other.inventory().await.unwrap()[&local.build], held);
    other.upload_again(&local.store, local.build, SMALL).await.unwrap();
    let owners = &other.inventory().await.unwrap()[&local.build].owners;
    assert!(owners.len() == 2 && owners.contains(&a) && owners.contains(&b), "{owners:?}");
    mine.remove(local.build).await.unwrap();
    assert_eq!(objects(&store).await, []);
    // Objects without a manifest are no build.
    store.fail_after(8, false);
    mine.upload(&local.store, local.build, SMALL).await.unwrap_err();
    store.fail_after(u64::MAX, false);
    assert!(!objects(&store).await.is_empty() && mine.inventory().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_build_that_is_damaged_here_is_not_uploaded() {
    let (local, store) = (local().await, Faulty::new(Duration::ZERO));
    let path = local.store.path(local.build, Artifact::Rootfs);
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[77_777] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = store.remote().upload(&local.store, local.build, SMALL).await.unwrap_err();
    assert!(matches!(&error, RemoteError::Local(e) if e.is_damage()), "{error}");
    assert!(error.to_string().contains("rootfs.ext4"), "{error}");
    assert!(!store.remote().exists(local.build).await.unwrap());
}

/// A sweep by someone whose clock is wrong removes objects under a running upload.
#[tokio::test]
async fn an_upload_whose_objects_vanish_does_not_publish() {
    let (local, store) = (local().await, Faulty::new(Duration::from_millis(2)));
    let remote = store.remote();
    let slow = nidus_storage::remote::UploadOptions { parallel: 1, ..SMALL };
    let upload = tokio::spawn({
        let (remote, local, build) = (remote.clone(), local.store.clone(), local.build);
        async move { remote.upload(&local, build, slow).await }
    });
    while store.puts.load(SeqCst) < 10 {
        tokio::task::yield_now().await;
    }
    remote.sweep(&everything()).await.unwrap();
    let error = upload.await.unwrap().unwrap_err();
    assert!(matches!(error, RemoteError::Vanished { .. }) && error.is_passing(), "{error}");
    assert!(!remote.exists(local.build).await.unwrap());
    remote.upload(&local.store, local.build, slow).await.unwrap();
    local.assert_whole(&remote).await;
}

#[tokio::test]
async fn a_removal_that_dies_anywhere_hides_the_build_and_is_resumed() {
    let local = local().await;
    for step in 0.. {
        let store = Faulty::new(Duration::ZERO);
        let remote = store.remote();
        remote.upload(&local.store, local.build, SMALL).await.unwrap();
        let all = objects(&store).await.len();
        store.fail_after(step, false);
        let died = remote.remove(local.build).await.is_err();
        store.fail_after(u64::MAX, false);
        let left = objects(&store).await.len();
        if remote.exists(local.build).await.unwrap() {
            assert_eq!(left, all, "step {step}");
            local.assert_whole(&remote).await;
        }
        if !died {
            assert!(step > 10, "{step}");
            break;
        }
        if step % 2 == 0 || remote.exists(local.build).await.unwrap() {
            remote.remove(local.build).await.unwrap();
        } else {
            remote.sweep(&everything()).await.unwrap();
        }
        assert_eq!(objects(&store).await, []);
        assert!(matches!(remote.remove(local.build).await, Err(RemoteError::NotFound(_))));
    }
}

#[tokio::test]
async fn a_damaged_manifest_is_an_error_that_names_the_build() {
    let (local, store) = (local().await, Faulty::new(Duration::ZERO));
    let remote = store.remote();
    remote.upload(&local.store, local.build, SMALL).await.unwrap();
    let path = Path::from(format!("builds/{}", local.build));
    let good = store.get(&path).await.unwrap().bytes().await.unwrap();
    let mut bad = good.to_vec();
    bad[40] ^= 1;
    store.put(&path, bad.into()).await.unwrap();
    let error = remote.manifest(local.build).await.unwrap_err();
    assert!(matches!(error, RemoteError::Manifest { build, .. } if build == local.build));
    assert!(error.to_string().contains(&local.build.to_string()), "{error}");
    // Another build's manifest under this one's name.
    let other = BuildId::random();
    store.put(&Path::from(format!("builds/{other}")), good.into()).await.unwrap();
    let error = remote.manifest(other).await.unwrap_err();
    assert!(error.to_string().contains("is the manifest of build"), "{error}");
}

#[tokio::test]
async fn a_directory_is_a_store() {
    let (local, dir) = (local().await, TempDir::new().unwrap());
    let url = format!("file://{}/a%20store", dir.path().display());
    let remote = RemoteStore::open(&url, &RemoteOptions::default()).unwrap();
    remote.check().await.unwrap();
    assert_eq!(remote.list().await.unwrap(), []);
    remote.upload(&local.store, local.build, SMALL).await.unwrap();
    local.assert_whole(&remote).await;
    assert_eq!(remote.list().await.unwrap(), [local.build]);
    // A write that died: no listing shows it.
    let data = dir.path().join("a store/data").join(local.build.to_string());
    std::fs::write(data.join("memfile.00#1"), "half").unwrap();
    assert_eq!(remote.sweep(&everything()).await.unwrap(), []);
    assert!(!data.join("memfile.00#1").exists());
    local.assert_whole(&remote).await;
    remote.remove(local.build).await.unwrap();
    assert!(!data.exists());
    assert_eq!(remote.list().await.unwrap(), []);
}
