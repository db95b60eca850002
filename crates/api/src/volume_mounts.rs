//! Volumes that sandboxes have mounted: by name for clients, by id for nodes.

use std::path::{Component, Path};

use nidus_proto::node::{SandboxConfig, SandboxVolumeMount};

use crate::auth::Team;
use crate::model::VolumeMount;
use crate::sandboxes::shown as plain;
use crate::{Api, ApiError};

/// Mounts of one sandbox, and bytes of where one is.
const MAX_MOUNTS: usize = 16;
const MAX_PATH: usize = 1024;

/// As clients have them.
pub fn shown(mounts: Vec<SandboxVolumeMount>) -> Vec<VolumeMount> {
    mounts.into_iter().map(|m| VolumeMount { name: m.name, path: m.path }).collect()
}

/// Directories that a guest needs as they are.
const TAKEN: &[&str] =
    &["/", "/dev", "/proc", "/sys", "/etc", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/run"];

/// Where a volume may be, in one spelling.
fn place(path: &str) -> Result<String, ApiError> {
    let bad = |why: &str| ApiError::bad(format!("Volume mount path '{}': {why}", plain(path)));
    if !path.starts_with('/') || path.len() > MAX_PATH {
        return Err(bad("a path is absolute and has at most 1024 bytes"));
    }
    if path.chars().any(char::is_control) {
        return Err(bad("it has a control character in it"));
    }
    if Path::new(path).components().any(|c| c == Component::ParentDir) || path.split('/').any(|n| n == ".") {
        return Err(bad("it has '.' or '..' in it"));
    }
    let names: Vec<&str> = path.split('/').filter(|n| !n.is_empty()).collect();
    let place = format!("/{}", names.join("/"));
    if TAKEN.contains(&place.as_str()) {
        return Err(bad("the system's own files are there"));
    }
    Ok(place)
}

/// Each in one spelling, none at or below another: the later one would hide the other, or be in the other's volume.
fn places(wanted: &[VolumeMount]) -> Result<Vec<String>, ApiError> {
    if wanted.len() > MAX_MOUNTS {
        return Err(ApiError::bad(format!("A sandbox has at most {MAX_MOUNTS} volumes mounted")));
    }
    let places: Vec<String> = wanted.iter().map(|m| place(&m.path)).collect::<Result<_, _>>()?;
    for (n, one) in places.iter().enumerate() {
        if let Some(other) =
            places[..n].iter().find(|o| Path::new(o).starts_with(one) || Path::new(one).starts_with(o))
        {
            return Err(ApiError::bad(format!(
                "Volume mount paths '{}' and '{}' overlap",
                plain(other),
                plain(one)
            )));
        }
    }
    Ok(places)
}

impl Api {
    /// What is asked for, with the ids of the team's volumes.
    pub(crate) async fn volume_mounts(
        &self,
        team: &Team,
        wanted: Vec<VolumeMount>,
    ) -> Result<Vec<SandboxVolumeMount>, ApiError> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let places = places(&wanted)?;
        let volumes = self.store.volumes(&team.id).await?;
        let found = wanted.into_iter().zip(places).map(|(m, path)| {
            let volume = volumes.iter().find(|v| v.name == m.name);
            let missing = || ApiError::bad(format!("Volume '{}' was not found", plain(&m.name)));
            let id = volume.ok_or_else(missing)?.id.clone();
            Ok(SandboxVolumeMount { id, path, r#type: "local".to_owned(), name: m.name })
        });
        found.collect()
    }

    /// Volumes that were deleted while a sandbox was paused: it comes back without them.
    pub(crate) async fn forget_deleted_volumes(&self, config: &mut SandboxConfig) -> Result<(), ApiError> {
        let mut there = Vec::new();
        for m in std::mem::take(&mut config.volume_mounts) {
            match self.store.volume(&m.id).await? {
                Some(v) if v.team_id == config.team_id => there.push(m),
                _ => tracing::info!(
                    sandbox = config.sandbox_id,
                    volume = m.name,
                    "its volume is not there any more"
                ),
            }
        }
        config.volume_mounts = there;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_apart_and_not_the_systems() {
        let all = |paths: &[&str]| {
            let wanted: Vec<VolumeMount> =
                paths.iter().map(|p| VolumeMount { name: "v".into(), path: (*p).into() }).collect();
            places(&wanted).map_err(|e| e.status.as_u16())
        };
        assert_eq!(all(&["/mnt//a/", "/mnt/ab"]), Ok(vec!["/mnt/a".to_owned(), "/mnt/ab".to_owned()]));
        for bad in
            ["", "mnt", "/", "//", "/usr/", "/a/../b", "/a/./b", "/a\nb", &format!("/{}", "x".repeat(1024))]
        {
            assert_eq!(all(&[bad]), Err(400), "{bad:?}");
        }
        assert_eq!(all(&["/a", "/a/b"]), Err(400));
        assert_eq!(all(&["/a/b", "/a"]), Err(400));
        assert_eq!(all(&["/a", "/a"]), Err(400));
        assert_eq!(all(&["/a"; 17]), Err(400));
    }
}
