//! Real slots on this host (root). The index range and table are this process's own.

#![allow(clippy::unwrap_used)]

use std::process::Command;

use nidus_network::{NetworkConfig, Pool, reclaim};

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
        slot.set_internet(false).await.unwrap();
        slot.set_internet(true).await.unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_daemon_left_is_found() {
    let c = config(30_100, "nidus_test_b");
    let pool = Pool::start(c.clone(), 2).await.unwrap();
    let slot = pool.acquire().await.unwrap();
    let veth = slot.addresses().veth.clone();
    std::mem::forget(slot);
    std::mem::forget(pool);
    assert!(reclaim(&c).unwrap() >= 1);
    assert!(!std::path::Path::new("/sys/class/net").join(veth).exists());
    assert!(!out("nft", &["list", "tables"]).contains("nidus_test_b"));
    assert_eq!(reclaim(&c).unwrap(), 0);
}
