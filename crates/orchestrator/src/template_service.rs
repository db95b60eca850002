//! `TemplateService` of the contract.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use nidus_proto::node::template_service_server::TemplateService;
use nidus_proto::node::*;
use nidus_sandbox::RemoveError;
use nidus_storage::{BuildId, StorageError};
use nidus_template::{BuildLog, BuildRequest, Level, Source, TemplateMetadata};
use tonic::{Request, Response, Status};

use crate::Node;
use crate::builds::Progress;
use crate::sandbox_service::{from_time, to_time};

/// Most log lines in one answer.
const MAX_LINES: usize = 1000;

/// The service over a node.
pub(crate) struct Templates(pub Arc<Node>);

pub(crate) fn build_id(text: &str) -> Result<BuildId, Status> {
    text.parse().map_err(|_| Status::invalid_argument(format!("build id '{text}' is not a UUID")))
}

/// Root file systems that can be made here.
fn source(config: &TemplateConfig, local: &BTreeMap<String, PathBuf>) -> Result<Source, Status> {
    match &config.source {
        Some(template_config::Source::FromImage(image)) => {
            if let Some(path) = local.get(image) {
                return Ok(Source::Image { path: path.clone() });
            }
            let suite = match image.strip_prefix("debian:") {
                Some(suite) => suite,
                None if image == "debian" => "bookworm",
                None => {
                    return Err(Status::unimplemented(format!(
                        "image '{image}': images from a registry are not supported yet; debian:SUITE is made from packages"
                    )));
                }
            };
            let suite = if suite == "latest" { "bookworm" } else { suite };
            Ok(Source::Debian { suite: suite.to_owned() })
        }
        Some(template_config::Source::FromTemplate(_)) => {
            Err(Status::unimplemented("building from another template is not supported yet"))
        }
        None => Err(Status::invalid_argument("the template names no image to start from")),
    }
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
        fields: [("step".to_owned(), l.step.to_owned())].into(),
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
        let config = request.into_inner().template.ok_or_else(|| Status::invalid_argument("no template"))?;
        let id = build_id(&config.build_id)?;
        if !config.steps.is_empty() || !config.start_command.is_empty() || !config.ready_command.is_empty() {
            return Err(Status::unimplemented("build steps, start and ready commands are not supported yet"));
        }
        if self.0.status() != ServiceInfoStatus::Healthy {
            return Err(Status::unavailable("this node takes no new builds"));
        }
        let request = BuildRequest {
            template_id: config.template_id.clone(),
            build_id: id,
            vcpu: size("vCpuCount", config.v_cpu_count, 1)?,
            memory_mb: size("memoryMB", config.memory_mb, 512)?,
            disk_mb: size("diskSizeMB", config.disk_size_mb, self.0.config.default_disk_mb)?,
            source: source(&config, &self.0.config.local_images)?,
            huge_pages: config.huge_pages || self.0.config.huge_pages,
        };
        request.check().map_err(|e| Status::invalid_argument(e.to_string()))?;
        let exists = self.0.builds.stored(id).await.is_some() || self.0.builds.start(request).is_none();
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
            Progress::Failed { message, step } => {
                answer.status = TemplateBuildState::Failed as i32;
                answer.reason = Some(TemplateBuildStatusReason { message, step });
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
        _: Request<InitLayerFileUploadRequest>,
    ) -> Result<Response<InitLayerFileUploadResponse>, Status> {
        Err(Status::unimplemented("files of build steps are not supported yet"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_image(image: &str) -> TemplateConfig {
        let source = Some(template_config::Source::FromImage(image.into()));
        TemplateConfig { source, ..TemplateConfig::default() }
    }

    #[test]
    fn only_names_that_were_configured_are_files_of_the_host() {
        let local = BTreeMap::from([("debian:bookworm".to_owned(), PathBuf::from("/images/b.ext4"))]);
        let of = |image: &str| source(&from_image(image), &local);
        assert_eq!(of("debian:bookworm").unwrap(), Source::Image { path: "/images/b.ext4".into() });
        assert_eq!(of("debian:trixie").unwrap(), Source::Debian { suite: "trixie".into() });
        for path in ["/images/b.ext4", "file:///images/b.ext4", "debian:bookworm/../b"] {
            assert!(!matches!(of(path), Ok(Source::Image { .. })), "{path}");
        }
    }
}
