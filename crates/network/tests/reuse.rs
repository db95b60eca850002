//! Slots that are used again (root). Index ranges and tables are this process's own.

#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::sync::atomic::Ordering::Relaxed;

use nidus_network::{EgressRules, NetworkConfig, Pool, TapMode, TcpRedirect, reclaim};

/// One after the other: they count what is on the host and in this process.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn config(first_index: u32, table: &str) -> NetworkConfig {
    NetworkConfig { first_index, max_slots: 20, table: table.into(), ..NetworkConfig::default() }
}

fn run(args: &[&str]) {
    let out = Command::new(args[0]).args(&args[1..]).output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// How many links, routes and namespaces of the host are of these slots, and the files of this process.
fn host(c: &NetworkConfig) -> [usize; 4] {
    let count = |args: [&str; 3]| {
        let args = args.into_iter().filter(|a| !a.is_empty());
        let text = String::from_utf8(Command::new("ip").args(args).output().unwrap().stdout).unwrap();
        let ours = |line: &&str| {
            let words: Vec<&str> = line.split(['@', ':', ' ']).collect();
            c.indices()
                .map(|i| c.addresses(i))
                .any(|a| words.contains(&&*a.veth) || words.contains(&&*a.namespace))
        };
        text.lines().filter(ours).count()
    };
    let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
    [count(["-o", "link", "show"]), count(["-o", "route", "show"]), count(["netns", "list", ""]), files]
}

/// Waits until that many are ready, and there are no others.
async fn full(pool: &Pool, target: usize) {
    let there = || pool.stats().created.load(Relaxed) - pool.stats().destroyed.load(Relaxed);
    while pool.ready() != target || there() != target as u64 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_rounds_leave_the_slots_of_the_pool() {
    let _turn = TURN.lock().await;
    let c = config(31_500, "nidus_test_reuse");
    reclaim(&c).unwrap();
    let pool = Pool::start(c.clone(), 3).await.unwrap();
    full(&pool, 3).await;
    let rules = EgressRules {
        allowed: vec!["203.0.113.0/24".parse().unwrap()],
        denied: vec![Default::default()],
        redirect: TcpRedirect::Unlisted,
        dns: true,
        kept: Vec::new(),
    };
    let round = async || {
        let slot = pool.acquire().await.unwrap();
        slot.set_egress(&rules).await.unwrap();
        let sockets = slot.gateway_sockets().unwrap();
        drop(sockets);
        pool.release(slot).await;
    };
    // Whatever a first use opens for good.
    round().await;
    full(&pool, 3).await;
    let before = host(&c);
    assert_eq!(before[..3], [3, 6, 3]);
    for _ in 0..200 {
        round().await;
    }
    full(&pool, 3).await;
    assert_eq!(host(&c), before);
    let stats = pool.stats();
    assert_eq!(stats.unclean.load(Relaxed), 0);
    assert!(stats.created.load(Relaxed) < 20, "{stats:?}");
    pool.shutdown().await;
    assert_eq!(host(&c)[..3], [0, 0, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_not_as_it_was_is_torn_down() {
    let _turn = TURN.lock().await;
    // No other one can be made: there is always room for it.
    let c = NetworkConfig { max_slots: 1, ..config(31_540, "nidus_test_damage") };
    reclaim(&c).unwrap();
    let pool = Pool::start(c.clone(), 1).await.unwrap();
    let damages: [&[&str]; 6] = [
        &["ip", "-n", "{ns}", "addr", "add", "203.0.113.9/32", "dev", "eth0"],
        &["ip", "-n", "{ns}", "route", "add", "203.0.113.0/24", "dev", "eth0"],
        &["ip", "-n", "{ns}", "link", "add", "other0", "type", "veth", "peer", "name", "other1"],
        &["ip", "-n", "{ns}", "route", "del", "default"],
        &["ip", "netns", "exec", "{ns}", "nft", "add", "rule", "inet", "nidus", "egress", "accept"],
        &["ip", "netns", "exec", "{ns}", "nft", "flush", "chain", "inet", "nidus", "spoof"],
    ];
    for (n, damage) in (1..).zip(damages) {
        let slot = pool.acquire().await.unwrap();
        let name = slot.addresses().namespace.clone();
        let words: Vec<&str> = damage.iter().map(|w| if *w == "{ns}" { name.as_str() } else { w }).collect();
        run(&words);
        pool.release(slot).await;
        assert_eq!(pool.stats().unclean.load(Relaxed), n, "{damage:?}");
        // What comes next is a new one, which is used again.
        let fresh = pool.acquire().await.unwrap();
        pool.release(fresh).await;
        assert_eq!((pool.stats().unclean.load(Relaxed), pool.stats().reused.load(Relaxed)), (n, n));
    }
    // Somebody still has its tap.
    let slot = pool.acquire().await.unwrap();
    let held = slot.open_tap().unwrap();
    pool.release(slot).await;
    assert_eq!(pool.stats().unclean.load(Relaxed), 7);
    drop(held);
    pool.shutdown().await;
    assert_eq!(host(&c)[..3], [0, 0, 0]);
}

/// As Firecracker has its tap: by name, as a user of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_tap_that_is_opened_by_name_is_made_again() {
    let _turn = TURN.lock().await;
    let named = TapMode::Named { uid_base: 1_700_000_000 };
    let c = NetworkConfig { max_slots: 1, tap: named, ..config(31_560, "nidus_test_named") };
    reclaim(&c).unwrap();
    let pool = Pool::start(c.clone(), 1).await.unwrap();
    for n in 1..=3 {
        let slot = pool.acquire().await.unwrap();
        pool.release(slot).await;
        assert_eq!((pool.stats().reused.load(Relaxed), pool.stats().unclean.load(Relaxed)), (n, 0));
    }
    let slot = pool.acquire().await.unwrap();
    let name = slot.addresses().namespace.clone();
    let shown = Command::new("ip").args(["-n", &name, "tuntap", "show"]).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(
        shown.contains("persist") && shown.contains(&format!("user {}", 1_700_000_000 + slot.index())),
        "{shown}"
    );
    pool.release(slot).await;
    pool.shutdown().await;
    assert_eq!(host(&c)[..3], [0, 0, 0]);
}
