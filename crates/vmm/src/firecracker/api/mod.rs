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
