//! What the admin token is for: nodes, and the sandboxes and builds of any team.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use http::StatusCode;
use nidus_proto::node::{
    ServiceInfoResponse, ServiceInfoStatus, ServiceStatusChangeRequest, TemplateBuildDeleteRequest,
};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::auth::Admin;
use crate::input::Input;
use crate::model::stamp;
use crate::sandboxes::time;
use crate::store::{BuildStatus, TeamRow};
use crate::{Api, ApiError, list, pause};

type Shared = State<Arc<Api>>;

/// The one cluster that an installation is.
const CLUSTER: Uuid = Uuid::nil();

fn status_name(status: i32) -> &'static str {
    match ServiceInfoStatus::try_from(status) {
        Ok(ServiceInfoStatus::Healthy) => "ready",
        Ok(ServiceInfoStatus::Draining) => "draining",
        Ok(ServiceInfoStatus::Standby) => "standby",
        _ => "unhealthy",
    }
}

fn node_json(n: &ServiceInfoResponse, started: crate::nodes::Created) -> Value {
    let m = n.machine_info.clone().unwrap_or_default();
    let disks: Vec<Value> = n
        .metric_disks
        .iter()
        .map(|d| {
            json!({
                "mountPoint": d.mount_point, "device": d.device, "filesystemType": d.filesystem_type,
                "usedBytes": d.used_bytes, "totalBytes": d.total_bytes,
            })
        })
        .collect();
    json!({
        "id": n.node_id, "serviceInstanceID": n.service_id, "clusterID": CLUSTER,
        "version": n.service_version, "commit": n.service_commit,
        "status": status_name(n.service_status), "statusChangedAt": stamp(time(n.service_status_changed_at)),
        "sandboxCount": n.metric_sandboxes_running,
        "createSuccesses": started.done, "createFails": started.failed, "sandboxStartingCount": started.under_way,
        "machineInfo": {
            "cpuFamily": m.cpu_family, "cpuModel": m.cpu_model, "cpuModelName": m.cpu_model_name,
            "cpuArchitecture": m.cpu_architecture,
        },
        "metrics": {
            "allocatedCPU": n.metric_cpu_allocated, "cpuPercent": n.metric_cpu_percent,
            "cpuCount": n.metric_cpu_count, "allocatedMemoryBytes": n.metric_memory_allocated_bytes,
            "memoryUsedBytes": n.metric_memory_used_bytes, "memoryTotalBytes": n.metric_memory_total_bytes,
            "hugePagesTotal": n.metric_hugepages_total, "hugePagesUsed": n.metric_hugepages_used,
            "hugePagesReserved": n.metric_hugepages_reserved,
            "hugePageSizeBytes": n.metric_hugepage_size_bytes, "disks": disks,
        },
    })
}

impl Api {
    /// A team by its id.
    pub(crate) async fn known_team(&self, id: &str) -> Result<TeamRow, ApiError> {
        let team = self.store.team_of_id(id).await?;
        team.ok_or_else(|| ApiError::not_found("There is no such team"))
    }

    async fn node(&self, id: &str) -> Result<ServiceInfoResponse, ApiError> {
        let node = self.nodes.info().await?;
        if node.node_id != id {
            return Err(ApiError::not_found("There is no such node"));
        }
        Ok(node)
    }
}

pub async fn nodes(State(api): Shared, _: Admin) -> Result<Json<Vec<Value>>, ApiError> {
    let node = api.nodes.info().await?;
    Ok(Json(vec![node_json(&node, api.nodes.created())]))
}

pub async fn node(State(api): Shared, _: Admin, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(node_json(&api.node(&id).await?, api.nodes.created())))
}

/// Body of `POST /nodes/{id}`.
#[derive(Debug, Deserialize)]
pub struct StatusChange {
    status: String,
}

/// Drains a node, or has it take sandboxes again.
pub async fn set_status(
    State(api): Shared,
    _: Admin,
    Path(id): Path<String>,
    Input(change): Input<StatusChange>,
) -> Result<StatusCode, ApiError> {
    let status = match change.status.as_str() {
        "ready" => ServiceInfoStatus::Healthy,
        "draining" => ServiceInfoStatus::Draining,
        "standby" => ServiceInfoStatus::Standby,
        "unhealthy" => ServiceInfoStatus::Unhealthy,
        other => {
            return Err(ApiError::bad(format!(
                "status '{}' is not ready, draining, standby or unhealthy",
                other.escape_debug()
            )));
        }
    };
    api.node(&id).await?;
    api.nodes.set_status(ServiceStatusChangeRequest { service_status: status as i32 }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// How many sandboxes each team runs.
pub async fn running_counts(State(api): Shared, _: Admin) -> Result<Json<BTreeMap<String, u64>>, ApiError> {
    let mut counts = BTreeMap::new();
    for s in api.nodes.list().await? {
        *counts.entry(s.config.unwrap_or_default().team_id).or_default() += 1;
    }
    Ok(Json(counts))
}

/// Kills all sandboxes that a team runs; what is paused stays.
pub async fn kill_all(
    State(api): Shared,
    _: Admin,
    Path(team): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let team = api.known_team(&team).await?;
    pause::to_its_end(async move {
        let (mut killed, mut failed) = (0, 0);
        for s in api.running_of(&team.id).await? {
            match api.end(list::id(&s), "killed by the administrator").await {
                Ok(true) => killed += 1,
                Ok(false) => {}
                Err(e) => {
                    tracing::warn!(sandbox = list::id(&s), "an administrator's kill failed: {e}");
                    failed += 1;
                }
            }
        }
        api.sweep().await;
        Ok(Json(json!({ "killedCount": killed, "failedCount": failed })))
    })
    .await
}

/// Cancels the builds that a team has under way.
pub async fn cancel_builds(
    State(api): Shared,
    _: Admin,
    Path(team): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let team = api.known_team(&team).await?;
    let (mut cancelled, mut failed) = (0, 0);
    for t in api.store.templates(&team.id).await?.iter().filter(|t| t.team_id == team.id) {
        for b in api.store.builds(&t.id).await?.iter().filter(|b| b.status == BuildStatus::Building) {
            let request = TemplateBuildDeleteRequest { build_id: b.id.clone(), template_id: t.id.clone() };
            match api.nodes.templates().template_build_delete(request).await {
                // A build that was ended has left nothing that could be deleted.
                Ok(_) => cancelled += 1,
                Err(e) if e.code() == tonic::Code::NotFound => cancelled += 1,
                Err(e) => {
                    tracing::warn!(build = b.id, "an administrator's cancel failed: {e}");
                    failed += 1;
                }
            }
        }
    }
    Ok(Json(json!({ "cancelledCount": cancelled, "failedCount": failed })))
}
