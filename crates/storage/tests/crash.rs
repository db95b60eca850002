//! `kill -9` of a process that uploads, at random moments.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{collections::HashSet, process::Command, time::Duration};

use nidus_storage::{
    Artifact, LocalStore,
    remote::{RemoteOptions, RemoteQueue, RemoteStore, RemoteTask, Sweep, UploadOptions},
};
use rand::RngExt;
use support::Local;

const DIRECTORY: &str = "NIDUS_TEST_UPLOAD_DIRECTORY";
const OPTIONS: UploadOptions =
    UploadOptions { frame_size: 64 << 10, object_size: 128 << 10, level: 1, parallel: 4 };

fn remote(dir: &std::path::Path) -> RemoteStore {
    let url = format!("file://{}", dir.join("remote").display());
    RemoteStore::open(&url, &RemoteOptions::default()).unwrap()
}

/// Not a test of its own: what the other one starts and kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "the child process of the other test"]
async fn child() {
    let dir = std::path::PathBuf::from(std::env::var_os(DIRECTORY).expect("started by the other test"));
    let queue = RemoteQueue::open(dir.join("uploads")).unwrap();
    let store = LocalStore::open(dir.join("builds")).unwrap();
    for (build, task) in queue.list().unwrap() {
        remote(&dir).upload(&store, build, OPTIONS).await.unwrap();
        queue.done(build, task).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_upload_is_invisible_and_resumed_by_the_next_process() {
    let mut rng = rand::rng();
    let noise: Vec<u8> = (0..12 << 20).map(|_| rng.random()).collect();
    let local = Local::with(&[(Artifact::Memfile, noise)]).await;
    let dir = local.dir.path();
    let (remote, queue) = (remote(dir), RemoteQueue::open(dir.join("uploads")).unwrap());
    queue.add(local.build, RemoteTask::Upload).unwrap();
    let child = || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "child", "--ignored", "--quiet"]).env(DIRECTORY, dir);
        command.stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    let mut invisible = 0;
    for _ in 0..12 {
        let mut running = child();
        tokio::time::sleep(Duration::from_millis(rng.random_range(5..60))).await;
        running.kill().unwrap();
        running.wait().unwrap();
        if remote.exists(local.build).await.unwrap() {
            local.assert_whole(&remote).await;
        } else {
            invisible += 1;
            assert_eq!(remote.list().await.unwrap(), []);
            assert_eq!(queue.list().unwrap(), [(local.build, RemoteTask::Upload)]);
        }
    }
    println!("{invisible} of 12 uploads died before their end");
    assert!(child().wait().unwrap().success());
    assert_eq!(queue.list().unwrap(), []);
    local.assert_whole(&remote).await;
    let all = Sweep { older_than: Duration::ZERO, keep: HashSet::new(), dry_run: false };
    remote.sweep(&all).await.unwrap();
    local.assert_whole(&remote).await;
    let data = dir.join("remote/data").join(local.build.to_string());
    let names: Vec<_> = std::fs::read_dir(data).unwrap().map(|e| e.unwrap().file_name()).collect();
    let unfinished = |n: &std::ffi::OsString| n.to_string_lossy().contains('#') || n == "upload";
    assert!(!names.iter().any(unfinished), "{names:?}");
}
