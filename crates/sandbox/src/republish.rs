//! A build under another id.

use chrono::Utc;
use nidus_block::header::Header;
use nidus_storage::{Artifact, BuildId, StorageError};
use nidus_template::{GuestState, MetadataError, TemplateMetadata};

use crate::Factory;

/// Why a build could not be published again.
#[derive(Debug, thiserror::Error)]
pub enum RepublishError {
    /// The first one cannot be used.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// Its headers.
    #[error("build {build} is damaged: {reason}")]
    Header {
        /// The build.
        build: BuildId,
        /// What is wrong with it.
        reason: String,
    },
    /// Storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl Factory {
    /// Publishes `build`, a template of the name `template`, which is what `from` is. It stores no block of its own: its
    /// headers name what `from` reads. What sandboxes are told of their own is left out.
    ///
    /// # Errors
    /// When `from` is not there or damaged, or there is a `build` already.
    pub async fn republish(
        &self,
        from: BuildId,
        build: BuildId,
        template: &str,
    ) -> Result<TemplateMetadata, RepublishError> {
        let (lineages, store) = (self.lineages(), self.store());
        let staged = store.stage(build).await?;
        let _no_removal = lineages.removals.read().await;
        let m = TemplateMetadata::parse(from, &store.read(from, Artifact::Metadata).await?)?;
        for (artifact, header) in
            [(Artifact::Rootfs, Artifact::RootfsHeader), (Artifact::Memfile, Artifact::MemfileHeader)]
        {
            if artifact == Artifact::Memfile && m.filesystem_only {
                continue;
            }
            let parsed = Header::parse(&store.read(from, header).await?);
            let child = parsed.and_then(|h| h.child(build, &[]));
            let child = child.map_err(|e| RepublishError::Header { build: from, reason: e.to_string() })?;
            staged.write(header, child.to_bytes()).await?;
            staged.write(artifact, Vec::new()).await?;
        }
        if !m.filesystem_only {
            staged.write(Artifact::Snapfile, store.read(from, Artifact::Snapfile).await?).await?;
        }
        let env_vars = m.context.env_vars.clone().into_iter().collect();
        let metadata = TemplateMetadata {
            template_id: template.to_owned(),
            build_id: build,
            parent: None,
            base: None,
            guest: Some(GuestState { access_token: None, env_vars }),
            created_at: Utc::now(),
            ..m
        };
        let text = serde_json::to_vec_pretty(&metadata)
            .map_err(|source| MetadataError::Malformed { build, source })?;
        staged.write(Artifact::Metadata, text).await?;
        staged.commit().await?;
        Ok(metadata)
    }
}
