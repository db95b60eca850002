//! Builds in a real S3 server, through real HTTP.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/s3.rs"]
mod s3;
mod support;

use std::{
    collections::HashSet,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use nidus_storage::{
    Artifact,
    remote::{RemoteError, RemoteOptions, RemoteStore, Sweep, UploadOptions},
};
use s3::{Config, Server};
use support::{Local, SMALL, content};
use tempfile::TempDir;

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

struct S3 {
    server: Server,
    dir: TempDir,
}

impl S3 {
    async fn start(latency: Duration, fail_every: u64) -> Self {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("bucket")).unwrap();
        let config = Config {
            root: dir.path().to_owned(),
            access_key: "test".into(),
            secret_key: "test-secret".into(),
            latency,
            fail_every,
        };
        Self { server: Server::start(LOOPBACK, config).await.unwrap(), dir }
    }

    fn options(&self) -> RemoteOptions {
        RemoteOptions {
            endpoint: Some(self.server.endpoint()),
            region: Some("us-east-1".into()),
            access_key: Some("test".into()),
            secret_key: Some("test-secret".into()),
            ..Default::default()
        }
    }

    fn remote(&self) -> RemoteStore {
        RemoteStore::open("s3://bucket/some/prefix", &self.options()).unwrap()
    }
}

async fn local() -> Local {
    Local::with(&[(Artifact::Memfile, content(1, 300_000)), (Artifact::Rootfs, content(2, 100_001))]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_goes_to_a_bucket_and_comes_back() {
    let (s3, local) = (S3::start(Duration::ZERO, 0).await, local().await);
    let remote = s3.remote();
    remote.check().await.unwrap();
    assert_eq!(remote.list().await.unwrap(), []);
    assert!(matches!(remote.manifest(local.build).await, Err(RemoteError::NotFound(_))));
    let done = remote.upload(&local.store, local.build, SMALL).await.unwrap();
    assert!(done.sent >= 10, "{done:?}");
    assert_eq!(remote.list().await.unwrap(), [local.build]);
    local.assert_whole(&remote).await;
    assert!(s3.dir.path().join("bucket/some/prefix/builds").join(local.build.to_string()).exists());

    // As if the upload had died before its last step.
    fs::remove_file(s3.dir.path().join("bucket/some/prefix/builds").join(local.build.to_string())).unwrap();
    assert!(!remote.exists(local.build).await.unwrap());
    let again = remote.upload(&local.store, local.build, SMALL).await.unwrap();
    assert_eq!((again.sent, again.kept), (0, done.sent));

    let all = Sweep { older_than: Duration::ZERO, keep: HashSet::new(), dry_run: false };
    assert_eq!(remote.sweep(&all).await.unwrap(), []);
    remote.remove(local.build).await.unwrap();
    assert_eq!(remote.list().await.unwrap(), []);
    assert!(matches!(remote.remove(local.build).await, Err(RemoteError::NotFound(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn passing_faults_are_retried() {
    let (s3, local) = (S3::start(Duration::ZERO, 3).await, local().await);
    let remote = s3.remote();
    let large = UploadOptions { object_size: 64 << 10, ..SMALL };
    remote.upload(&local.store, local.build, large).await.unwrap();
    local.assert_whole(&remote).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_said_with_what_to_do() {
    let s3 = S3::start(Duration::ZERO, 0).await;
    let refused = |error: RemoteError, text: &str| {
        assert!(error.to_string().contains(text), "{error}");
        assert!(!error.to_string().contains("test-secret"));
        error
    };
    let wrong = RemoteOptions { secret_key: Some("wrong".into()), ..s3.options() };
    let denied = RemoteStore::open("s3://bucket/x", &wrong).unwrap().check().await.unwrap_err();
    assert!(matches!(refused(denied, "Check the keys"), RemoteError::Denied { .. }));
    let missing = RemoteStore::open("s3://nowhere/x", &s3.options()).unwrap().check().await.unwrap_err();
    assert!(matches!(refused(missing, "s3://nowhere/x does not exist"), RemoteError::NoBucket { .. }));

    // A port that nobody listens on.
    let free = TcpListener::bind(LOOPBACK).unwrap().local_addr().unwrap();
    let nobody = RemoteOptions { endpoint: Some(format!("http://{free}")), ..s3.options() };
    let start = Instant::now();
    let gone = RemoteStore::open("s3://bucket/x", &nobody).unwrap().check().await.unwrap_err();
    assert!(gone.is_passing());
    assert!(matches!(refused(gone, "Check the endpoint"), RemoteError::Unreachable { .. }));
    assert!(start.elapsed() < Duration::from_secs(40));
}

/// With a distant store, a few reads fetch a few frames, not the artifact.
#[tokio::test(flavor = "multi_thread")]
async fn reads_on_demand_fetch_little_and_read_ahead_hides_the_distance() {
    let s3 = S3::start(Duration::from_millis(80), 0).await;
    let bytes: Vec<u8> = content(5, 16 << 20).iter().map(|b| b | 1).collect();
    let local = Local::with(&[(Artifact::Memfile, bytes.clone())]).await;
    let remote = s3.remote();
    let cut = UploadOptions { frame_size: 64 << 10, object_size: 4 << 20, ..Default::default() };
    remote.upload(&local.store, local.build, cut).await.unwrap();
    let stored = {
        let manifest = remote.manifest(local.build).await.unwrap();
        manifest.artifact(Artifact::Memfile).unwrap().stored()
    };

    let touch = |source: nidus_storage::remote::RemoteArtifact, bytes: &[u8]| {
        let bytes = bytes.to_vec();
        let read = move || {
            // Every sixth frame, one after another, as a guest's faults are.
            for offset in (0..bytes.len()).step_by(6 * (64 << 10)) {
                let mut page = [0; 4096];
                source.read_blocking(offset as u64, &mut page).unwrap();
                assert!(page[..] == bytes[offset..offset + 4096]);
            }
        };
        async move {
            let start = Instant::now();
            tokio::task::spawn_blocking(read).await.unwrap();
            start.elapsed()
        }
    };
    let before = s3.server.counters.sent.load(Relaxed);
    let build = local.reader(&remote, "cold", 1 << 30).open(local.build).await.unwrap();
    let source = build.artifact(Artifact::Memfile).unwrap();
    let cold = touch(source.clone(), &bytes).await;
    let sent = s3.server.counters.sent.load(Relaxed) - before;
    assert!(sent < stored / 3, "{sent} of {stored} bytes were sent for a sixth of the frames");

    remote.put_order(local.build, Artifact::Memfile, &source.recording()).await.unwrap();
    let reader = local.reader(&remote, "ahead", 1 << 30);
    let build = reader.open(local.build).await.unwrap();
    let source = build.artifact(Artifact::Memfile).unwrap();
    let order = remote.order(local.build, Artifact::Memfile).await.unwrap().unwrap();
    assert_eq!(order.frames().len(), (16 << 20) / (6 * (64 << 10)) + 1);
    let start = Instant::now();
    let ahead = source.read_ahead(&order, u64::MAX);
    touch(source, &bytes).await;
    let warm = start.elapsed();
    ahead.done().await;
    println!(
        "{} reads: {cold:?} on demand, {warm:?} with read-ahead; {sent} of {stored} bytes",
        order.frames().len()
    );
    assert_eq!(reader.stats().fetched, order.frames().len() as u64, "no frame twice, and no other");
}
