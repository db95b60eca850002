//! The build pipeline: kernel, root file system, cold boot, wait until ready, warm up, snapshot.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use nidus_storage::{Artifact, BuildId, Builds, StagedBuild};
use nidus_vmm::VmmError;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::boot::{ColdBoot, cold_boot};
use crate::metadata::{Context, Start};
use crate::{DiskError, TemplateMetadata, VmHost};
use crate::{image, rootfs};

/// How serious a log line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Output of a tool.
    Debug,
    /// A step and its result.
    Info,
    /// Something a person should look at.
    Warn,
    /// The reason of a failure.
    Error,
}

/// One line of a build's log.
#[derive(Debug, Clone)]
pub struct BuildLog {
    /// When.
    pub time: DateTime<Utc>,
    /// How serious.
    pub level: Level,
    /// Step that it belongs to: `base`, the number of an instruction from 1, or `finalize`.
    pub step: String,
    /// The text.
    pub message: String,
}

/// Where the root file system comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// Debian packages of a suite (`bookworm`).
    Debian {
        /// Name of the suite.
        suite: String,
        /// Packages beside those that every base has.
        packages: Vec<String>,
    },
    /// A file of this host, as its owner configured it.
    Image {
        /// An ext4 image, at most as large as the template's disk, of a system with a user `user`
        /// (see [`make_image`](crate::make_image)). envd is put into a copy of it.
        path: PathBuf,
    },
    /// An image that was found in a registry. envd and what a sandbox expects are put into it.
    Registry(Box<nidus_oci::Image>),
}

/// What to build.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// Template that the build belongs to.
    pub template_id: String,
    /// Id of the new build.
    pub build_id: BuildId,
    /// Virtual processors, 1 to 32.
    pub vcpu: u32,
    /// Memory in MiB, 128 to 65,536, even.
    pub memory_mb: u32,
    /// Root disk in MiB.
    pub disk_mb: u32,
    /// Root file system.
    pub source: Source,
    /// The memory consists of pages of 2 MiB, out of the host's pool of them.
    pub huge_pages: bool,
    /// Version of the guest's kernel; the newest one here when none is named.
    pub kernel: Option<String>,
    /// What holds for the programs of sandboxes.
    pub context: Context,
}

impl BuildRequest {
    /// Checks the sizes.
    ///
    /// # Errors
    /// [`BuildError::BadRequest`] that names the one that is out of bounds.
    pub fn check(&self) -> Result<(), BuildError> {
        check_sizes(Some(self.vcpu), Some(self.memory_mb), Some(self.disk_mb)).map_err(BuildError::BadRequest)
    }
}

/// Checks the sizes of a template, those that are said.
///
/// # Errors
/// In words, with the one that is out of bounds.
pub fn check_sizes(vcpu: Option<u32>, memory_mb: Option<u32>, disk_mb: Option<u32>) -> Result<(), String> {
    if let Some(n) = vcpu.filter(|n| !(1..=32).contains(n)) {
        return Err(format!("{n} vCPUs are not between 1 and 32"));
    }
    if let Some(n) = memory_mb.filter(|n| !(128..=65_536).contains(n) || !n.is_multiple_of(2)) {
        return Err(format!("{n} MiB of memory are not an even number from 128 to 65536"));
    }
    if let Some(n) = disk_mb.filter(|n| !(512..=1_048_576).contains(n)) {
        return Err(format!("a disk of {n} MiB is not between 512 and 1048576"));
    }
    Ok(())
}

/// Files and ids that builds use on this host.
#[derive(Debug, Clone)]
pub struct BuildConfig {
    /// Kernels by version.
    pub kernels: PathBuf,
    /// Directory for work in progress; emptied by [`Builder::reclaim`].
    pub work: PathBuf,
    /// The static envd program.
    pub envd: PathBuf,
    /// The static guest-init program.
    pub guest_init: PathBuf,
}

/// Why a build failed.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The request cannot be carried out as it stands.
    #[error("{0}")]
    BadRequest(String),
    /// Cancelled by its caller.
    #[error("the build was cancelled")]
    Cancelled,
    /// A program is missing.
    #[error("{program} was not found. Install it: apt-get install {package}")]
    ToolMissing {
        /// Program.
        program: String,
        /// Debian package.
        package: &'static str,
    },
    /// A program failed.
    #[error("{program} failed ({status}):\n{output}")]
    Tool {
        /// Program.
        program: String,
        /// Exit status.
        status: String,
        /// Its last lines.
        output: String,
    },
    /// No kernel and no way to get one.
    #[error(
        "There is no guest kernel: Debian's package {package} cannot be had here. Run apt-get update, or put vmlinuz and modules/*.ko into {dir}/VERSION/"
    )]
    NoKernel {
        /// Package tried.
        package: &'static str,
        /// Where a kernel could be put by hand.
        dir: PathBuf,
    },
    /// The guest did not come up.
    #[error("the guest was not ready: {reason}\nlast lines of its console:\n{console}")]
    NotReady {
        /// What was seen.
        reason: String,
        /// End of the console.
        console: String,
    },
    /// A file operation.
    #[error("Cannot {action}: {source}")]
    Io {
        /// What was being done, and to what.
        action: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// Storage of artifacts.
    #[error(transparent)]
    Storage(#[from] nidus_storage::StorageError),
    /// The root disk.
    #[error(transparent)]
    Block(#[from] nidus_block::BlockError),
    /// The root disk as the VMM has it.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Network of the build's VM.
    #[error(transparent)]
    Network(#[from] nidus_network::NetworkError),
    /// The image.
    #[error(transparent)]
    Image(nidus_oci::OciError),
}

impl From<nidus_oci::OciError> for BuildError {
    fn from(e: nidus_oci::OciError) -> Self {
        match e {
            nidus_oci::OciError::Cancelled => Self::Cancelled,
            e => Self::Image(e),
        }
    }
}

impl BuildError {
    /// An [`BuildError::Io`] about a path.
    pub fn io(action: &str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action: format!("{action} {}", path.display()), source }
    }
}

/// Builds templates on this node.
pub struct Builder {
    pub(crate) config: BuildConfig,
    store: Arc<Builds>,
    pub(crate) host: Arc<VmHost>,
    /// Held while a kernel is fetched.
    pub(crate) fetching: tokio::sync::Mutex<()>,
}

/// Sends log lines of one step.
#[derive(Debug, Clone)]
pub struct Log {
    to: mpsc::UnboundedSender<BuildLog>,
    step: String,
}

impl Log {
    /// Lines of `step` go to `to`.
    pub fn new(to: mpsc::UnboundedSender<BuildLog>, step: impl Into<String>) -> Self {
        Self { to, step: step.into() }
    }

    /// The same for another step.
    pub fn of(&self, step: impl Into<String>) -> Self {
        Self { to: self.to.clone(), step: step.into() }
    }

    /// The step that lines belong to.
    pub fn step(&self) -> &str {
        &self.step
    }

    /// Sends a line.
    pub fn at(&self, level: Level, message: impl Into<String>) {
        let (step, message) = (self.step.clone(), message.into());
        let _ = self.to.send(BuildLog { time: Utc::now(), level, step, message });
    }

    /// Sends a line of level info.
    pub fn info(&self, message: impl Into<String>) {
        self.at(Level::Info, message);
    }
}

/// How long a guest may take from power-on to envd's answer. Software emulation on a busy host
/// is the slow end.
pub const READY_LIMIT: Duration = Duration::from_secs(180);

impl Builder {
    /// A builder over this node's parts.
    pub fn new(config: BuildConfig, store: Arc<Builds>, host: Arc<VmHost>) -> Self {
        Self { config, store, host, fetching: Default::default() }
    }

    /// Removes what builds of a killed daemon left in the work directory.
    pub fn reclaim(config: &BuildConfig) -> Result<(), BuildError> {
        for entry in std::fs::read_dir(&config.work).into_iter().flatten().flatten() {
            let path = entry.path();
            std::fs::remove_dir_all(&path).map_err(|e| BuildError::io("remove", &path, e))?;
        }
        Ok(())
    }

    /// Runs a build to its end and publishes its artifacts; a failed or cancelled one leaves
    /// nothing.
    pub async fn build(
        &self,
        request: BuildRequest,
        log: &Log,
        cancel: &CancellationToken,
    ) -> Result<TemplateMetadata, BuildError> {
        request.check()?;
        let work = self.config.work.join(request.build_id.to_string());
        std::fs::create_dir_all(&work).map_err(|e| BuildError::io("make", &work, e))?;
        let result = self.build_in(&work, &request, log, cancel).await;
        let gone = work.clone();
        let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(gone)).await;
        if !matches!(removed, Ok(Ok(()))) {
            log.at(Level::Warn, format!("{} could not be removed", work.display()));
        }
        result
    }

    async fn build_in(
        &self,
        work: &Path,
        request: &BuildRequest,
        log: &Log,
        cancel: &CancellationToken,
    ) -> Result<TemplateMetadata, BuildError> {
        let staged = self.store.stage(request.build_id).await?;
        log.info("looking for a guest kernel");
        let kernel = self.wanted_kernel(request.kernel.as_deref(), cancel, |l| log.info(l)).await?;
        log.info(format!("kernel {}", kernel.version));
        let boot = self.boot(&kernel, work).await?;
        self.make_rootfs(work, request, &staged, log, cancel).await?;
        let boot = ColdBoot {
            name: format!("build-{}", request.build_id),
            boot,
            vcpus: request.vcpu,
            memory_mb: request.memory_mb,
            huge_pages: request.huge_pages,
            rootfs: staged.path(Artifact::Rootfs),
            memfile: staged.path(Artifact::Memfile),
            snapfile: staged.path(Artifact::Snapfile),
            overlay: work.join("overlay"),
            limit: READY_LIMIT,
            provision: matches!(request.source, Source::Registry(_)),
        };
        cold_boot(&self.host, &boot, log, cancel).await?;
        let metadata = self.finish(request, kernel.version, &staged).await?;
        log.info("publishing the artifacts");
        staged.commit().await?;
        log.info(format!("build {} is ready", request.build_id));
        Ok(metadata)
    }

    async fn make_rootfs(
        &self,
        work: &Path,
        request: &BuildRequest,
        staged: &StagedBuild,
        log: &Log,
        cancel: &CancellationToken,
    ) -> Result<(), BuildError> {
        let root = work.join("rootfs");
        let tool = |l: &str| {
            let level = if l.starts_with("I: ") { Level::Info } else { Level::Debug };
            log.at(level, l.trim_start_matches("I: "));
        };
        let (suite, packages) = match &request.source {
            Source::Debian { suite, packages } => (suite, packages),
            Source::Image { path } => {
                log.info(format!("copying the image {}", path.display()));
                let (to, envd) = (staged.path(Artifact::Rootfs), &self.config.envd);
                return image::install(path, &to, envd, work, request.disk_mb, cancel, tool).await;
            }
            Source::Registry(image) => {
                return self.make_registry_rootfs(work, request, image, staged, log, cancel).await;
            }
        };
        log.info(format!("making Debian {suite} from packages"));
        rootfs::debian(suite, packages, &root, cancel, tool).await?;
        let (tree, envd) = (root.clone(), self.config.envd.clone());
        blocking(move || rootfs::customise(&tree, &envd)).await?;
        log.info(format!("writing an ext4 image of {} MiB", request.disk_mb));
        rootfs::write_ext4(&root, &staged.path(Artifact::Rootfs), request.disk_mb, cancel, tool).await?;
        blocking(move || std::fs::remove_dir_all(&root).map_err(|e| BuildError::io("remove", &root, e))).await
    }

    /// Headers and metadata.
    async fn finish(
        &self,
        request: &BuildRequest,
        kernel_version: String,
        staged: &StagedBuild,
    ) -> Result<TemplateMetadata, BuildError> {
        let build = request.build_id;
        for (artifact, size) in [
            (Artifact::RootfsHeader, u64::from(request.disk_mb) << 20),
            (Artifact::MemfileHeader, u64::from(request.memory_mb) << 20),
        ] {
            let header = nidus_block::header::Header::identity(build, size, nidus_vmm::PAGE_SIZE)
                .map_err(|e| BuildError::BadRequest(e.to_string()))?;
            staged.write(artifact, header.to_bytes()).await?;
        }
        let metadata = TemplateMetadata {
            version: TemplateMetadata::VERSION,
            template_id: request.template_id.clone(),
            build_id: build,
            kernel_version,
            vmm: self.host.vmm.id(),
            vcpu: request.vcpu,
            memory_mb: request.memory_mb,
            disk_mb: request.disk_mb,
            huge_pages: request.huge_pages,
            filesystem_only: false,
            envd_version: nidus_envd_protocol::ENVD_VERSION.to_owned(),
            parent: None,
            base: None,
            guest: None,
            context: request.context.clone(),
            start: Start::default(),
            created_at: Utc::now(),
        };
        let text = serde_json::to_vec_pretty(&metadata)
            .map_err(|e| BuildError::Io { action: "write metadata.json".into(), source: e.into() })?;
        staged.write(Artifact::Metadata, text).await?;
        Ok(metadata)
    }
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| BuildError::Io {
        action: "finish a file operation".into(),
        source: std::io::Error::other(e),
    })?
}

/// envd's address in a slot.
pub(crate) fn envd_addr(host_ip: std::net::Ipv4Addr) -> SocketAddr {
    SocketAddr::from((host_ip, nidus_envd_protocol::ENVD_PORT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_out_of_bounds_are_refused_by_name() {
        let good = BuildRequest {
            template_id: "t".into(),
            build_id: BuildId::random(),
            vcpu: 1,
            memory_mb: 512,
            disk_mb: 2048,
            source: Source::Debian { suite: "bookworm".into(), packages: Vec::new() },
            huge_pages: false,
            kernel: None,
            context: Context::default(),
        };
        assert!(good.check().is_ok());
        let text = |r: BuildRequest| r.check().unwrap_err().to_string();
        assert!(text(BuildRequest { vcpu: 0, ..good.clone() }).contains("vCPU"));
        assert!(text(BuildRequest { memory_mb: 513, ..good.clone() }).contains("memory"));
        assert!(text(BuildRequest { disk_mb: 1, ..good }).contains("disk"));
    }
}
