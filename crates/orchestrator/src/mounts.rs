//! The volumes that a sandbox has mounted.

use std::sync::Arc;

use nidus_nfs::{Export, HandleKey, Server};
use nidus_proto::node::SandboxVolumeMount;
use nidus_volume::Volumes;
use tonic::Status;
use uuid::Uuid;

/// Mounts of one sandbox.
const MAX_MOUNTS: usize = 16;

/// A sandbox's exports, and which of them are mounted where.
pub(crate) struct Mounted {
    pub server: Arc<Server>,
    pub mounts: Vec<(String, String)>,
}

/// The node's volumes, for guests.
#[derive(Clone)]
pub struct Exports {
    volumes: Arc<Volumes>,
    key: HandleKey,
}

impl Exports {
    /// Of these volumes.
    ///
    /// # Errors
    /// When the key of their files' handles cannot be read or made.
    pub fn new(volumes: Arc<Volumes>) -> std::io::Result<Self> {
        let key = HandleKey::new(&volumes.handle_key()?);
        Ok(Self { volumes, key })
    }

    pub(crate) fn volumes(&self) -> &Arc<Volumes> {
        &self.volumes
    }

    /// What a sandbox asks for. Blocks for a look at each volume.
    ///
    /// # Errors
    /// When there is no such volume, or its files cannot be served.
    pub(crate) fn of(&self, wanted: &[SandboxVolumeMount]) -> Result<Mounted, Status> {
        if wanted.len() > MAX_MOUNTS {
            let text = format!("a sandbox has at most {MAX_MOUNTS} volumes mounted, not {}", wanted.len());
            return Err(Status::invalid_argument(text));
        }
        let (mut exports, mut mounts): (Vec<Export>, Vec<(String, String)>) = Default::default();
        for w in wanted {
            let unknown = || Status::failed_precondition(format!("volume '{}' is not on this node", w.name));
            let id: Uuid = w.id.parse().map_err(|_| unknown())?;
            let directory = self.volumes.directory(id).map_err(|_| unknown())?;
            let export = Export::new(id, &directory, &self.key, nidus_nfs::Limits::default())
                .map_err(|e| Status::failed_precondition(format!("volume '{}': {e}", w.name)))?;
            mounts.push((export.name().to_owned(), w.path.clone()));
            // One volume may be mounted at several places.
            if exports.iter().all(|e| e.name() != export.name()) {
                exports.push(export);
            }
        }
        Ok(Mounted { server: Server::new(exports), mounts })
    }
}
