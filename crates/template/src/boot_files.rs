//! What a guest is booted with: a kernel of this host, and an initramfs made for it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nidus_vmm::Boot;
use nidus_vmm::guest::Kernel;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::build::blocking;
use crate::{BuildError, Builder};

/// What one guest is booted with. The files are needed until it runs, and go with this.
#[derive(Debug)]
pub struct BootFiles {
    /// Kernel, initramfs and command line.
    pub boot: Boot,
    /// Version of the kernel.
    pub kernel_version: String,
    _work: TempDir,
}

impl Builder {
    /// Files to boot a disk with that knows the kernel `version`. Any kernel does, since its modules are in
    /// the initramfs: where that one is not, it is the newest here, or one that is fetched.
    ///
    /// # Errors
    /// When there is no kernel here and none can be had; when the files cannot be written.
    pub async fn files_to_boot(
        &self,
        version: &str,
        cancel: &CancellationToken,
    ) -> Result<BootFiles, BuildError> {
        let kernel = self.kernel(Some(version), cancel, |line| tracing::info!("{line}")).await?;
        if kernel.version != version {
            tracing::info!("there is no kernel {version} here: booting with {}", kernel.version);
        }
        let dir = self.config.work.clone();
        let work = blocking(move || {
            let wrap = |e| BuildError::io("make a directory in", &dir, e);
            std::fs::create_dir_all(&dir).map_err(wrap)?;
            // A VMM opens them as its own user.
            let mode = std::fs::Permissions::from_mode(0o755);
            tempfile::Builder::new().prefix("boot-").permissions(mode).tempdir_in(&dir).map_err(wrap)
        })
        .await?;
        let boot = self.boot(&kernel, work.path()).await?;
        Ok(BootFiles { boot, kernel_version: kernel.version, _work: work })
    }

    /// The kernel `version` if it is here, else the newest one; fetched if there is none at all.
    pub(crate) async fn kernel(
        &self,
        version: Option<&str>,
        cancel: &CancellationToken,
        line: impl FnMut(&str),
    ) -> Result<Kernel, BuildError> {
        let (kernels, wanted) = (self.config.kernels.clone(), version.map(str::to_owned));
        let known = blocking(move || {
            Ok(Kernel::list(&kernels).into_iter().find(|k| Some(&k.version) == wanted.as_ref()))
        });
        if let Some(kernel) = known.await? {
            return Ok(kernel);
        }
        // One fetches, the others find what it fetched.
        let _turn = self.fetching.lock().await;
        crate::kernel::ensure(&self.config.kernels, cancel, line).await
    }

    /// The kernel of this very version, or the newest one if none is named; fetched if there is none at all.
    ///
    /// # Errors
    /// When a version was named that is not here.
    pub(crate) async fn wanted_kernel(
        &self,
        version: Option<&str>,
        cancel: &CancellationToken,
        line: impl FnMut(&str),
    ) -> Result<Kernel, BuildError> {
        let kernel = self.kernel(version, cancel, line).await?;
        match version {
            Some(wanted) if kernel.version != wanted => Err(BuildError::BadRequest(format!(
                "there is no kernel {wanted:?} on this node; the newest one here is {}",
                kernel.version
            ))),
            _ => Ok(kernel),
        }
    }

    /// What this node boots a guest with; the initramfs is made in `work`.
    pub(crate) async fn boot(&self, kernel: &Kernel, work: &Path) -> Result<Boot, BuildError> {
        let (needs, initrd) = (self.host.vmm.needs(), work.join("initrd"));
        let cmdline = format!("console=ttyS0 quiet {} random.trust_cpu=on", needs.kernel_arguments);
        let (kernel, guest_init) = (kernel.clone(), self.config.guest_init.clone());
        blocking(move || {
            kernel.write_initramfs(&guest_init, &initrd)?;
            Ok(Boot { kernel: kernel.image_for(needs.kernel)?, initrd, cmdline })
        })
        .await
    }
}
