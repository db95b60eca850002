//! Sandboxes over REST. All that is known of running ones comes from the node.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, TimeDelta, Utc};
use http::{HeaderMap, StatusCode};
use nidus_proto::node::{
    RunningSandbox, SandboxConfig, SandboxCreateRequest, SandboxUpdateRequest, TemplateStatusRequest,
};
use prost_types::Timestamp;
use serde_json::Value;
use uuid::Uuid;

use crate::auth::Team;
use crate::input::{Input, OptionalInput};
use crate::list::{self, Known, Query};
use crate::model::{
    Lifecycle, ListedSandbox, NewSandbox, RefreshRequest, Sandbox, SandboxDetail, TimeoutRequest,
};
use crate::pause;
use crate::store::{BuildRow, TemplateRow};
use crate::{Api, ApiError, auto_resume, network, repeats, volume_mounts};

/// Time of a sandbox made by the old call when it does not say (contract).
const OLD_DEFAULT: Duration = Duration::from_secs(15);
/// Bounds of what is kept for a sandbox.
const MAX_ENTRIES: usize = 256;
const MAX_TEXT: usize = 32 << 10;

/// Lower-case letters and digits, as ids in host names need.
pub fn random_id(len: usize) -> Result<String, String> {
    const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz012345";
    let mut bytes = vec![0u8; len];
    getrandom::fill(&mut bytes).map_err(|e| e.to_string())?;
    Ok(bytes.iter().map(|b| LETTERS[usize::from(b & 31)] as char).collect())
}

pub fn new_sandbox_id() -> Result<String, ApiError> {
    Ok(format!("i{}", random_id(20).map_err(ApiError::bad)?))
}

pub fn secret() -> Result<String, ApiError> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes)
        .map_err(|e| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("no random bytes: {e}")))?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

pub fn timestamp(t: DateTime<Utc>) -> Timestamp {
    Timestamp { seconds: t.timestamp(), nanos: t.timestamp_subsec_nanos().cast_signed() }
}

pub fn time(t: Option<Timestamp>) -> DateTime<Utc> {
    let t = t.unwrap_or_default();
    DateTime::from_timestamp(t.seconds, t.nanos.max(0).cast_unsigned()).unwrap_or_default()
}

pub fn not_found(id: &str) -> ApiError {
    ApiError::not_found(format!("Sandbox \"{}\" was not found", shown(id)))
}

/// What a client wrote, short and without control characters.
pub fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(100).collect()
}

fn listed(known: &Known) -> ListedSandbox {
    let s = &known.sandbox;
    let c = s.config.clone().unwrap_or_default();
    ListedSandbox {
        template_id: c.template_id,
        alias: c.alias.filter(|a| !a.is_empty()),
        sandbox_id: c.sandbox_id,
        client_id: s.client_id.clone(),
        started_at: time(s.start_time),
        end_at: time(s.end_time),
        cpu_count: c.vcpu,
        memory_mb: c.ram_mb,
        disk_size_mb: c.total_disk_size_mb,
        metadata: c.metadata,
        state: if known.paused { "paused" } else { "running" },
        envd_version: c.envd_version,
        volume_mounts: volume_mounts::shown(c.volume_mounts),
    }
}

impl Api {
    /// A running sandbox of this team. Another team's is as unknown as none.
    pub(crate) async fn running(&self, team: &Team, id: &str) -> Result<Option<RunningSandbox>, ApiError> {
        Ok(self.running_of(&team.id).await?.into_iter().find(|s| list::id(s) == id))
    }

    /// All sandboxes that a team runs.
    pub(crate) async fn running_of(&self, team: &str) -> Result<Vec<RunningSandbox>, ApiError> {
        let mut all = self.nodes.list().await?;
        all.retain(|s| s.config.as_ref().is_some_and(|c| c.team_id == team));
        Ok(all)
    }

    async fn find(&self, team: &Team, id: &str) -> Result<RunningSandbox, ApiError> {
        self.running(team, id).await?.ok_or_else(|| not_found(id))
    }

    pub(crate) fn answer(&self, s: &RunningSandbox) -> Sandbox {
        let c = s.config.clone().unwrap_or_default();
        let ingress = c.network.and_then(|n| n.ingress);
        Sandbox {
            template_id: c.template_id,
            sandbox_id: c.sandbox_id,
            alias: c.alias.filter(|a| !a.is_empty()),
            client_id: s.client_id.clone(),
            envd_version: c.envd_version,
            envd_access_token: c.envd_access_token,
            traffic_access_token: ingress.and_then(|i| i.traffic_access_token),
            domain: self.config.domain.clone(),
        }
    }

    pub(crate) fn timeout(&self, seconds: i64) -> Result<TimeDelta, ApiError> {
        let max = i64::try_from(self.config.max_timeout.as_secs()).unwrap_or(i64::MAX);
        if seconds < 0 {
            return Err(ApiError::bad(format!("The timeout of {seconds} s is negative")));
        }
        if seconds > max {
            return Err(ApiError::bad(format!(
                "The timeout of {seconds} s is longer than the longest, {max} s"
            )));
        }
        Ok(TimeDelta::seconds(seconds))
    }

    /// The newest usable build of a template that this team may use, by id or name.
    pub(crate) async fn usable(&self, team: &str, name: &str) -> Result<(TemplateRow, BuildRow), ApiError> {
        let missing = || ApiError::not_found(format!("Template '{}' was not found", shown(name)));
        if let Some(found) = self.failed_build(team, name).await? {
            return Ok(found);
        }
        let found = self.named(name).await?.filter(|(t, _)| t.public || t.team_id == team);
        match found.ok_or_else(missing)? {
            (template, Some(build)) => Ok((template, build)),
            (_, None) => Err(ApiError::not_found(format!(
                "Template '{}' has no build that can be used yet",
                shown(name)
            ))),
        }
    }

    /// The state before the step that a build failed in, by the id of that build.
    async fn failed_build(&self, team: &str, id: &str) -> Result<Option<(TemplateRow, BuildRow)>, ApiError> {
        if Uuid::try_parse(id).is_err() {
            return Ok(None);
        }
        let Some(build) = self.store.build(id).await? else { return Ok(None) };
        let Some(layer) = build.failed_layer.clone() else { return Ok(None) };
        let template = self.store.template(&build.template_id).await?.filter(|t| t.team_id == team);
        let Some(template) = template else { return Ok(None) };
        // Nobody noted what it is; the node knows.
        let request = TemplateStatusRequest { build_id: layer.clone(), ..Default::default() };
        let known = self.nodes.templates().template_build_status(request).await?.into_inner();
        let m = known.metadata.unwrap_or_default();
        let build = BuildRow {
            id: layer,
            envd_version: m.envd_version_key,
            kernel_version: m.kernel_version,
            vmm_version: m.firecracker_version,
            disk_mb: i64::from(m.rootfs_size_key),
            ..build
        };
        Ok(Some((template, build)))
    }

    async fn create(&self, team: Team, new: NewSandbox, default: Duration) -> Result<Sandbox, ApiError> {
        refuse_unsupported(&new)?;
        check_auto_pause(&new)?;
        let default = i64::try_from(default.as_secs()).unwrap_or(0);
        let seconds = new.timeout.unwrap_or(default);
        let length = self.timeout(seconds)?;
        if seconds == 0 {
            return Err(ApiError::bad("The timeout of a new sandbox is at least 1 s"));
        }
        for (what, map) in [("metadata", &new.metadata), ("envVars", &new.env_vars)] {
            let map = map.iter().flatten();
            let (count, size) = map.fold((0, 0), |(n, l), (k, v)| (n + 1, l + k.len() + v.len()));
            if count > MAX_ENTRIES || size > MAX_TEXT {
                return Err(ApiError::bad(format!(
                    "{what} has more than {MAX_ENTRIES} entries or {MAX_TEXT} bytes"
                )));
            }
        }
        let (template, build) = self.usable(&team.id, &new.template_id).await?;
        self.nodes.check_runs(&build.vmm_version).await?;
        let network = network::of_new(new.network)?;
        let volume_mounts = self.volume_mounts(&team, new.volume_mounts.unwrap_or_default()).await?;
        let config = SandboxConfig {
            template_id: template.id.clone(),
            build_id: build.id.clone(),
            kernel_version: build.kernel_version,
            firecracker_version: build.vmm_version,
            sandbox_id: new_sandbox_id()?,
            env_vars: new.env_vars.unwrap_or_default(),
            metadata: new.metadata.unwrap_or_default(),
            alias: template.aliases.first().cloned(),
            envd_version: build.envd_version,
            vcpu: build.cpu_count,
            ram_mb: build.memory_mb,
            team_id: team.id,
            max_sandbox_length: i64::try_from(self.config.max_timeout.as_secs() / 3600).unwrap_or(24),
            total_disk_size_mb: build.disk_mb,
            base_template_id: template.id.clone(),
            envd_access_token: if new.secure == Some(false) { None } else { Some(secret()?) },
            execution_id: Uuid::new_v4().to_string(),
            allow_internet_access: new.allow_internet_access,
            auto_pause: new.auto_pause == Some(true),
            auto_pause_filesystem_only: new.auto_pause_memory == Some(false),
            auto_resume: new.auto_resume.filter(|r| r.enabled).map(|_| auto_resume::policy(seconds)),
            network,
            volume_mounts,
            ..SandboxConfig::default()
        };
        let made = self.start_sandbox(config, length, false).await?;
        if let Err(e) = self.store.count_spawn(&template.id).await {
            // The sandbox runs; a statistic is no reason to fail it.
            tracing::warn!("{e}");
        }
        Ok(made)
    }

    /// Has the node create or resume what `config` says, for this long from now. With `reboot`, from its
    /// disk alone.
    pub(crate) async fn start_sandbox(
        &self,
        mut config: SandboxConfig,
        length: TimeDelta,
        reboot: bool,
    ) -> Result<Sandbox, ApiError> {
        let _place = self.place(&config.team_id, &config.sandbox_id).await?;
        self.forget_deleted_volumes(&mut config).await?;
        let mut filled = config.clone();
        if let Some(egress) = filled.network.as_mut().and_then(|n| n.egress.as_mut()) {
            self.fill_secrets(&config.team_id, egress).await?;
        }
        let now = Utc::now();
        let request = SandboxCreateRequest {
            sandbox: Some(filled),
            start_time: Some(timestamp(now)),
            end_time: Some(timestamp(now + length)),
            filesystem_boot: reboot.then_some(true),
        };
        let made = self.nodes.create(request).await?;
        let running =
            RunningSandbox { config: Some(config), client_id: made.client_id, ..Default::default() };
        Ok(self.answer(&running))
    }

    async fn set_end(&self, id: &str, end: DateTime<Utc>) -> Result<(), ApiError> {
        let request =
            SandboxUpdateRequest { sandbox_id: id.to_owned(), end_time: Some(timestamp(end)), egress: None };
        match self.nodes.sandboxes().update(request).await {
            Ok(_) => Ok(()),
            Err(s) if s.code() == tonic::Code::NotFound => Err(not_found(id)),
            Err(s) => Err(s.into()),
        }
    }
}

/// Better refused than silently left out. (`mcp` is for the SDK: it starts the gateway that the template brings.)
fn refuse_unsupported(new: &NewSandbox) -> Result<(), ApiError> {
    let asked = |v: &Option<Value>| {
        v.as_ref().is_some_and(|v| !v.is_null() && v.as_object().is_none_or(|o| !o.is_empty()))
    };
    if asked(&new.iam) { Err(ApiError::not_yet("iam")) } else { Ok(()) }
}

/// A pause without memory is one at the end of the time, and traffic does not end it.
fn check_auto_pause(new: &NewSandbox) -> Result<(), ApiError> {
    if new.auto_pause_memory != Some(false) {
        return Ok(());
    }
    if new.auto_pause != Some(true) {
        return Err(ApiError::bad("autoPauseMemory: false needs autoPause: true"));
    }
    if new.auto_resume.as_ref().is_some_and(|r| r.enabled) {
        return Err(ApiError::bad(
            "autoPauseMemory: false and autoResume exclude each other: without memory a sandbox is resumed by a connect only",
        ));
    }
    Ok(())
}

type Shared = State<Arc<Api>>;

/// A creation as either version of the call has it.
async fn create(
    api: Arc<Api>,
    team: Team,
    headers: &HeaderMap,
    asked: Value,
    prepare: impl FnOnce(&mut NewSandbox),
    default: Duration,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let key = repeats::key(headers)?;
    let mut new: NewSandbox = serde_json::from_value(asked.clone())
        .map_err(|e| ApiError::bad(format!("The request's body cannot be read: {e}")))?;
    prepare(&mut new);
    let make = move |api: Arc<Api>, team: Team| async move {
        let made = api.create(team, new, default).await?;
        serde_json::to_value(made)
            .map_err(|e| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))
    };
    let made = match key {
        None => make(api, team).await?,
        // To its end: a client that has gone comes back for it.
        Some(key) => {
            pause::to_its_end(async move {
                let making = make(api.clone(), team.clone());
                api.repeats.once(&team.id, key, &asked, making).await
            })
            .await?
        }
    };
    Ok((StatusCode::CREATED, Json(made)))
}

pub async fn create_v1(
    State(api): Shared,
    team: Team,
    headers: HeaderMap,
    Input(asked): Input<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    create(api, team, &headers, asked, |_| {}, OLD_DEFAULT).await
}

pub async fn create_v2(
    State(api): Shared,
    team: Team,
    headers: HeaderMap,
    Input(asked): Input<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let default = api.config.default_timeout;
    create(api, team, &headers, asked, |new| new.secure = Some(true), default).await
}

pub async fn list_v1(
    State(api): Shared,
    team: Team,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<ListedSandbox>>, ApiError> {
    let query = query.unwrap_or_default();
    let wanted = form_urlencoded::parse(query.as_bytes())
        .find(|(name, _)| name == "metadata")
        .map(|(_, value)| list::metadata(&value))
        .unwrap_or_default();
    let running = api.running_of(&team.id).await?.into_iter().map(|sandbox| Known { sandbox, paused: false });
    let mut all: Vec<ListedSandbox> = running.map(|k| listed(&k)).collect();
    all.retain(|s| wanted.iter().all(|(k, v)| s.metadata.get(k) == Some(v)));
    all.sort_by(|a, b| b.started_at.cmp(&a.started_at).then_with(|| a.sandbox_id.cmp(&b.sandbox_id)));
    Ok(Json(all))
}

pub async fn list_v2(
    State(api): Shared,
    team: Team,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let query = Query::parse(query.as_deref().unwrap_or_default())?;
    let running = api.running_of(&team.id).await?;
    let paused = if query.paused { pause::paused_of_team(&api, &team, &running).await? } else { Vec::new() };
    let running = running.into_iter().map(|sandbox| Known { sandbox, paused: false });
    let all = running.chain(paused.into_iter().map(|sandbox| Known { sandbox, paused: true }));
    let (page, next) = query.page(all.collect());
    let mut response = Json(page.iter().map(listed).collect::<Vec<_>>()).into_response();
    if let Some(value) = next.and_then(|t| t.parse().ok()) {
        response.headers_mut().insert("x-next-token", value);
    }
    Ok(response)
}

pub async fn detail(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
) -> Result<Json<SandboxDetail>, ApiError> {
    let known = match api.running(&team, &id).await? {
        Some(sandbox) => Known { sandbox, paused: false },
        None => {
            let all = api.store.snapshots_of(&team.id, &id).await?;
            let newest = all.first().ok_or_else(|| not_found(&id))?;
            Known { sandbox: pause::as_listed(newest), paused: true }
        }
    };
    let c = known.sandbox.config.clone().unwrap_or_default();
    let lifecycle = Lifecycle {
        auto_resume: auto_resume::is_on(&c),
        on_timeout: if c.auto_pause { "pause" } else { "kill" },
    };
    Ok(Json(SandboxDetail {
        listed: listed(&known),
        network: network::of_config(&c),
        envd_access_token: c.envd_access_token,
        allow_internet_access: c.allow_internet_access,
        domain: api.config.domain.clone(),
        lifecycle,
    }))
}

pub async fn set_timeout(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    Input(request): Input<TimeoutRequest>,
) -> Result<StatusCode, ApiError> {
    let length = api.timeout(request.timeout)?;
    api.find(&team, &id).await?;
    api.set_end(&id, Utc::now() + length).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Makes the time longer, never shorter.
pub async fn extend(api: &Api, s: &RunningSandbox, length: TimeDelta) -> Result<(), ApiError> {
    let end = Utc::now() + length;
    if end > time(s.end_time) {
        api.set_end(list::id(s), end).await?;
    }
    Ok(())
}

pub async fn refresh(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    OptionalInput(request): OptionalInput<RefreshRequest>,
) -> Result<StatusCode, ApiError> {
    let seconds = request.duration.unwrap_or(OLD_DEFAULT.as_secs().cast_signed());
    let length = api.timeout(seconds)?;
    let s = api.find(&team, &id).await?;
    extend(&api, &s, length).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_for_host_names() {
        let (a, b) = (random_id(20).unwrap(), random_id(20).unwrap());
        assert_ne!(a, b);
        assert!(a.len() == 20 && a.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let new = |text: &str| serde_json::from_str::<NewSandbox>(text).unwrap();
        let plain =
            r#"{"templateID":"base","autoPause":false,"mcp":null,"autoResume":{"enabled":false},"x":1}"#;
        assert!(refuse_unsupported(&new(plain)).is_ok());
        assert!(refuse_unsupported(&new(r#"{"templateID":"base","autoPause":true}"#)).is_ok());
        let e = refuse_unsupported(&new(r#"{"templateID":"base","iam":{"x":1}}"#)).unwrap_err();
        assert!(e.status == 501 && e.message.contains("iam"));
    }

    #[test]
    fn an_automatic_pause_without_memory_stands_alone() {
        let check = |rest: &str| {
            let text = format!(r#"{{"templateID":"base","autoPauseMemory":false{rest}}}"#);
            check_auto_pause(&serde_json::from_str(&text).unwrap())
        };
        assert!(check(r#","autoPause":true"#).is_ok());
        assert_eq!(check("").unwrap_err().status, 400);
        let e = check(r#","autoPause":true,"autoResume":{"enabled":true}"#).unwrap_err();
        assert!(e.status == 400 && e.message.contains("autoResume"));
    }
}
