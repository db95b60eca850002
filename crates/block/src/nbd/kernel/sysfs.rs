//! What the kernel tells about its NBD devices in /sys/block.

use std::fs;
use std::path::{Path, PathBuf};

const BLOCK_DEVICES: &str = "/sys/block";
const SECTOR: u64 = 512;

/// The numbers of all devices, ascending.
pub(super) fn devices() -> Vec<u32> {
    let entries = fs::read_dir(BLOCK_DEVICES).into_iter().flatten().flatten();
    let mut numbers: Vec<u32> =
        entries.filter_map(|e| e.file_name().to_str()?.strip_prefix("nbd")?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

/// The device's node.
pub(super) fn node(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}

fn attribute(index: u32, name: &str) -> Option<String> {
    let path = Path::new(BLOCK_DEVICES).join(format!("nbd{index}")).join(name);
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// The device's size in bytes; 0 while it has no connection.
pub(super) fn size(index: u32) -> u64 {
    attribute(index, "size").and_then(|s| s.parse::<u64>().ok()).unwrap_or(0) * SECTOR
}

/// The process (for one with threads: the thread) that gave the device its connections; there while it
/// is configured.
pub(super) fn pid(index: u32) -> Option<u32> {
    attribute(index, "pid")?.parse().ok()
}

/// The identifier that came with the connections, where the kernel keeps it (5.14 and newer).
pub(super) fn backend(index: u32) -> Option<String> {
    attribute(index, "backend")
}

/// The kernel's number of the device, `major:minor`.
pub(super) fn device_number(index: u32) -> Option<(u32, u32)> {
    let text = attribute(index, "dev")?;
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
