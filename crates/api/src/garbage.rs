//! Builds that nothing refers to, for the operator: `GET /admin/garbage` lists them, `DELETE` deletes.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::{Query, State};
use http::{Method, StatusCode};
use nidus_proto::node::{CollectGarbageRequest, CollectGarbageResponse, Garbage};
use serde::{Deserialize, Serialize};

use crate::auth::Team;
use crate::{Api, ApiError, Store, StoreError};

/// What an object store's newer objects are left alone for, unless the operator says otherwise.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GarbageQuery {
    grace_seconds: Option<u64>,
}

/// What there is to collect, or was collected.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GarbageReport {
    /// Whether it was to be deleted.
    pub deleted: bool,
    /// Bytes on the node's disk, of what was or can be deleted.
    pub disk_bytes: u64,
    /// Bytes in the object store, likewise.
    pub bucket_bytes: u64,
    /// Readers before what they read.
    pub garbage: Vec<GarbageEntry>,
}

/// A build that nothing refers to, or what is left over of one.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GarbageEntry {
    /// Id of the build.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// Bytes on the node's disk.
    pub disk_bytes: u64,
    /// Bytes in the object store.
    pub bucket_bytes: u64,
    /// How long nobody has written to it, if that is known.
    pub age_seconds: Option<i64>,
    /// What it is.
    pub why: String,
    /// Why it was not deleted, if it was to be.
    pub error: Option<String>,
}

impl GarbageReport {
    /// What a node said.
    pub fn new(deleted: bool, answer: CollectGarbageResponse) -> Self {
        let entry = |g: Garbage| GarbageEntry {
            build_id: g.build_id,
            disk_bytes: g.disk_bytes,
            bucket_bytes: g.remote_bytes,
            age_seconds: g.age.map(|a| a.seconds),
            why: g.why,
            error: g.error,
        };
        let garbage: Vec<_> = answer.garbage.into_iter().map(entry).collect();
        let sum =
            |bytes: fn(&GarbageEntry) -> u64| garbage.iter().filter(|g| g.error.is_none()).map(bytes).sum();
        Self { deleted, disk_bytes: sum(|g| g.disk_bytes), bucket_bytes: sum(|g| g.bucket_bytes), garbage }
    }
}

impl Store {
    /// Asks a node for garbage: all that nothing in this store refers to.
    pub async fn garbage_request(
        &self,
        grace: Duration,
        delete: bool,
    ) -> Result<CollectGarbageRequest, StoreError> {
        // Before the store is asked: a build that is noted meanwhile is newer.
        let kept_at = SystemTime::now();
        let grace = prost_types::Duration::try_from(grace).unwrap_or_default();
        Ok(CollectGarbageRequest {
            kept_build_ids: self.kept_builds().await?,
            kept_at: Some(kept_at.into()),
            grace: Some(grace),
            delete,
        })
    }
}

pub async fn collect(
    State(api): State<Arc<Api>>,
    team: Team,
    method: Method,
    Query(query): Query<GarbageQuery>,
) -> Result<Json<GarbageReport>, ApiError> {
    // The host's owner is on the team that every machine has.
    if team.id != api.store.default_team().await? {
        return Err(ApiError::new(StatusCode::FORBIDDEN, "Garbage is for the first team to collect"));
    }
    let delete = method == Method::DELETE;
    let grace = query.grace_seconds.map_or(DEFAULT_GRACE, Duration::from_secs);
    let request = api.store.garbage_request(grace, delete).await?;
    let answer = api.nodes.garbage().collect_garbage(request).await?.into_inner();
    Ok(Json(GarbageReport::new(delete, answer)))
}
