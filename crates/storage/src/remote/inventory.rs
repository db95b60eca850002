//! What an object store has of each build, and whose it is.

use std::{collections::BTreeMap, time::SystemTime};

use bytes::Bytes;
use object_store::path::Path;
use uuid::Uuid;

use super::{RemoteError, RemoteStore, named};
use crate::BuildId;

/// The names of marks of ownership begin so and end with who it is.
const OWNER: &str = "owner.";

/// What an object store has of a published build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// How many bytes its objects have.
    pub bytes: u64,
    /// When the newest of them was written.
    pub newest: SystemTime,
    /// Who uploaded it; more than one if several did at once, none if it is not known.
    pub owners: Vec<Uuid>,
}

impl RemoteStore {
    /// The same store, whose uploads are marked as `owner`'s.
    pub fn owned_by(self, owner: Uuid) -> Self {
        Self { owner: Some(owner), ..self }
    }

    /// As whose its uploads are marked.
    pub fn owner(&self) -> Option<Uuid> {
        self.owner
    }

    /// All published builds. Lists every object of the store.
    pub async fn inventory(&self) -> Result<BTreeMap<BuildId, Held>, RemoteError> {
        // Before the manifests: a build that is published in between is found, without its objects.
        let objects = self.list_objects(Path::from("data")).await?;
        let mut builds = BTreeMap::new();
        for manifest in self.list_objects(Path::from("builds")).await? {
            let Some(build) = manifest.location.filename().and_then(named) else { continue };
            let held =
                Held { bytes: manifest.size, newest: manifest.last_modified.into(), owners: Vec::new() };
            builds.insert(build, held);
        }
        for object in objects {
            let build = object.location.parts().nth(1).and_then(|p| named(p.as_ref()));
            let Some(held) = build.and_then(|b| builds.get_mut(&b)) else { continue };
            held.bytes += object.size;
            held.newest = held.newest.max(object.last_modified.into());
            held.owners.extend(owner_of(&object.location));
        }
        Ok(builds)
    }

    /// Marks what is uploaded next as its owner's.
    pub(super) async fn put_owner(&self, build: BuildId) -> Result<(), RemoteError> {
        match self.owner {
            Some(owner) => self.put(&Path::from(format!("data/{build}/{OWNER}{owner}")), Bytes::new()).await,
            None => Ok(()),
        }
    }
}

/// Whose mark this is, if it is one.
pub(super) fn owner_of(path: &Path) -> Option<Uuid> {
    path.filename()?.strip_prefix(OWNER)?.parse().ok()
}
