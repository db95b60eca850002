//! Who has a device open. The kernel has no call that tells, so this looks from both sides: at the
//! open files of all processes, and at whether the device can be claimed (which a mount prevents).

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use rustix::fs::{OFlags, makedev};

use super::sysfs;

/// Names one holder of the device, for people; `None` if there is none. Blocks for as long as it
/// takes to look at every open file of the host.
pub(super) fn holder(index: u32) -> Option<String> {
    let (major, minor) = sysfs::device_number(index)?;
    process_with(makedev(major, minor)).or_else(|| claimed(index))
}

fn process_with(device: u64) -> Option<String> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes.filter(|p| p.file_name().to_string_lossy().parse::<u32>().is_ok()).find_map(|process| {
        // A process that ends meanwhile holds nothing.
        let files = fs::read_dir(process.path().join("fd")).ok()?;
        let open = files.flatten().any(|file| {
            fs::metadata(file.path()).is_ok_and(|m| m.file_type().is_block_device() && m.rdev() == device)
        });
        open.then(|| {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            format!("process {} ({})", process.file_name().to_string_lossy(), name.trim())
        })
    })
}

fn claimed(index: u32) -> Option<String> {
    // O_EXCL on a block device claims it (open(2)).
    let exclusive = OFlags::EXCL.bits().cast_signed();
    match File::options().read(true).custom_flags(exclusive).open(sysfs::node(index)) {
        Err(e) if e.kind() == ErrorKind::ResourceBusy => Some("a mount".into()),
        _ => None,
    }
}
