//! Every typed request and answer against Firecracker's own description of its API: its
//! `firecracker.yaml`, whose path is given by NIDUS_FIRECRACKER_API. Nothing of it is kept here.

mod description;

use description::Description;
use nidus_vmm::firecracker::api::*;
use serde_json::{Value, json};

/// One request as it goes over the wire.
struct Sent {
    method: String,
    path: String,
    body: Option<Value>,
}

fn sent<C: Call>(call: &C) -> Sent {
    Sent {
        method: C::METHOD.as_str().to_lowercase(),
        path: call.path().into_owned(),
        body: C::BODY.then(|| serde_json::to_value(call).unwrap()),
    }
}

fn limiter() -> Option<RateLimiter> {
    let bucket = TokenBucket { size: 1 << 20, one_time_burst: Some(1 << 10), refill_time: 100 };
    Some(RateLimiter { bandwidth: Some(bucket), ops: Some(bucket) })
}

/// Every request with every field set.
fn requests() -> Vec<Sent> {
    let text = || Some("/x".to_owned());
    vec![
        sent(&BootSource { kernel_image_path: "/x".into(), initrd_path: text(), boot_args: text() }),
        sent(&MachineConfig {
            vcpu_count: 2,
            mem_size_mib: 128,
            smt: Some(false),
            track_dirty_pages: Some(true),
            huge_pages: Some(HugePages::TwoMiB),
            cpu_template: Some("None".into()),
        }),
        sent(&PatchMachineConfig {
            vcpu_count: Some(1),
            mem_size_mib: Some(128),
            track_dirty_pages: Some(true),
            huge_pages: Some(HugePages::None),
        }),
        sent(&GetMachineConfig),
        sent(&Drive {
            drive_id: "root".into(),
            is_root_device: false,
            partuuid: text(),
            cache_type: Some(CacheType::Writeback),
            is_read_only: Some(false),
            path_on_host: text(),
            rate_limiter: limiter(),
            io_engine: Some(IoEngine::Async),
            socket: text(),
        }),
        sent(&PatchDrive { drive_id: "root".into(), path_on_host: text(), rate_limiter: limiter() }),
        sent(&NetworkInterface {
            iface_id: "eth0".into(),
            host_dev_name: "tap0".into(),
            guest_mac: Some("02:FC:00:00:00:05".into()),
            mtu: Some(1500),
            rx_rate_limiter: limiter(),
            tx_rate_limiter: limiter(),
        }),
        sent(&PatchNetworkInterface {
            iface_id: "eth0".into(),
            rx_rate_limiter: limiter(),
            tx_rate_limiter: limiter(),
        }),
        sent(&Entropy { rate_limiter: limiter() }),
        sent(&Vsock { guest_cid: 3, uds_path: "/x".into() }),
        sent(&Serial { serial_out_path: text(), rate_limiter: limiter().and_then(|l| l.ops) }),
        sent(&MmdsConfig {
            version: Some(MmdsVersion::V2),
            network_interfaces: vec!["eth0".into()],
            ipv4_address: Some([169, 254, 169, 254].into()),
            imds_compat: Some(true),
        }),
        sent(&PutMmds(json!({"a": {"b": 1}}))),
        sent(&PatchMmds(json!({"a": null}))),
        sent(&GetMmds),
        sent(&Balloon {
            amount_mib: 1,
            deflate_on_oom: true,
            stats_polling_interval_s: Some(1),
            free_page_hinting: Some(true),
            free_page_reporting: Some(true),
        }),
        sent(&PatchBalloon { amount_mib: 1 }),
        sent(&GetBalloon),
        sent(&PatchBalloonStats { stats_polling_interval_s: 1 }),
        sent(&GetBalloonStats),
        sent(&StartHinting { acknowledge_on_stop: Some(true) }),
        sent(&StopHinting),
        sent(&GetHintingStatus),
        sent(&Logger {
            log_path: text(),
            level: Some(Level::Warning),
            show_level: Some(true),
            show_log_origin: Some(true),
            module: text(),
        }),
        sent(&Metrics { metrics_path: "/x".into() }),
        sent(&Action { action_type: ActionType::InstanceStart }),
        sent(&Action { action_type: ActionType::SendCtrlAltDel }),
        sent(&Action { action_type: ActionType::FlushMetrics }),
        sent(&Vm { state: VmState::Paused }),
        sent(&Vm { state: VmState::Resumed }),
        sent(&CreateSnapshot {
            snapshot_path: "/x".into(),
            mem_file_path: "/x".into(),
            snapshot_type: Some(SnapshotType::Diff),
        }),
        sent(&LoadSnapshot {
            snapshot_path: "/x".into(),
            mem_backend: MemoryBackend { backend_type: BackendType::Uffd, backend_path: "/x".into() },
            track_dirty_pages: Some(true),
            resume_vm: Some(false),
            network_overrides: vec![NetworkOverride {
                iface_id: "eth0".into(),
                host_dev_name: "tap0".into(),
            }],
            vsock_override: Some(VsockOverride { uds_path: "/x".into() }),
            clock_realtime: Some(true),
        }),
        sent(&DescribeInstance),
        sent(&GetVersion),
        sent(&GetFullConfig),
    ]
}

/// An answer made by the description is understood by the type.
fn understands<C: Call>(api: &Description, call: &C) -> Result<(), String> {
    let path = call.path();
    let sample = api.sample_answer(&C::METHOD.as_str().to_lowercase(), &path)?;
    serde_json::from_value::<C::Answer>(sample.clone())
        .map(drop)
        .map_err(|e| format!("{path}: {e} in {sample}"))
}

fn main() {
    let Some(file) = std::env::var_os("NIDUS_FIRECRACKER_API") else {
        println!("skipped: NIDUS_FIRECRACKER_API does not name Firecracker's firecracker.yaml");
        println!("\ntest result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out");
        return;
    };
    let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("read {}: {e}", file.display()));
    let api = Description::parse(&text);
    println!("Firecracker's API {}", api.version());
    let mut wrong = Vec::new();
    let mut count = 0;
    let mut check = |what: String, result: Result<(), String>| {
        count += 1;
        println!("test {what} ... {}", if result.is_ok() { "ok" } else { "FAILED" });
        wrong.extend(result.err());
    };
    for Sent { method, path, body } in requests() {
        check(format!("{method} {path}"), api.check_request(&method, &path, body.as_ref()));
        check(format!("{method} {path} (its errors)"), api.check_error(&method, &path));
    }
    check("answer: instance".into(), understands(&api, &DescribeInstance));
    check("answer: version".into(), understands(&api, &GetVersion));
    check("answer: machine-config".into(), understands(&api, &GetMachineConfig));
    check("answer: balloon".into(), understands(&api, &GetBalloon));
    check("answer: balloon statistics".into(), understands(&api, &GetBalloonStats));
    check("answer: hinting".into(), understands(&api, &GetHintingStatus));
    check("answer: vm/config".into(), understands(&api, &GetFullConfig));
    check("answer: mmds".into(), understands(&api, &GetMmds));
    // The check itself must be able to fail.
    let bad = api.check_request("put", "/boot-source", Some(&json!({"kernel": "/x"})));
    check("a request that is wrong is found".into(), bad.err().map(drop).ok_or("it was not".into()));
    for w in &wrong {
        println!("FAILED: {w}");
    }
    println!(
        "\ntest result: {}. {} passed; {} failed; 0 ignored",
        if wrong.is_empty() { "ok" } else { "FAILED" },
        count - wrong.len(),
        wrong.len()
    );
    if !wrong.is_empty() {
        std::process::exit(101);
    }
}
