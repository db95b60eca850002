//! Builds asked for, started and given their files, over REST.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use http::{HeaderMap, Request, StatusCode, Uri};
use nidus_proto::node::{
    AwsRegistry, FromImageRegistry, FromTemplateConfig, GcpRegistry, GeneralRegistry,
    InitLayerFileUploadRequest, PruneLayersRequest, TemplateConfig, TemplateStep, from_image_registry,
    template_config,
};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::auth::Team;
use crate::input::{Input, OptionalInput};
use crate::model::{NewTemplate, Registry, StartBuild, stamp};
use crate::store::{BuildStatus, TemplateRow};
use crate::tags::{DEFAULT_TAG, check_tag, split};
use crate::templates::check_name;
use crate::{Api, ApiError};

/// Sizes of a template that does not say and is built upon no other one.
const CPU_COUNT: i64 = 1;
const MEMORY_MB: i64 = 512;
/// What a root file system takes besides what is to be free on it.
const SYSTEM_MB: i32 = 1536;
/// Path of uploads, as the node has it.
const UPLOADS: &str = "/build-files/";

type Shared = State<Arc<Api>>;

fn check_sizes(new: &NewTemplate) -> Result<(), ApiError> {
    if let Some(cpu) = new.cpu_count.filter(|c| !(1..=32).contains(c)) {
        return Err(ApiError::bad(format!("cpuCount {cpu} is not between 1 and 32")));
    }
    if let Some(memory) = new.memory_mb.filter(|m| !(128..=65_536).contains(m) || m % 2 != 0) {
        return Err(ApiError::bad(format!("memoryMB {memory} is not an even number from 128 to 65536")));
    }
    if let Some(disk) = new.min_free_disk_mb.filter(|d| !(0..=1_000_000).contains(d)) {
        return Err(ApiError::bad(format!("minFreeDiskMb {disk} is not between 0 and 1000000")));
    }
    Ok(())
}

async fn request(
    api: &Api,
    team: &Team,
    new: NewTemplate,
) -> Result<(TemplateRow, String, Vec<String>), ApiError> {
    check_sizes(&new)?;
    let name = new.name.or(new.alias).ok_or_else(|| ApiError::bad("The template's name is missing"))?;
    let (plain, _) = split(&name);
    check_name(plain)?;
    let named = name.split_once(':').map(|(_, tag)| tag.to_owned());
    let tags = new.tags.unwrap_or_default().into_iter().chain(named);
    let mut tags: Vec<String> = tags.map(|t| check_tag(&t)).collect::<Result<_, _>>()?;
    tags.sort();
    tags.dedup();
    let t = api.store.put_template(&team.id, plain, false).await?;
    if t.team_id != team.id {
        return Err(ApiError::new(StatusCode::CONFLICT, format!("Template name '{plain}' is taken")));
    }
    if t.snapshot_of.is_some() {
        return Err(ApiError::new(StatusCode::CONFLICT, format!("'{plain}' is the name of a snapshot")));
    }
    let build = Uuid::new_v4().to_string();
    // 0: as it turns out when the build is started.
    let (cpu, memory) = (new.cpu_count.unwrap_or(0), new.memory_mb.unwrap_or(0));
    api.store.add_build(&build, &t.id, cpu, memory).await?;
    if let Some(free) = new.min_free_disk_mb {
        api.store.set_sizes(&build, cpu.into(), memory.into(), i64::from(free + SYSTEM_MB)).await?;
    }
    api.store.want_tags(&build, &tags).await?;
    if tags.is_empty() {
        tags.push(DEFAULT_TAG.to_owned());
    }
    Ok((t, build, tags))
}

pub async fn request_v3(
    State(api): Shared,
    team: Team,
    Input(new): Input<NewTemplate>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let (t, build, tags) = request(&api, &team, new).await?;
    let answer = json!({
        "templateID": t.id, "buildID": build, "public": t.public,
        "names": t.aliases, "aliases": t.aliases, "tags": tags,
    });
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

pub async fn request_v2(
    State(api): Shared,
    team: Team,
    Input(new): Input<NewTemplate>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let (t, build, _) = request(&api, &team, new).await?;
    let row = api.store.build(&build).await?;
    let row = row.ok_or_else(|| ApiError::not_found("The build is gone already"))?;
    let answer = json!({
        "templateID": t.id, "buildID": build, "cpuCount": row.cpu_count, "memoryMB": row.memory_mb,
        "diskSizeMB": row.disk_mb, "public": t.public, "aliases": t.aliases,
        "createdAt": stamp(t.created_at), "updatedAt": stamp(t.updated_at), "createdBy": null,
        "lastSpawnedAt": t.last_spawned_at.map(stamp), "spawnCount": t.spawn_count, "buildCount": 1,
        "envdVersion": row.envd_version,
    });
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

/// Builds of a Dockerfile that is sent need an image that is pushed to a registry of E2B's first.
pub async fn request_v1(_team: Team) -> ApiError {
    ApiError::new(
        StatusCode::NOT_IMPLEMENTED,
        "Builds of this kind push an image to E2B's own registry. Use the SDK's Template, a newer CLI \
         (e2b template create) or nidus template build -f Dockerfile",
    )
}

fn registry(r: Registry) -> FromImageRegistry {
    use from_image_registry::Type;
    FromImageRegistry {
        r#type: Some(match r {
            Registry::General { username, password } => Type::General(GeneralRegistry { username, password }),
            Registry::Aws { aws_access_key_id, aws_secret_access_key, aws_region } => {
                Type::Aws(AwsRegistry { aws_access_key_id, aws_secret_access_key, aws_region })
            }
            Registry::Gcp { service_account_json } => Type::Gcp(GcpRegistry { service_account_json }),
        }),
    }
}

pub async fn start_build(
    State(api): Shared,
    team: Team,
    Path((template, build)): Path<(String, String)>,
    OptionalInput(start): OptionalInput<StartBuild>,
) -> Result<StatusCode, ApiError> {
    let b = api.owned_build(&team, &template, &build).await?;
    if b.status != BuildStatus::Waiting {
        return Err(ApiError::new(StatusCode::CONFLICT, "The build was started already"));
    }
    let (mut cpu, mut memory) = (b.cpu_count, b.memory_mb);
    let or = |value: i64, default: i64| if value == 0 { default } else { value };
    let image = start.from_image.filter(|i| !i.is_empty());
    let source = match (image, start.from_template.filter(|t| !t.is_empty())) {
        (Some(_), Some(_)) => {
            return Err(ApiError::bad("A template is built from an image or a template, not both"));
        }
        (None, None) => return Err(ApiError::bad("fromImage or fromTemplate is missing")),
        (Some(image), None) => {
            (cpu, memory) = (or(cpu, CPU_COUNT), or(memory, MEMORY_MB));
            template_config::Source::FromImage(image)
        }
        (None, Some(name)) => {
            let (_, from) = api.usable(&team.id, &name).await?;
            (cpu, memory) = (or(cpu, from.cpu_count), or(memory, from.memory_mb));
            template_config::Source::FromTemplate(FromTemplateConfig { alias: name, build_id: from.id })
        }
    };
    api.store.set_sizes(&b.id, cpu, memory, b.disk_mb).await?;
    let steps = start.steps.unwrap_or_default().into_iter().map(|s| TemplateStep {
        r#type: s.r#type,
        args: s.args,
        force: s.force,
        files_hash: s.files_hash,
    });
    let number = |n: i64| i32::try_from(n).unwrap_or(i32::MAX);
    let config = TemplateConfig {
        template_id: b.template_id.clone(),
        build_id: b.id.clone(),
        memory_mb: number(memory),
        v_cpu_count: number(cpu),
        disk_size_mb: number(b.disk_mb),
        start_command: start.start_cmd.unwrap_or_default(),
        ready_command: start.ready_cmd.unwrap_or_default(),
        force: start.force,
        steps: steps.collect(),
        source: Some(source),
        from_image_registry: start.from_image_registry.map(registry),
        team_id: team.id,
        ..TemplateConfig::default()
    };
    api.start(config).await?;
    Ok(StatusCode::ACCEPTED)
}

/// Where this API is, as the client has it: uploads go there too.
fn own_url(headers: &HeaderMap, uri: &Uri) -> Result<String, ApiError> {
    let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    let host = header("x-forwarded-host").or(header("host")).or(uri.authority().map(|a| a.as_str()));
    let host = host.ok_or_else(|| ApiError::bad("The request names no host"))?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':' | b'[' | b']' | b'_');
    if host.is_empty() || !host.bytes().all(plain) {
        return Err(ApiError::bad("The request's host is none"));
    }
    let scheme = if header("x-forwarded-proto") == Some("https") { "https" } else { "http" };
    Ok(format!("{scheme}://{host}"))
}

/// Where the files of a step are to be sent, unless they are here.
pub async fn files(
    State(api): Shared,
    team: Team,
    Path((template, hash)): Path<(String, String)>,
    headers: HeaderMap,
    uri: Uri,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let t = api.owned(&team, &template).await?;
    let request = InitLayerFileUploadRequest { template_id: t.id, hash, cache_scope: Some(team.id.clone()) };
    let upload = api.nodes.templates().init_layer_file_upload(request).await?.into_inner();
    let ticket = upload.url.as_deref().and_then(|u| u.rsplit('/').next()).unwrap_or_default();
    let url = format!("{}{UPLOADS}{ticket}", own_url(&headers, &uri)?);
    Ok((StatusCode::CREATED, Json(json!({ "present": upload.present, "url": url }))))
}

/// Hands an upload to the node, which announced it: who knows its ticket may send it.
pub async fn upload(
    State(api): Shared,
    Path(ticket): Path<String>,
    request: Request<Body>,
) -> Result<http::Response<Body>, ApiError> {
    if ticket.is_empty() || !ticket.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(ApiError::new(StatusCode::FORBIDDEN, "This upload was not announced"));
    }
    let length = request.headers().get("content-length").cloned();
    let mut to = Request::put(format!("{}{UPLOADS}{ticket}", api.nodes.http()));
    if let Some(length) = length {
        to = to.header("content-length", length);
    }
    let to = to.body(request.into_body()).map_err(|e| ApiError::bad(e.to_string()))?;
    let answer = api.nodes.client().request(to).await.map_err(|e| {
        tracing::warn!("an upload did not reach the node: {e}");
        ApiError::new(StatusCode::BAD_GATEWAY, "the upload did not reach the node; try again")
    })?;
    if answer.status().is_success() {
        return Ok(http::Response::new(Body::empty()));
    }
    let status = answer.status();
    let text = axum::body::to_bytes(Body::new(answer.into_body()), 4096).await.unwrap_or_default();
    Err(ApiError::new(status, String::from_utf8_lossy(&text)))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Prune {
    max_bytes: u64,
}

/// Makes room among the layers of builds.
pub async fn prune(State(api): Shared, team: Team, Input(p): Input<Prune>) -> Result<Json<Value>, ApiError> {
    if team.id != api.store.default_team().await? {
        return Err(ApiError::new(StatusCode::FORBIDDEN, "Layers are for the first team to prune"));
    }
    let pruned = api.nodes.garbage().prune_layers(PruneLayersRequest { max_bytes: p.max_bytes }).await?;
    let p = pruned.into_inner();
    Ok(Json(json!({
        "removedLayers": p.removed_layers, "removedBytes": p.removed_bytes,
        "leftLayers": p.left_layers, "leftBytes": p.left_bytes,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uploads_go_where_the_client_found_the_api() {
        let headers = |pairs: &[(&'static str, &'static str)]| {
            pairs
                .iter()
                .map(|(n, v)| (http::HeaderName::from_static(n), http::HeaderValue::from_static(v)))
                .collect()
        };
        let uri = Uri::from_static("/x");
        let of = |pairs: &[_]| own_url(&headers(pairs), &uri).ok();
        assert_eq!(of(&[("host", "localhost:3000")]).as_deref(), Some("http://localhost:3000"));
        let proxied = [("host", "a"), ("x-forwarded-proto", "https"), ("x-forwarded-host", "api.x.io")];
        assert_eq!(of(&proxied).as_deref(), Some("https://api.x.io"));
        assert_eq!(of(&[("host", "a/b?c")]), None);
        assert_eq!(of(&[]), None);
        let h2 = Uri::from_static("http://localhost:3000/x");
        assert_eq!(own_url(&HeaderMap::new(), &h2).unwrap(), "http://localhost:3000");
    }
}
