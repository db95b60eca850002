//! Real slots on this host (root). The index range and table are this process's own.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use nidus_network::{EgressRules, NetworkConfig, Pool, reclaim};

fn config(first_index: u32, table: &str) -> NetworkConfig {
    NetworkConfig { first_index, max_slots: 40, table: table.into(), ..NetworkConfig::default() }
}

fn out(program: &str, args: &[&str]) -> String {
    let o = Command::new(program).args(args).output().unwrap();
    String::from_utf8_lossy(&o.stdout).into_owned() + &String::from_utf8_lossy(&o.stderr)
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_come_and_go_without_a_trace() {
    let c = config(30_000, "nidus_test_a");
    reclaim(&c).unwrap();
    let pool = Pool::start(c.clone(), 3).await.unwrap();
    for _ in 0..12 {
        let slot = pool.acquire().await.unwrap();
        assert!(slot.netns_path().exists());
        assert!(out("ip", &["link", "show", &slot.addresses().veth]).contains("UP"));
        let closed = EgressRules { denied: vec![Default::default()], ..EgressRules::default() };
        slot.set_egress(&closed).await.unwrap();
        slot.set_egress(&EgressRules::default()).await.unwrap();
        pool.release(slot).await;
    }
    pool.shutdown().await;
    let left: Vec<_> = c
        .indices()
        .map(|i| c.addresses(i))
        .filter(|a| {
            std::path::Path::new("/run/netns").join(&a.namespace).exists()
                || std::path::Path::new("/sys/class/net").join(&a.veth).exists()
        })
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!out("nft", &["list", "tables"]).contains("nidus_test_a"));
}

const CHILD: &str = "NIDUS_TEST_LEAVE_SLOTS";

/// A process that is killed with a slot in use and others ready or half made.
#[test]
fn what_a_killed_daemon_left_is_found() {
    let c = config(30_100, "nidus_test_b");
    if std::env::var_os(CHILD).is_some() {
        leave_slots(&c);
    }
    reclaim(&c).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "what_a_killed_daemon_left_is_found", "--nocapture"])
        .env(CHILD, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let veth =
        lines.map_while(Result::ok).find_map(|l| l.strip_prefix("in use: ").map(str::to_owned)).unwrap();
    assert!(std::path::Path::new("/sys/class/net").join(&veth).exists());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(reclaim(&c).unwrap() >= 1);
    assert!(!std::path::Path::new("/sys/class/net").join(veth).exists());
    assert!(!out("nft", &["list", "tables"]).contains("nidus_test_b"));
    assert_eq!(reclaim(&c).unwrap(), 0);
}

fn leave_slots(c: &NetworkConfig) -> ! {
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let pool = Pool::start(c.clone(), 2).await.unwrap();
        let slot = pool.acquire().await.unwrap();
        // On a line of its own, after what the test harness has printed.
        println!("\nin use: {}", slot.addresses().veth);
        std::future::pending().await
    })
}

/// `ip netns add` by somebody else, while slots are there, must not make them stay.
#[tokio::test(flavor = "multi_thread")]
async fn namespaces_of_others_come_and_go_beside_ours() {
    let c = config(30_200, "nidus_test_c");
    reclaim(&c).unwrap();
    let pool = Pool::start(c.clone(), 1).await.unwrap();
    let slot = pool.acquire().await.unwrap();
    let path = slot.netns_path().to_owned();
    let foreign = format!("nidus-foreign-{}", std::process::id());
    assert_eq!(out("ip", &["netns", "add", &foreign]), "");
    pool.release(slot).await;
    pool.shutdown().await;
    assert!(!path.exists());
    assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(path.to_str().unwrap()));
    assert_eq!(out("ip", &["netns", "delete", &foreign]), "");
}

/// What `nidus doctor` says must agree with what the other tests here do.
#[test]
fn the_probe_finds_what_slots_need() {
    let failed: Vec<_> = nidus_network::probe().into_iter().filter(|c| c.error.is_some()).collect();
    assert!(failed.is_empty(), "{failed:?}");
}
