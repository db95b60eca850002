//! Which accelerator runs the guest's kernel here, asked once for each host, kernel and QEMU.

use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use nidus_vmm::guest::Kernel;
use nidus_vmm::qemu::{Accel, probe};
use serde::{Deserialize, Serialize};

use crate::config;

/// A kernel that says nothing for this long does not run.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// Whoever insists on KVM has reason to expect it, and may have a slow host (itself a virtual one).
const INSISTED_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Answer {
    /// What the answer holds for.
    question: String,
    kvm: bool,
    reason: String,
}

/// The accelerator, and why.
pub async fn choose(
    wanted: config::Accel,
    qemu: &Path,
    kernel: &Kernel,
    guest_init: &Path,
    data_dir: &Path,
) -> anyhow::Result<(Accel, String)> {
    if wanted == config::Accel::Tcg {
        return Ok((Accel::Tcg, "software emulation, as configured".into()));
    }
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let (program, version) = probe::find(qemu).await?;
    // A short try that failed does not answer for a long one.
    let insisted = if wanted == config::Accel::Kvm { " insisted" } else { "" };
    let question = format!("{} {version} {} {}{insisted}", program.display(), kernel.version, boot.trim());
    let cache = data_dir.join("accel.json");
    let known = std::fs::read(&cache).ok().and_then(|t| serde_json::from_slice::<Answer>(&t).ok());
    let answer = match known.filter(|k| k.question == question) {
        Some(answer) => answer,
        None => {
            let initrd = data_dir.join("probe.initrd");
            kernel.write_initramfs(guest_init, &initrd)?;
            let limit = if wanted == config::Accel::Kvm { INSISTED_LIMIT } else { PROBE_LIMIT };
            let choice = probe::kvm(qemu, &kernel.image(), &initrd, limit).await;
            let _ = std::fs::remove_file(&initrd);
            let answer = Answer { question, kvm: choice.accel == Accel::Kvm, reason: choice.reason };
            // Asked again next time if it cannot be kept.
            if let Ok(text) = serde_json::to_vec(&answer) {
                let _ = std::fs::write(&cache, text);
            }
            answer
        }
    };
    match (answer.kvm, wanted) {
        (true, _) => Ok((Accel::Kvm, answer.reason)),
        (false, config::Accel::Kvm) => bail!("accel is set to kvm, but {}", answer.reason),
        (false, _) => Ok((Accel::Tcg, answer.reason)),
    }
}
