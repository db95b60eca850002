//! `metadata.json` of a build: what is needed to resume it, and by what.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, Utc};
use nidus_storage::BuildId;
use nidus_vmm::DriverId;
use serde::{Deserialize, Serialize};

/// Contents of `metadata.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TemplateMetadata {
    /// Version of this document.
    pub version: u32,
    /// Template that the build belongs to.
    pub template_id: String,
    /// This build.
    pub build_id: BuildId,
    /// Version of the guest's kernel.
    pub kernel_version: String,
    /// The VMM that made the state snapshot, and the only one that may load it.
    pub vmm: DriverId,
    /// Virtual processors.
    pub vcpu: u32,
    /// Guest memory in MiB.
    pub memory_mb: u32,
    /// Size of the root disk in MiB.
    pub disk_mb: u32,
    /// The guest's memory consists of pages of 2 MiB.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub huge_pages: bool,
    /// It has a disk and no memory: sandboxes are booted from it, not resumed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub filesystem_only: bool,
    /// Version of the envd inside.
    pub envd_version: String,
    /// The build that was resumed and then paused as this one; none for a template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BuildId>,
    /// The template's build that the line of pauses began with; none for a template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BuildId>,
    /// What the envd inside knows already; none for a template that was booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestState>,
    /// What holds for the programs of sandboxes.
    #[serde(default, skip_serializing_if = "Context::is_empty")]
    pub context: Context,
    /// What runs in sandboxes from the beginning.
    #[serde(default, skip_serializing_if = "Start::is_empty")]
    pub start: Start,
    /// When the build was finished.
    pub created_at: DateTime<Utc>,
}

/// What the instructions of a build say of programs: those of its later steps and those of sandboxes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Context {
    /// User; the guest's default user when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Working directory; the user's home when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// Environment.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env_vars: BTreeMap<String, String>,
}

impl Context {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A program that runs in every sandbox of a template since it was built, and how it is known to be ready.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Start {
    /// Command of a shell; none when empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub command: String,
    /// Command that succeeds once it is ready; some time must do when empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub ready: String,
}

impl Start {
    /// Whether a program runs that can be asked something.
    pub fn can_be_rehearsed(&self) -> bool {
        !self.command.is_empty() && !self.ready.is_empty()
    }

    /// Whether nothing is started and nothing is waited for.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What the envd in a saved sandbox was told. Both are in the guest's memory, and so in the build.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuestState {
    /// The token that it asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// Environment of commands.
    pub env_vars: HashMap<String, String>,
}

/// A metadata document that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// Not JSON, or fields are missing.
    #[error("metadata.json of build {build} cannot be read: {source}")]
    Malformed {
        /// The build.
        build: BuildId,
        /// The cause.
        source: serde_json::Error,
    },
    /// Made by a newer Nidus.
    #[error("metadata.json of build {build} has version {found}; this nidus reads up to {known}")]
    TooNew {
        /// The build.
        build: BuildId,
        /// Its version.
        found: u32,
        /// Highest known.
        known: u32,
    },
    /// The snapshot was made by another VMM.
    #[error(
        "build {build} was made by {made_by} and cannot be resumed by {here}; build the template again on this host (nidus template build)"
    )]
    OtherVmm {
        /// The build.
        build: BuildId,
        /// The VMM that saved it.
        made_by: Box<DriverId>,
        /// The VMM of this node.
        here: Box<DriverId>,
    },
}

impl TemplateMetadata {
    /// Version written by this program.
    pub const VERSION: u32 = 1;

    /// Reads the document of `build`.
    pub fn parse(build: BuildId, text: &[u8]) -> Result<Self, MetadataError> {
        let m: Self =
            serde_json::from_slice(text).map_err(|source| MetadataError::Malformed { build, source })?;
        if m.version > Self::VERSION {
            return Err(MetadataError::TooNew { build, found: m.version, known: Self::VERSION });
        }
        Ok(m)
    }

    /// Refuses a snapshot that this node's VMM did not make.
    pub fn check_vmm(&self, here: &DriverId) -> Result<(), MetadataError> {
        if self.vmm == *here {
            return Ok(());
        }
        Err(MetadataError::OtherVmm {
            build: self.build_id,
            made_by: Box::new(self.vmm.clone()),
            here: Box::new(here.clone()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> TemplateMetadata {
        TemplateMetadata {
            version: 1,
            template_id: "t".into(),
            build_id: BuildId::random(),
            kernel_version: "6.1".into(),
            vmm: DriverId { driver: "qemu".into(), version: "10.0.2".into(), accel: "tcg".into() },
            vcpu: 1,
            memory_mb: 512,
            disk_mb: 1024,
            huge_pages: false,
            filesystem_only: false,
            envd_version: "0.1.0".into(),
            parent: None,
            base: None,
            guest: None,
            context: Context::default(),
            start: Start::default(),
            created_at: Utc::now(),
        }
    }

    #[test]
    fn a_document_survives_writing_and_reading() {
        let m = sample();
        let text = serde_json::to_vec(&m).unwrap();
        assert_eq!(TemplateMetadata::parse(m.build_id, &text).unwrap(), m);
        // As they were written before there were builds without memory.
        assert!(!String::from_utf8(text).unwrap().contains("filesystem_only"));
        let disk_only = TemplateMetadata { filesystem_only: true, ..m };
        let text = serde_json::to_vec(&disk_only).unwrap();
        assert_eq!(TemplateMetadata::parse(disk_only.build_id, &text).unwrap(), disk_only);
    }

    #[test]
    fn another_vmm_is_refused_with_both_names() {
        let m = sample();
        let here = DriverId { driver: "firecracker".into(), version: "1.16.1".into(), accel: "kvm".into() };
        let e = m.check_vmm(&here).unwrap_err().to_string();
        assert!(e.contains("qemu 10.0.2 (tcg)") && e.contains("firecracker 1.16.1"), "{e}");
        assert!(m.check_vmm(&m.vmm).is_ok());
    }

    #[test]
    fn a_newer_document_is_refused() {
        let m = TemplateMetadata { version: 99, ..sample() };
        let text = serde_json::to_vec(&m).unwrap();
        assert!(matches!(TemplateMetadata::parse(m.build_id, &text), Err(MetadataError::TooNew { .. })));
    }
}
