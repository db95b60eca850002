//! A node's builds: its disk and the object store behind it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    io::Read,
    path::Path,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use nidus_storage::{
    Artifact, BuildArtifact, BuildId, Builds, FrameCache, Held, LocalStore, StorageError,
    remote::{ReaderOptions, RemoteQueue, RemoteReader, RemoteTask, Uploader},
};
use support::{FRAME, Faulty, SMALL, content};
use tempfile::TempDir;
use tokio::{runtime::Handle, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// A node with a data directory and an object store.
struct Node {
    builds: Builds,
    uploader: Uploader,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Node {
    fn start(dir: &Path, store: &Arc<Faulty>) -> Self {
        let local = LocalStore::open(dir.join("storage")).unwrap();
        let cache = FrameCache::open(dir.join("cache"), 1 << 30).unwrap();
        let queue = RemoteQueue::open(dir.join("uploads")).unwrap();
        let remote = store.remote().owned_by(uuid::Uuid::new_v4());
        let reader = RemoteReader::new(remote.clone(), cache, ReaderOptions::default(), Handle::current());
        let uploader = Uploader::open(local.clone(), remote, queue, SMALL).unwrap();
        let builds = Builds::with_remote(local, reader, uploader.clone());
        let stop = CancellationToken::new();
        let task = tokio::spawn({
            let (builds, stop) = (builds.clone(), stop.clone());
            async move { builds.upload(stop, Duration::from_secs(5)).await }
        });
        Self { builds, uploader, stop, task }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }

    async fn publish(&self, seed: u64) -> BuildId {
        let build = BuildId::random();
        let staged = self.builds.stage(build).await.unwrap();
        staged.write(Artifact::Metadata, format!("{seed}")).await.unwrap();
        staged.write(Artifact::Memfile, content(seed, 100_000)).await.unwrap();
        staged.commit().await.unwrap();
        build
    }

    /// Until all that was queued is done.
    async fn settle(&self) {
        let settled = async {
            while !self.uploader.pending().await.unwrap().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), settled).await.expect("the queue empties");
    }

    async fn open(&self, build: BuildId, artifact: Artifact) -> Result<BuildArtifact, StorageError> {
        let builds = self.builds.clone();
        tokio::task::spawn_blocking(move || builds.open_artifact(build, artifact)).await.unwrap()
    }

    /// Whether the build reads as it was published, from wherever it is.
    async fn check(&self, build: BuildId, seed: u64, remote: bool) {
        assert!(self.builds.exists(build).await.unwrap());
        let text = self.builds.read(build, Artifact::Metadata).await.unwrap();
        assert_eq!(text, format!("{seed}").as_bytes());
        let memfile = self.open(build, Artifact::Memfile).await.unwrap();
        assert_eq!((memfile.size(), matches!(memfile, BuildArtifact::Remote { .. })), (100_000, remote));
        let builds = self.builds.clone();
        let open = move || builds.open_file(build, Artifact::Memfile);
        let mut file = tokio::task::spawn_blocking(open).await.unwrap().unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert!(bytes == content(seed, 100_000));
    }
}

fn not_found<T: std::fmt::Debug>(result: Result<T, StorageError>, build: BuildId) {
    assert!(matches!(result, Err(StorageError::NotFound(b)) if b == build), "{result:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inventory_says_where_builds_are_and_whose_they_are() {
    let (store, [one, two]) = (Faulty::new(Duration::ZERO), [(); 2].map(|()| TempDir::new().unwrap()));
    let (first, mut second) = (Node::start(one.path(), &store), Node::start(two.path(), &store));
    let build = first.publish(1).await;
    first.settle().await;
    let all = first.builds.inventory().await.unwrap();
    let [mine] = &all[..] else { panic!("one build: {all:?}") };
    assert!(mine.ours && !mine.uploading && mine.disk > Some(100_000) && mine.remote > Some(1000));
    // With nobody who uploads.
    second.stop.cancel();
    (&mut second.task).await.unwrap();
    let own = second.publish(2).await;
    let seen = second.builds.inventory().await.unwrap();
    let of = |build| seen.iter().find(|s| s.build == build).unwrap();
    assert_eq!(seen.len(), 2);
    assert!(of(own).ours && of(own).uploading && of(own).remote.is_none());
    assert!(!of(build).ours && of(build).disk.is_none() && of(build).remote == mine.remote);
    assert!(of(own).newest >= of(build).newest);
    second.builds.remove(build).await.unwrap();
    assert_eq!(second.builds.inventory().await.unwrap().len(), 1, "what is to be removed is gone");
    second.builds.remove_queued().await.unwrap();
    assert_eq!(store.remote().list().await.unwrap(), []);
    assert_eq!(second.builds.inventory().await.unwrap().len(), 1, "the upload is still to be done");
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_node_publishes_another_reads_and_the_first_removes() {
    let (store, [one, two]) = (Faulty::new(Duration::ZERO), [(); 2].map(|()| TempDir::new().unwrap()));
    let (first, second) = (Node::start(one.path(), &store), Node::start(two.path(), &store));
    let build = first.publish(1).await;
    first.check(build, 1, false).await;
    first.settle().await;
    second.check(build, 1, true).await;
    assert_eq!(second.builds.list().await.unwrap(), [build]);
    assert_eq!(second.builds.local().list().await.unwrap(), []);
    let gets = store.gets.load(SeqCst);
    second.check(build, 1, true).await;
    assert_eq!(store.gets.load(SeqCst), gets, "all of it is cached");

    first.builds.remove(build).await.unwrap();
    // At once, although the object store may still have it.
    assert!(!first.builds.exists(build).await.unwrap());
    not_found(first.builds.read(build, Artifact::Metadata).await, build);
    not_found(first.open(build, Artifact::Memfile).await, build);
    not_found(first.builds.remove(build).await, build);
    first.settle().await;
    assert!(!store.remote().exists(build).await.unwrap());
    first.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_node_is_told_where_a_build_is() {
    let (store, [one, two]) = (Faulty::new(Duration::ZERO), [(); 2].map(|()| TempDir::new().unwrap()));
    store.fail_after(0, false);
    let (first, second) = (Node::start(one.path(), &store), Node::start(two.path(), &store));
    let build = first.publish(1).await;
    let held = |node: &Node, artifact| {
        let builds = node.builds.clone();
        async move { builds.held(build, artifact).await.unwrap() }
    };
    let Held::Here(memfile) = held(&first, Artifact::Memfile).await else { panic!("it is not uploaded yet") };
    assert_eq!(Arc::new(memfile).read_range(99_000..200_000).await.unwrap(), content(1, 100_000)[99_000..]);
    assert!(matches!(held(&first, Artifact::Snapfile).await, Held::Nowhere), "it has none");
    store.fail_after(u64::MAX, false);
    first.settle().await;
    assert!(matches!(held(&first, Artifact::Memfile).await, Held::Uploaded));
    assert!(matches!(held(&second, Artifact::Memfile).await, Held::Nowhere));
    // The disk is still there when the object store is not.
    store.fail_after(0, false);
    assert!(matches!(held(&first, Artifact::Memfile).await, Held::Here(_)));
    first.uploader.add(build, RemoteTask::Remove).await.unwrap();
    assert!(matches!(held(&first, Artifact::Memfile).await, Held::Nowhere), "it is about to go");
    first.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_did_not_get_to_do_the_next_process_does() {
    let (store, dir) = (Faulty::new(Duration::ZERO), TempDir::new().unwrap());
    let node = Node::start(dir.path(), &store);
    let removed = node.publish(1).await;
    node.settle().await;
    store.fail_after(0, false);
    let kept = node.publish(2).await;
    node.builds.remove(removed).await.unwrap();
    // As if it had been killed: its task ends in the middle of its attempts.
    node.task.abort();
    let _ = node.task.await;
    assert_eq!(
        node.uploader.pending().await.unwrap(),
        [(kept, RemoteTask::Upload), (removed, RemoteTask::Remove)]
    );
    drop((node.builds, node.uploader));
    // One that was published when nobody queued it.
    let local = LocalStore::open(dir.path().join("storage")).unwrap();
    let unqueued = BuildId::random();
    let staged = local.stage(unqueued).await.unwrap();
    staged.write(Artifact::Metadata, "3").await.unwrap();
    staged.write(Artifact::Memfile, content(3, 100_000)).await.unwrap();
    staged.commit().await.unwrap();

    store.fail_after(u64::MAX, false);
    let node = Node::start(dir.path(), &store);
    assert!(!node.builds.exists(removed).await.unwrap());
    let done = async {
        while store.remote().list().await.unwrap().len() != 2 || store.remote().exists(removed).await.unwrap()
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), done).await.expect("both are uploaded");
    node.settle().await;
    node.stop().await;

    // The disk is lost: all of it is in the object store.
    let empty = TempDir::new().unwrap();
    let node = Node::start(empty.path(), &store);
    node.check(kept, 2, true).await;
    node.check(unqueued, 3, true).await;
    not_found(node.builds.read(removed, Artifact::Metadata).await, removed);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fails_for_a_while_delays_and_a_damaged_build_holds_nobody_up() {
    let (store, dir) = (Faulty::new(Duration::ZERO), TempDir::new().unwrap());
    let node = Node::start(dir.path(), &store);
    node.settle().await;
    store.fail_after(0, false);
    let damaged = node.publish(1).await;
    let good = node.publish(2).await;
    let path = node.builds.local().path(damaged, Artifact::Memfile);
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    std::fs::write(&path, vec![7; 100_000]).unwrap();
    store.fail_after(u64::MAX, false);
    node.settle().await;
    assert_eq!(store.remote().list().await.unwrap(), [good]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_is_stored_in_another_way_replaces_what_was_uploaded() {
    let (store, [one, two]) = (Faulty::new(Duration::ZERO), [(); 2].map(|()| TempDir::new().unwrap()));
    let node = Node::start(one.path(), &store);
    let build = node.publish(1).await;
    node.settle().await;
    let before = store.remote().manifest(build).await.unwrap();
    let builds = node.builds.clone();
    let replace = move || {
        let staged = builds.stage_again(build).unwrap();
        std::fs::write(staged.path(Artifact::Metadata), "9").unwrap();
        std::fs::write(staged.path(Artifact::Memfile), content(9, 100_000)).unwrap();
        builds.replace(staged).unwrap();
    };
    tokio::task::spawn_blocking(replace).await.unwrap();
    node.settle().await;
    assert_ne!(store.remote().manifest(build).await.unwrap(), before);
    let other = Node::start(two.path(), &store);
    other.check(build, 9, true).await;
    node.check(build, 9, false).await;
    other.stop().await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_object_store_it_is_the_local_store() {
    let dir = TempDir::new().unwrap();
    let builds = Builds::open(dir.path()).unwrap();
    let build = BuildId::random();
    not_found(builds.read(build, Artifact::Metadata).await, build);
    not_found(builds.remove(build).await, build);
    assert!(!builds.exists(build).await.unwrap());
    let staged = builds.stage(build).await.unwrap();
    staged.write(Artifact::Metadata, vec![1; FRAME]).await.unwrap();
    staged.commit().await.unwrap();
    assert_eq!(builds.read(build, Artifact::Metadata).await.unwrap(), vec![1; FRAME]);
    assert_eq!(builds.list().await.unwrap(), [build]);
    builds.upload(CancellationToken::new(), Duration::ZERO).await;
    builds.remove(build).await.unwrap();
    assert_eq!(builds.list().await.unwrap(), []);
}
