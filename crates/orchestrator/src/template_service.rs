//! `TemplateService` of the contract.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use nidus_build::{Base, BuildSpec, FilesError, Step, StepSpec};
use nidus_oci::Credentials;
use nidus_proto::node::template_service_server::TemplateService;
use nidus_proto::node::*;
use nidus_sandbox::RemoveError;
use nidus_storage::{BuildId, StorageError};
use nidus_template::{BuildLog, Level, Start, TemplateMetadata};
use tonic::{Request, Response, Status};

use crate::Node;
use crate::builds::Progress;
use crate::sandbox_service::{from_time, to_time};
use crate::server::UPLOADS;

/// Most steps of one template.
const MAX_STEPS: usize = 1000;
/// Most log lines in one answer.
const MAX_LINES: usize = 1000;

/// The service over a node.
pub(crate) struct Templates(pub Arc<Node>);

pub(crate) fn build_id(text: &str) -> Result<BuildId, Status> {
    text.parse().map_err(|_| Status::invalid_argument(format!("build id '{text}' is not a UUID")))
}

/// What a template can begin with here.
fn base(config: &TemplateConfig, local: &BTreeMap<String, PathBuf>) -> Result<Base, Status> {
    let bad = |e: String| Status::invalid_argument(e);
    match &config.source {
        Some(template_config::Source::FromImage(image)) => {
            if let Some(path) = local.get(image) {
                return Ok(Base::Image { path: path.clone() });
            }
            // E2B's own base image is a Debian with Python, as ours is.
            let image =
                if image == "e2bdev/base" || image.starts_with("e2bdev/base:") { DEBIAN } else { image };
            if let Some(path) = local.get(image) {
                return Ok(Base::Image { path: path.clone() });
            }
            if let Some(base) = debian(image).map_err(bad)? {
                return Ok(base);
            }
            let reference = image.parse().map_err(|e: nidus_oci::OciError| bad(e.to_string()))?;
            Ok(Base::Registry { reference, credentials: credentials(config.from_image_registry.as_ref())? })
        }
        Some(template_config::Source::FromTemplate(from)) => {
            Ok(Base::Template { build: build_id(&from.build_id)?, name: from.alias.clone() })
        }
        None => Err(Status::invalid_argument("the template names no image to start from")),
    }
}

/// Debian made from packages, if that is what the name means: `debian:SUITE`, or `debian:SUITE,PACKAGE,...` with
/// packages beside those that every base has. A comma is in no image's name.
fn debian(image: &str) -> Result<Option<Base>, String> {
    let mut parts = image.split(',').map(str::trim);
    let suite = match parts.next() {
        Some("debian") => "bookworm",
        Some(name) => name.strip_prefix("debian:").unwrap_or_default(),
        None => "",
    };
    let suite = if suite == "latest" { "bookworm" } else { suite };
    let mut packages: Vec<String> = parts.filter(|p| !p.is_empty()).map(str::to_owned).collect();
    let made = !suite.is_empty() && suite.bytes().all(|b| b.is_ascii_lowercase()) && suite != "experimental";
    match (made, image.contains(',')) {
        // The order is nothing to the system that comes of them.
        (true, _) => {
            packages.sort();
            packages.dedup();
            Ok(Some(Base::Debian { suite: suite.to_owned(), packages }))
        }
        (false, true) => Err(format!(
            "'{image}' is no image: packages are listed after debian:SUITE, as debian:bookworm,git,gcc"
        )),
        // Other tags of that image (slim, dated) are the registry's.
        (false, false) => Ok(None),
    }
}

/// What the package-made base is called.
const DEBIAN: &str = "debian:bookworm";

fn credentials(registry: Option<&FromImageRegistry>) -> Result<Credentials, Status> {
    use from_image_registry::Type;
    Ok(match registry.and_then(|r| r.r#type.clone()) {
        None => Credentials::Anonymous,
        Some(Type::General(r)) => Credentials::Basic { username: r.username, password: r.password },
        Some(Type::Aws(r)) => Credentials::Aws {
            access_key_id: r.aws_access_key_id,
            secret_access_key: r.aws_secret_access_key,
            region: r.aws_region,
        },
        Some(Type::Gcp(r)) => Credentials::Gcp { service_account_json: r.service_account_json },
    })
}

fn steps(config: &TemplateConfig) -> Result<Vec<StepSpec>, Status> {
    if config.steps.len() > MAX_STEPS {
        return Err(Status::invalid_argument(format!("a template has at most {MAX_STEPS} steps")));
    }
    let step = |(n, s): (usize, &TemplateStep)| {
        let step = Step::parse(&s.r#type, &s.args)
            .map_err(|e| Status::invalid_argument(format!("step {}: {e}", n + 1)))?;
        let files = s.files_hash.clone().filter(|h| !h.is_empty());
        Ok(StepSpec { step, files, force: s.force == Some(true) })
    };
    config.steps.iter().enumerate().map(step).collect()
}

fn size(name: &str, value: i32, default: u32) -> Result<u32, Status> {
    match u32::try_from(value) {
        Ok(0) => Ok(default),
        Ok(v) => Ok(v),
        Err(_) => Err(Status::invalid_argument(format!("{name} {value} is negative"))),
    }
}

fn level(l: Level) -> LogLevel {
    match l {
        Level::Debug => LogLevel::Debug,
        Level::Info => LogLevel::Info,
        Level::Warn => LogLevel::Warn,
        Level::Error => LogLevel::Error,
    }
}

fn entry(l: &BuildLog) -> TemplateBuildLogEntry {
    TemplateBuildLogEntry {
        timestamp: Some(from_time(l.time)),
        message: l.message.clone(),
        level: level(l.level) as i32,
        fields: [("step".to_owned(), l.step.clone())].into(),
    }
}

fn metadata(m: &TemplateMetadata) -> TemplateBuildMetadata {
    TemplateBuildMetadata {
        rootfs_size_key: m.disk_mb.cast_signed(),
        envd_version_key: m.envd_version.clone(),
        kernel_version: m.kernel_version.clone(),
        firecracker_version: m.vmm.to_string(),
        scheduling_metadata: None,
    }
}

/// The lines that a status request asks for.
fn select(log: &[BuildLog], request: &TemplateStatusRequest) -> Vec<TemplateBuildLogEntry> {
    let least = request.level.unwrap_or(LogLevel::Debug as i32);
    let (start, end) = (request.start.as_ref().and_then(to_time), request.end.as_ref().and_then(to_time));
    let wanted = |l: &&BuildLog| {
        level(l.level) as i32 >= least && start.is_none_or(|s| l.time >= s) && end.is_none_or(|e| l.time <= e)
    };
    let limit = request.limit.map_or(MAX_LINES, |l| (l as usize).min(MAX_LINES));
    let offset = usize::try_from(request.offset.unwrap_or(0)).unwrap_or(0);
    let lines: Box<dyn Iterator<Item = &BuildLog>> =
        if request.direction == Some(LogsDirection::Backward as i32) {
            Box::new(log.iter().rev())
        } else {
            Box::new(log.iter())
        };
    lines.filter(wanted).skip(offset).take(limit).map(entry).collect()
}

#[tonic::async_trait]
impl TemplateService for Templates {
    async fn template_create(&self, request: Request<TemplateCreateRequest>) -> Result<Response<()>, Status> {
        let mut request = request.into_inner();
        let config = request.template.take().ok_or_else(|| Status::invalid_argument("no template"))?;
        let id = build_id(&config.build_id)?;
        if self.0.status() != ServiceInfoStatus::Healthy {
            return Err(Status::unavailable("this node takes no new builds"));
        }
        let vmm = self.0.factory.vmm();
        if !config.firecracker_version.is_empty() && config.firecracker_version != vmm {
            let wanted = &config.firecracker_version;
            return Err(Status::failed_precondition(format!("this node runs {vmm}, not {wanted}")));
        }
        let base = base(&config, &self.0.config.local_images)?;
        // Of a template that is built upon, what is not said is as it has it.
        let inherits = matches!(base, Base::Template { .. });
        let default = |value: u32| if inherits { 0 } else { value };
        let sandbox = SandboxConfig {
            sandbox_id: format!("build-{id}"),
            template_id: config.template_id.clone(),
            team_id: config.team_id.clone(),
            ..SandboxConfig::default()
        };
        let network = self.0.network.of(&sandbox).await;
        let spec = BuildSpec {
            template_id: config.template_id.clone(),
            build_id: id,
            scope: request.cache_scope.clone().unwrap_or_else(|| config.team_id.clone()),
            vcpu: size("vCpuCount", config.v_cpu_count, default(1))?,
            memory_mb: size("memoryMB", config.memory_mb, default(512))?,
            disk_mb: size("diskSizeMB", config.disk_size_mb, default(self.0.config.default_disk_mb))?,
            huge_pages: config.huge_pages || self.0.config.huge_pages,
            kernel: Some(config.kernel_version.clone()).filter(|k| !k.is_empty()),
            base,
            steps: steps(&config)?,
            start: Start { command: config.start_command.clone(), ready: config.ready_command.clone() },
            force: config.force == Some(true),
            network: network?,
        };
        spec.check().map_err(Status::invalid_argument)?;
        let exists = self.0.builds.stored(id).await.is_some() || self.0.builds.start(spec).is_none();
        if exists {
            return Err(Status::already_exists(format!("there is a build {id} already")));
        }
        Ok(Response::new(()))
    }

    async fn template_build_status(
        &self,
        request: Request<TemplateStatusRequest>,
    ) -> Result<Response<TemplateBuildStatusResponse>, Status> {
        let request = request.into_inner();
        let id = build_id(&request.build_id)?;
        let mut answer = TemplateBuildStatusResponse::default();
        let Some(build) = self.0.builds.get(id) else {
            let m = self.0.builds.stored(id).await;
            let m = m.ok_or_else(|| Status::not_found(format!("build {id} was not found on this node")))?;
            answer.status = TemplateBuildState::Completed as i32;
            answer.metadata = Some(metadata(&m));
            return Ok(Response::new(answer));
        };
        // The state first: lines written after it are in the next answer, none is missed at the end.
        let progress = build.progress.borrow().clone();
        answer.log_entries = select(&build.log.lock(), &request);
        match progress {
            Progress::Running => answer.status = TemplateBuildState::Building as i32,
            Progress::Done(m) => {
                answer.status = TemplateBuildState::Completed as i32;
                answer.metadata = Some(metadata(&m));
            }
            Progress::Failed { message, step, layer } => {
                answer.status = TemplateBuildState::Failed as i32;
                let layer_build_id = layer.map(|l| l.to_string());
                answer.reason = Some(TemplateBuildStatusReason { message, step, layer_build_id });
            }
        }
        Ok(Response::new(answer))
    }

    async fn template_build_delete(
        &self,
        request: Request<TemplateBuildDeleteRequest>,
    ) -> Result<Response<()>, Status> {
        let id = build_id(&request.into_inner().build_id)?;
        self.0.builds.end(id).await;
        self.0.factory.remove(id).await.map_err(|e| match e {
            RemoveError::InUse { .. } | RemoveError::Running { .. } => {
                Status::failed_precondition(e.to_string())
            }
            RemoveError::Storage(StorageError::NotFound(_)) => Status::not_found(e.to_string()),
            RemoveError::Storage(_) => Status::internal(e.to_string()),
        })?;
        Ok(Response::new(()))
    }

    async fn init_layer_file_upload(
        &self,
        request: Request<InitLayerFileUploadRequest>,
    ) -> Result<Response<InitLayerFileUploadResponse>, Status> {
        let request = request.into_inner();
        let scope = request.cache_scope.unwrap_or_default();
        let upload =
            self.0.builds.pipeline.files().begin(&scope, &request.hash).await.map_err(|e| match e {
                FilesError::Busy => Status::resource_exhausted(e.to_string()),
                FilesError::Io { .. } => Status::internal(e.to_string()),
                _ => Status::invalid_argument(e.to_string()),
            })?;
        let url = format!("{}{UPLOADS}{}", self.0.config.url, upload.ticket);
        Ok(Response::new(InitLayerFileUploadResponse { present: upload.present, url: Some(url) }))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn from_image(image: &str) -> TemplateConfig {
        let source = Some(template_config::Source::FromImage(image.into()));
        TemplateConfig { source, ..TemplateConfig::default() }
    }

    #[test]
    fn only_names_that_were_configured_are_files_of_the_host() {
        let local = BTreeMap::from([("debian:bookworm".to_owned(), PathBuf::from("/images/b.ext4"))]);
        let of = |image: &str| base(&from_image(image), &local);
        for image in ["debian:bookworm", "e2bdev/base"] {
            assert!(
                matches!(of(image), Ok(Base::Image { path }) if path == Path::new("/images/b.ext4")),
                "{image}"
            );
        }
        assert!(
            matches!(of("debian:trixie"), Ok(Base::Debian { suite, packages }) if suite == "trixie" && packages.is_empty())
        );
        let (more, same) = (of("debian:bookworm, git,gcc,"), ["gcc", "git"]);
        assert!(
            matches!(more, Ok(Base::Debian { suite, packages }) if suite == "bookworm" && packages == same)
        );
        assert!(of("python:3.12,git").unwrap_err().message().contains("debian:SUITE"));
        assert!(matches!(of("debian:12-slim"), Ok(Base::Registry { .. })));
        for path in ["/images/b.ext4", "file:///images/b.ext4", "debian:bookworm/../b"] {
            assert!(!matches!(of(path), Ok(Base::Image { .. })), "{path}");
        }
    }
}
