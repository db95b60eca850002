//! Builds: started on the node, followed to their end, recorded.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use nidus_proto::node::{
    TemplateBuildState, TemplateBuildStatusResponse, TemplateConfig, TemplateCreateRequest,
    TemplateStatusRequest, template_config,
};
use uuid::Uuid;

use crate::store::BuildStatus;
use crate::tags::DEFAULT_TAG;
use crate::{Api, ApiError};

/// Between two looks at a build.
const LOOK: Duration = Duration::from_millis(250);
/// A node that cannot be asked for this long has lost the build.
const LOST: Duration = Duration::from_secs(60);

/// What a template is to be made of.
#[derive(Debug, Clone)]
pub struct TemplateSpec {
    /// Image, such as `debian:bookworm`.
    pub from_image: String,
    /// Virtual processors.
    pub cpu_count: i32,
    /// MiB.
    pub memory_mb: i32,
    /// Whether every team may use it.
    pub public: bool,
}

impl Api {
    /// The newest ready build of this name that the node still has. To be called before anything is
    /// built: what was being built when an earlier daemon ended is recorded as failed, and what
    /// was being paused as what it became.
    ///
    /// # Errors
    /// When the store or the node cannot be asked.
    pub async fn ready_build(&self, name: &str) -> Result<Option<String>, ApiError> {
        self.store.fail_interrupted_builds().await?;
        self.recover_pauses().await?;
        let Some(t) = self.store.template(name).await? else { return Ok(None) };
        for b in self.store.builds(&t.id).await?.iter().filter(|b| b.status == BuildStatus::Ready) {
            if self.node_has(&t.id, &b.id).await? {
                return Ok(Some(b.id.clone()));
            }
            let reason = "the node has it no more";
            self.store.set_build(&b.id, BuildStatus::Error, Some(reason)).await?;
        }
        Ok(None)
    }

    /// The build that this stands for now: the newest ready one of a template's name or id, or a build's
    /// own id.
    ///
    /// # Errors
    /// When the store cannot be asked.
    pub async fn build_of(&self, name: &str) -> Result<Option<String>, ApiError> {
        match self.named(name).await? {
            Some((_, build)) => Ok(build.map(|b| b.id)),
            None => Ok(Uuid::try_parse(name).is_ok().then(|| name.to_owned())),
        }
    }

    /// Waits until a template has a new build, since the last call of this.
    pub async fn built(&self) {
        self.built.notified().await;
    }

    /// Builds a template, waits for its end and returns the build's id.
    ///
    /// # Errors
    /// When it cannot be built; the message says why.
    pub async fn build_template(
        self: &Arc<Self>,
        name: &str,
        spec: TemplateSpec,
    ) -> Result<String, ApiError> {
        let team = self.store.default_team().await?;
        let t = self.store.put_template(&team, name, spec.public).await?;
        let build = Uuid::new_v4().to_string();
        self.store.add_build(&build, &t.id, spec.cpu_count, spec.memory_mb).await?;
        let config = TemplateConfig {
            template_id: t.id,
            build_id: build.clone(),
            memory_mb: spec.memory_mb,
            v_cpu_count: spec.cpu_count,
            source: Some(template_config::Source::FromImage(spec.from_image)),
            team_id: team,
            ..TemplateConfig::default()
        };
        self.submit(config.clone()).await?;
        self.follow(&config).await?;
        Ok(build)
    }

    pub(crate) async fn node_has(&self, template: &str, build: &str) -> Result<bool, ApiError> {
        let request = TemplateStatusRequest {
            template_id: template.to_owned(),
            build_id: build.to_owned(),
            limit: Some(0),
            ..TemplateStatusRequest::default()
        };
        match self.nodes.templates().template_build_status(request).await {
            Ok(a) => Ok(a.into_inner().status == TemplateBuildState::Completed as i32),
            Err(s) if s.code() == tonic::Code::NotFound => Ok(false),
            Err(s) => Err(s.into()),
        }
    }

    /// Starts a build and follows it without a caller who waits.
    pub(crate) async fn start(self: &Arc<Self>, config: TemplateConfig) -> Result<(), ApiError> {
        self.submit(config.clone()).await?;
        let api = self.clone();
        tokio::spawn(async move {
            if let Err(e) = api.follow(&config).await {
                tracing::warn!(build = %config.build_id, "template build failed: {e}");
            }
        });
        Ok(())
    }

    async fn submit(&self, config: TemplateConfig) -> Result<(), ApiError> {
        let id = config.build_id.clone();
        let request = TemplateCreateRequest { template: Some(config), ..Default::default() };
        if let Err(s) = self.nodes.templates().template_create(request).await {
            self.store.set_build(&id, BuildStatus::Error, Some(s.message())).await?;
            return Err(s.into());
        }
        self.store.set_build(&id, BuildStatus::Building, None).await?;
        Ok(())
    }

    /// Waits for the end of a build and records it. The node logs and keeps each line of it.
    async fn follow(&self, config: &TemplateConfig) -> Result<(), ApiError> {
        let mut silent = Duration::ZERO;
        loop {
            let request = TemplateStatusRequest {
                template_id: config.template_id.clone(),
                build_id: config.build_id.clone(),
                limit: Some(0),
                ..TemplateStatusRequest::default()
            };
            match self.nodes.templates().template_build_status(request).await {
                Ok(answer) => {
                    silent = Duration::ZERO;
                    let answer = answer.into_inner();
                    if answer.status != TemplateBuildState::Building as i32 {
                        return self.record(config, answer).await;
                    }
                }
                Err(s) => {
                    silent += LOOK;
                    if s.code() == tonic::Code::NotFound || silent > LOST {
                        let reason = format!("the node lost the build: {}", s.message());
                        self.store.set_build(&config.build_id, BuildStatus::Error, Some(&reason)).await?;
                        return Err(s.into());
                    }
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn record(
        &self,
        config: &TemplateConfig,
        end: TemplateBuildStatusResponse,
    ) -> Result<(), ApiError> {
        let id = &config.build_id;
        if end.status == TemplateBuildState::Completed as i32 {
            let m = end.metadata.unwrap_or_default();
            let (envd, kernel, vmm) = (&m.envd_version_key, &m.kernel_version, &m.firecracker_version);
            self.store.finish_build(id, m.rootfs_size_key, envd, kernel, vmm).await?;
            let mut tags = self.store.wanted_tags(id).await?;
            if tags.is_empty() {
                tags.push(DEFAULT_TAG.to_owned());
            }
            self.store.put_tags(&config.template_id, id, &tags).await?;
            self.built.notify_one();
            return Ok(());
        }
        let said = end.reason.unwrap_or_default();
        self.store.set_failure(id, said.step.as_deref(), said.layer_build_id.as_deref()).await?;
        let reason =
            if said.message.is_empty() { "the node does not say why".to_owned() } else { said.message };
        self.store.set_build(id, BuildStatus::Error, Some(&reason)).await?;
        Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, reason))
    }
}
