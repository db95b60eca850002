//! The documents of an image: index, manifest, configuration.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::{Digest, OciError};

/// Media types that are asked for.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// Reference to content.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: String,
    pub size: u64,
    #[serde(default)]
    pub platform: Option<Platform>,
    /// Where it is besides; images that need that are refused.
    #[serde(default)]
    pub urls: Vec<String>,
}

impl Descriptor {
    pub fn digest(&self) -> Result<Digest, OciError> {
        let parsed = self.digest.parse();
        parsed.map_err(|e| OciError::malformed(format!("the digest '{}'", self.digest.escape_debug()), e))
    }
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
}

/// Manifest or index, told apart by what they have.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    #[serde(default)]
    pub schema_version: u32,
    #[serde(default)]
    pub manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    pub config: Option<Descriptor>,
    #[serde(default)]
    pub layers: Vec<Descriptor>,
}

/// What an image says of the programs that run in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    /// `NAME=VALUE`.
    #[serde(deserialize_with = "nullable")]
    pub env: Vec<String>,
    /// User or user:group.
    #[serde(deserialize_with = "nullable")]
    pub user: String,
    /// Working directory.
    #[serde(deserialize_with = "nullable")]
    pub working_dir: String,
}

impl ImageConfig {
    /// The environment by name; what has no `=` is left out.
    pub fn environment(&self) -> BTreeMap<String, String> {
        let pairs = self.env.iter().filter_map(|e| e.split_once('='));
        pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct ConfigDocument {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
    #[serde(default, deserialize_with = "nullable")]
    pub config: ImageConfig,
    pub rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RootFs {
    pub diff_ids: Vec<String>,
}

fn nullable<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(de: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(de)?.unwrap_or_default())
}
