//! The balloon: memory that the guest gives back.

use std::borrow::Cow;

use http::Method;
use serde::{Deserialize, Serialize};

use super::{Call, call};

/// The device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balloon {
    /// MiB that the guest is asked for.
    pub amount_mib: u32,
    /// The guest may take them back when it is short of memory.
    pub deflate_on_oom: bool,
    /// Seconds between statistics; 0 for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats_polling_interval_s: Option<u16>,
    /// The host can ask which pages are free (since 1.14).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_page_hinting: Option<bool>,
    /// The guest tells freed pages by itself (since 1.14).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_page_reporting: Option<bool>,
}
call!(Balloon: PUT "/balloon");

/// Another size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PatchBalloon {
    /// MiB that the guest is asked for.
    pub amount_mib: u32,
}
call!(PatchBalloon: PATCH "/balloon");

/// Asks for the device.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GetBalloon;
call!(GetBalloon: GET "/balloon" -> Balloon);

/// Another interval of statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PatchBalloonStats {
    /// Seconds; cannot be changed from or to 0.
    pub stats_polling_interval_s: u16,
}
call!(PatchBalloonStats: PATCH "/balloon/statistics");

/// Asks for the statistics.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GetBalloonStats;
call!(GetBalloonStats: GET "/balloon/statistics" -> BalloonStats);

/// The statistics. Pages are of 4 KiB; what the guest does not tell is not set.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BalloonStats {
    /// Wanted size in pages.
    pub target_pages: u64,
    /// Size in pages.
    pub actual_pages: u64,
    /// Wanted size in MiB.
    pub target_mib: u64,
    /// Size in MiB.
    pub actual_mib: u64,
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that read from a disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Bytes that nothing uses.
    pub free_memory: Option<u64>,
    /// Bytes in all.
    pub total_memory: Option<u64>,
    /// Bytes that could be used without swapping.
    pub available_memory: Option<u64>,
    /// Bytes of caches.
    pub disk_caches: Option<u64>,
    /// Processes that were killed for want of memory.
    pub oom_kill: Option<u64>,
}

/// Starts to ask the guest which pages are free (since 1.14).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct StartHinting {
    /// The end is acknowledged by Firecracker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acknowledge_on_stop: Option<bool>,
}
call!(StartHinting: PATCH "/balloon/hinting/start");

/// Stops to ask.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct StopHinting;

impl Call for StopHinting {
    type Answer = ();
    const METHOD: Method = Method::PATCH;
    const BODY: bool = false;
    fn path(&self) -> Cow<'static, str> {
        "/balloon/hinting/stop".into()
    }
}

/// Asks how far the hinting is.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GetHintingStatus;
call!(GetHintingStatus: GET "/balloon/hinting/status" -> HintingStatus);

/// How far the hinting is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct HintingStatus {
    /// Last command of the host.
    pub host_cmd: u32,
    /// Last command that the guest has answered.
    pub guest_cmd: Option<u32>,
}
