//! Which VMM runs guests here: asked once for each host, kernel and program, by booting the guest's
//! kernel.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{anyhow, bail};
use nidus_vmm::Vmm;
use nidus_vmm::cgroup::CgroupRoot;
use nidus_vmm::firecracker::{self, Firecracker, Program};
use nidus_vmm::guest::Kernel;
use nidus_vmm::qemu::{Accel, Qemu, probe};
use serde::{Deserialize, Serialize};

use crate::config::{self, Config};

/// A kernel that says nothing for this long does not run.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// Whoever insists on a driver has reason to expect it, and may have a slow host (itself a virtual one).
const INSISTED_LIMIT: Duration = Duration::from_secs(60);

/// Whether a driver works here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// It does.
    pub works: bool,
    /// One sentence.
    pub reason: String,
}

/// What is asked with, and where answers are kept.
pub struct Probes<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The guest's kernel.
    pub kernel: &'a Kernel,
    /// The guest's first program.
    pub guest_init: &'a Path,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    question: String,
    answer: Answer,
}

impl Probes<'_> {
    /// Whether QEMU with KVM runs the guest's kernel.
    pub async fn qemu_kvm(&self) -> anyhow::Result<Answer> {
        let qemu = &self.config.qemu;
        let (program, version) = probe::find(qemu).await?;
        let limit = limit(self.config.accel == config::Accel::Kvm);
        self.ask("kvm", &format!("{} {version}", program.display()), limit, async |initrd| {
            let choice = probe::kvm(qemu, &self.kernel.image(), initrd, limit).await;
            Ok(Answer { works: choice.accel == Accel::Kvm, reason: choice.reason })
        })
        .await
    }

    /// Firecracker, if one is configured or lies where it is looked for.
    pub async fn firecracker_program(&self) -> anyhow::Result<Option<Program>> {
        let Some(place) = firecracker_place(self.config) else { return Ok(None) };
        Ok(Some(firecracker::find(&place, self.config.firecracker_version.as_deref()).await?))
    }

    /// Whether Firecracker runs the guest's kernel here, with a disk on a kernel NBD device.
    pub async fn firecracker(&self, program: &Program) -> anyhow::Result<Answer> {
        if let Err(e) = nidus_block::nbd::kernel::probe() {
            return Ok(Answer { works: false, reason: format!("Firecracker cannot be used: {e}") });
        }
        let kernel = self.kernel.clone();
        let elf = tokio::task::spawn_blocking(move || kernel.elf()).await??;
        let limit = limit(self.config.vmm == config::VmmChoice::Firecracker);
        let name = format!("{} {}", program.path.display(), program.version);
        self.ask("firecracker", &name, limit, async |initrd| {
            let verdict = firecracker::probe::kvm(program, &elf, initrd, limit).await;
            Ok(Answer { works: verdict.works, reason: verdict.reason })
        })
        .await
    }

    /// Asks, unless the answer of this boot of the host is kept.
    async fn ask(
        &self,
        name: &str,
        program: &str,
        limit: Duration,
        probe: impl AsyncFnOnce(&Path) -> anyhow::Result<Answer>,
    ) -> anyhow::Result<Answer> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        // A short try that failed does not answer for a long one.
        let question = format!("{program} {} {} {limit:?}", self.kernel.version, boot.trim());
        let dir = &self.config.data_dir;
        let file = dir.join(format!("probe-{name}.json"));
        let kept = std::fs::read(&file).ok().and_then(|t| serde_json::from_slice::<Kept>(&t).ok());
        if let Some(kept) = kept.filter(|k| k.question == question) {
            return Ok(kept.answer);
        }
        let initrd = dir.join(format!("probe-{name}.initrd"));
        self.kernel.write_initramfs(self.guest_init, &initrd)?;
        let answer = probe(&initrd).await;
        let _ = std::fs::remove_file(&initrd);
        let answer = answer?;
        // Asked again next time if it cannot be kept.
        if let Ok(text) = serde_json::to_vec(&Kept { question, answer: answer.clone() }) {
            let _ = std::fs::write(&file, text);
        }
        Ok(answer)
    }
}

fn limit(insisted: bool) -> Duration {
    if insisted { INSISTED_LIMIT } else { PROBE_LIMIT }
}

/// Where Firecracker is looked for: as configured, in the data directory, in PATH.
fn firecracker_place(config: &Config) -> Option<PathBuf> {
    if let Some(place) = &config.firecracker {
        return Some(place.clone());
    }
    let versions = config.data_dir.join("fc-versions");
    if !firecracker::versions(&versions).is_empty() {
        return Some(versions);
    }
    crate::doctor::in_path("firecracker")
}

/// The driver, and why it is this one.
pub async fn choose(probes: &Probes<'_>, cgroups: CgroupRoot) -> anyhow::Result<(Arc<dyn Vmm>, String)> {
    let config = probes.config;
    let mut why = String::new();
    if config.vmm != config::VmmChoice::Qemu {
        let must = config.vmm == config::VmmChoice::Firecracker;
        match with_firecracker(probes).await {
            Ok(Some((program, reason))) => {
                return Ok((Arc::new(Firecracker::new(program, cgroups)), reason));
            }
            Ok(None) if must => bail!(
                "vmm is set to firecracker, and no Firecracker was found: take a release from its project's page and set NIDUS_FIRECRACKER to the program"
            ),
            Ok(None) => {}
            Err(e) if must => bail!("vmm is set to firecracker, but it cannot be used: {e:#}"),
            Err(e) => why = format!("{e:#}; "),
        }
    }
    let (accel, reason) = qemu_accel(probes).await?;
    Ok((Arc::new(Qemu::new(&config.qemu, accel, cgroups).await?), format!("{why}{reason}")))
}

async fn with_firecracker(probes: &Probes<'_>) -> anyhow::Result<Option<(Program, String)>> {
    let Some(program) = probes.firecracker_program().await? else { return Ok(None) };
    let answer = probes.firecracker(&program).await?;
    if answer.works { Ok(Some((program, answer.reason))) } else { Err(anyhow!(answer.reason)) }
}

async fn qemu_accel(probes: &Probes<'_>) -> anyhow::Result<(Accel, String)> {
    let wanted = probes.config.accel;
    if wanted == config::Accel::Tcg {
        return Ok((Accel::Tcg, "QEMU with software emulation, as configured".into()));
    }
    let answer = probes.qemu_kvm().await?;
    match (answer.works, wanted) {
        (true, _) => Ok((Accel::Kvm, answer.reason)),
        (false, config::Accel::Kvm) => bail!("accel is set to kvm, but {}", answer.reason),
        (false, _) => Ok((Accel::Tcg, answer.reason)),
    }
}
