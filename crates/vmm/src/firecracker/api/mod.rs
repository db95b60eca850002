//! Firecracker's API (its `firecracker.yaml`, as of 1.16), typed: one type for each request, which
//! knows its method, its path and its answer. Optional fields are left out when not set, so
//! that older versions are sent nothing that they do not know unless it is asked for.

mod balloon;
mod client;
mod devices;
mod machine;
mod mmds;
mod snapshot;

use std::borrow::Cow;

use http::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use balloon::{
    Balloon, BalloonStats, GetBalloon, GetBalloonStats, GetHintingStatus, HintingStatus, PatchBalloon,
    PatchBalloonStats, StartHinting, StopHinting,
};
pub use client::{ApiError, Client};
pub use devices::{
    CacheType, Drive, Entropy, IoEngine, NetworkInterface, PatchDrive, PatchNetworkInterface, RateLimiter,
    Serial, TokenBucket, Vsock,
};
pub use machine::{
    Action, ActionType, BootSource, DescribeInstance, FullConfig, GetFullConfig, GetMachineConfig,
    GetVersion, HugePages, InstanceInfo, InstanceState, Level, Logger, MachineConfig, Metrics,
    PatchMachineConfig, Version, Vm, VmState,
};
pub use mmds::{GetMmds, MmdsConfig, MmdsVersion, PatchMmds, PutMmds};
pub use snapshot::{
    BackendType, CreateSnapshot, LoadSnapshot, MemoryBackend, NetworkOverride, SnapshotType, VsockOverride,
};

/// A request.
pub trait Call: Serialize + Sync {
    /// What it is answered with.
    type Answer: DeserializeOwned;
    /// HTTP method.
    const METHOD: Method;
    /// Whether a body goes along.
    const BODY: bool = true;

    /// Path of the resource.
    fn path(&self) -> Cow<'static, str>;
}

/// Says what request a type is.
macro_rules! call {
    ($type:ty: GET $path:literal -> $answer:ty) => {
        impl $crate::firecracker::api::Call for $type {
            type Answer = $answer;
            const METHOD: http::Method = http::Method::GET;
            const BODY: bool = false;
            fn path(&self) -> std::borrow::Cow<'static, str> {
                $path.into()
            }
        }
    };
    ($type:ty: $method:ident $path:literal) => {
        impl $crate::firecracker::api::Call for $type {
            type Answer = ();
            const METHOD: http::Method = http::Method::$method;
            fn path(&self) -> std::borrow::Cow<'static, str> {
                $path.into()
            }
        }
    };
    ($type:ty: $method:ident $path:literal . $field:ident) => {
        impl $crate::firecracker::api::Call for $type {
            type Answer = ();
            const METHOD: http::Method = http::Method::$method;
            fn path(&self) -> std::borrow::Cow<'static, str> {
                format!("{}/{}", $path, self.$field).into()
            }
        }
    };
}
use call;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn sent<C: Call>(call: &C) -> (String, Value) {
        (format!("{} {}", C::METHOD, call.path()), serde_json::to_value(call).unwrap())
    }

    #[test]
    fn requests_have_firecrackers_form() {
        let disk = Drive {
            drive_id: "root".into(),
            is_root_device: false,
            partuuid: None,
            cache_type: Some(CacheType::Writeback),
            is_read_only: Some(false),
            path_on_host: Some("/disk".into()),
            rate_limiter: Some(RateLimiter {
                bandwidth: Some(TokenBucket { size: 100, one_time_burst: None, refill_time: 10 }),
                ops: None,
            }),
            io_engine: Some(IoEngine::Sync),
            socket: None,
        };
        let expected = json!({
            "drive_id": "root", "is_root_device": false, "cache_type": "Writeback", "is_read_only": false,
            "path_on_host": "/disk", "io_engine": "Sync",
            "rate_limiter": {"bandwidth": {"size": 100, "refill_time": 10}}
        });
        assert_eq!(sent(&disk), ("PUT /drives/root".into(), expected));
        let machine = MachineConfig {
            vcpu_count: 2,
            mem_size_mib: 512,
            smt: None,
            track_dirty_pages: Some(true),
            huge_pages: Some(HugePages::TwoMiB),
            cpu_template: None,
        };
        let expected =
            json!({"vcpu_count": 2, "mem_size_mib": 512, "track_dirty_pages": true, "huge_pages": "2M"});
        assert_eq!(sent(&machine), ("PUT /machine-config".into(), expected));
        let load = LoadSnapshot {
            snapshot_path: "/snapfile".into(),
            mem_backend: MemoryBackend { backend_type: BackendType::Uffd, backend_path: "/uffd.sock".into() },
            track_dirty_pages: Some(true),
            resume_vm: Some(false),
            network_overrides: vec![NetworkOverride {
                iface_id: "eth0".into(),
                host_dev_name: "tap0".into(),
            }],
            vsock_override: None,
            clock_realtime: Some(true),
        };
        let expected = json!({
            "snapshot_path": "/snapfile", "mem_backend": {"backend_type": "Uffd", "backend_path": "/uffd.sock"},
            "track_dirty_pages": true, "resume_vm": false, "clock_realtime": true,
            "network_overrides": [{"iface_id": "eth0", "host_dev_name": "tap0"}]
        });
        assert_eq!(sent(&load), ("PUT /snapshot/load".into(), expected));
        let pause = Vm { state: VmState::Paused };
        assert_eq!(sent(&pause), ("PATCH /vm".into(), json!({"state": "Paused"})));
        let contents = json!({"key": [1, 2]});
        assert_eq!(sent(&PutMmds(contents.clone())), ("PUT /mmds".into(), contents));
        assert_eq!(sent(&StopHinting).0, "PATCH /balloon/hinting/stop");
        assert_eq!(sent(&Entropy::default()), ("PUT /entropy".into(), json!({})));
    }

    #[test]
    fn a_configuration_file_has_firecrackers_names() {
        let config = FullConfig {
            metrics: Some(Metrics { metrics_path: "/m".into() }),
            boot_source: Some(BootSource {
                kernel_image_path: "/kernel".into(),
                initrd_path: None,
                boot_args: None,
            }),
            ..FullConfig::default()
        };
        let expected = json!({
            "boot-source": {"kernel_image_path": "/kernel"}, "metrics": {"metrics_path": "/m"},
            "drives": [], "network-interfaces": []
        });
        assert_eq!(serde_json::to_value(&config).unwrap(), expected);
        assert_eq!(serde_json::from_value::<FullConfig>(expected).unwrap(), config);
    }
}
