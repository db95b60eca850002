//! Every typed request and answer against Firecracker's own description of its API: its
//! `firecracker.yaml`, whose path is given by NIDUS_FIRECRACKER_API. Nothing of it is kept here.

// A test program, though not one of libtest's.
#![allow(clippy::unwrap_used, clippy::panic)]

mod description;

use std::process::ExitCode;

use description::Description;
use libtest_mimic::{Arguments, Completion, Trial};
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

type Test = Result<(), String>;

fn tests(api: &Description) -> Vec<(String, Test)> {
    let mut tests: Vec<(String, Test)> = Vec::new();
    for Sent { method, path, body } in requests() {
        tests.push((format!("{method} {path}: request"), api.check_request(&method, &path, body.as_ref())));
        tests.push((format!("{method} {path}: errors"), api.check_error(&method, &path)));
    }
    tests.extend([
        ("answer: instance".into(), understands(api, &DescribeInstance)),
        ("answer: version".into(), understands(api, &GetVersion)),
        ("answer: machine-config".into(), understands(api, &GetMachineConfig)),
        ("answer: balloon".into(), understands(api, &GetBalloon)),
        ("answer: balloon statistics".into(), understands(api, &GetBalloonStats)),
        ("answer: hinting".into(), understands(api, &GetHintingStatus)),
        ("answer: vm/config".into(), understands(api, &GetFullConfig)),
        ("answer: mmds".into(), understands(api, &GetMmds)),
    ]);
    // The check itself must be able to fail.
    for (name, path, body) in [
        ("an unknown field", "/boot-source", json!({"kernel_image_path": "/x", "kernel": "/x"})),
        ("a missing field", "/boot-source", json!({"boot_args": "x"})),
        ("an unknown word", "/actions", json!({"action_type": "Stop"})),
        ("an unknown path", "/nothing", json!({})),
    ] {
        let found = api.check_request("put", path, Some(&body)).err().map(drop);
        tests.push((format!("{name} is found"), found.ok_or("it was not".into())));
    }
    tests
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let Some(file) = std::env::var_os("NIDUS_FIRECRACKER_API").filter(|f| !f.is_empty()) else {
        let reason = "NIDUS_FIRECRACKER_API does not name Firecracker's firecracker.yaml";
        let skipped =
            Trial::ignorable_test("the_api_as_described", move || Ok(Completion::ignored_with(reason)));
        return libtest_mimic::run(&arguments, vec![skipped]).exit_code();
    };
    let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("read {}: {e}", file.display()));
    let api = Description::parse(&text);
    println!("Firecracker's API {}", api.version());
    let trials = tests(&api)
        .into_iter()
        .map(|(name, result)| Trial::test(name, || result.map_err(Into::into)))
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
