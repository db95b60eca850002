//! Secrets: values that clients write and never read again. A header in `network.rules` names one
//! (`${e2b.secrets.NAME}`), and the node's gateway puts it in the place; the guest does not see it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use nidus_proto::node::SandboxNetworkEgressConfig;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::auth::Team;
use crate::input::Input;
use crate::model::stamp;
use crate::observe::Asked;
use crate::pause::conflict;
use crate::sandboxes::shown;
use crate::store::SecretRow;
use crate::{Api, ApiError, KeyError};

type Shared = State<Arc<Api>>;

const MAX_NAME: usize = 128;
/// A header's value is no longer (`network.rules`).
const MAX_VALUE: usize = 2048;
const MAX_METADATA: usize = 64;
const MAX_METADATA_BYTES: usize = 8 << 10;
const MAX_PAGE: i64 = 100;
/// Front of a placeholder; its end is `}`.
const PLACEHOLDER: &str = "${e2b.secrets.";

#[derive(Deserialize)]
pub struct NewSecret {
    name: String,
    value: String,
    metadata: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
pub struct SecretUpdate {
    value: String,
    metadata: Option<BTreeMap<String, String>>,
}

/// Names are compared in lower case, as E2B keeps them.
fn checked_name(name: &str) -> Result<String, ApiError> {
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(|c| c.is_control() || "{}/".contains(c)) {
        return Err(ApiError::bad(format!(
            "A secret's name has 1 to {MAX_NAME} bytes, and no '{{', '}}', '/' or control characters"
        )));
    }
    Ok(name.to_lowercase())
}

fn check_value(value: &str) -> Result<(), ApiError> {
    if value.is_empty() || value.len() > MAX_VALUE || http::HeaderValue::from_str(value).is_err() {
        return Err(ApiError::bad(format!(
            "A secret's value has 1 to {MAX_VALUE} bytes and can stand in an HTTP header: no line ends"
        )));
    }
    Ok(())
}

fn metadata_text(metadata: &BTreeMap<String, String>) -> Result<String, ApiError> {
    let size: usize = metadata.iter().map(|(k, v)| k.len() + v.len()).sum();
    if metadata.len() > MAX_METADATA || size > MAX_METADATA_BYTES {
        return Err(ApiError::bad(format!(
            "A secret's metadata has at most {MAX_METADATA} entries and {MAX_METADATA_BYTES} bytes"
        )));
    }
    Ok(json!(metadata).to_string())
}

fn secret_json(s: &SecretRow) -> Value {
    let metadata: Value = serde_json::from_str(&s.metadata).unwrap_or_else(|_| json!({}));
    json!({
        "secretID": s.id, "name": s.name, "currentVersion": s.version, "metadata": metadata,
        "createdAt": stamp(s.created_at), "updatedAt": stamp(s.updated_at),
    })
}

/// Who reads a sealed value: another team's, or another name's, does not open.
fn owner(team: &str, name: &str) -> String {
    format!("{team}/{name}")
}

impl From<KeyError> for ApiError {
    fn from(e: KeyError) -> Self {
        tracing::error!("a secret cannot be used: {e}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "the server's own key could not be used")
    }
}

/// The names in a header's value.
fn names(value: &str) -> impl Iterator<Item = &str> {
    value.split(PLACEHOLDER).skip(1).filter_map(|rest| rest.split_once('}').map(|(name, _)| name))
}

impl Api {
    async fn secret(&self, team: &Team, selector: &str) -> Result<SecretRow, ApiError> {
        // Ids and names are both kept in lower case.
        let found = self.store.secret(&team.id, &selector.to_lowercase()).await?;
        found.ok_or_else(|| ApiError::not_found(format!("Secret '{}' was not found", shown(selector))))
    }

    /// Gives the node the values of the secrets that a policy names. They go no further: the node keeps
    /// the policy's own text.
    pub(crate) async fn fill_secrets(
        &self,
        team: &str,
        egress: &mut SandboxNetworkEgressConfig,
    ) -> Result<(), ApiError> {
        egress.secrets.clear();
        let headers = egress.rules.values().flat_map(|r| &r.rules).filter_map(|r| r.transform.as_ref());
        let wanted: Vec<String> =
            headers.flat_map(|t| t.headers.values()).flat_map(|v| names(v)).map(str::to_owned).collect();
        let mut values = HashMap::new();
        for name in wanted {
            if values.contains_key(&name) {
                continue;
            }
            let kept = name.to_lowercase();
            let sealed = self.store.sealed(team, &kept).await?.ok_or_else(|| {
                ApiError::bad(format!(
                    "network.rules names the secret '{}', which does not exist",
                    shown(&name)
                ))
            })?;
            let value = self.config.master_key.open_sealed(&owner(team, &kept), &sealed)?;
            values.insert(name, String::from_utf8_lossy(&value).into_owned());
        }
        egress.secrets = values;
        Ok(())
    }
}

pub async fn create(
    State(api): Shared,
    team: Team,
    Input(new): Input<NewSecret>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let name = checked_name(&new.name)?;
    check_value(&new.value)?;
    let metadata = metadata_text(&new.metadata.unwrap_or_default())?;
    let sealed = api.config.master_key.seal(&owner(&team.id, &name), new.value.as_bytes())?;
    let added = api.store.add_secret(&team.id, &name, &sealed, &metadata).await?;
    let added = added.ok_or_else(|| conflict(format!("There is a secret '{}' already", shown(&name))))?;
    Ok((StatusCode::CREATED, Json(secret_json(&added))))
}

pub async fn list(State(api): Shared, team: Team, asked: Asked) -> Result<Response, ApiError> {
    let limit = asked.number("limit")?.unwrap_or(MAX_PAGE);
    if limit == 0 {
        return Err(ApiError::bad("limit '0' is not a number from 1 to 100"));
    }
    let limit = limit.min(MAX_PAGE);
    // The name that the page before ended with.
    let after = asked.text("nextToken").unwrap_or_default();
    let mut all = api.store.secrets(&team.id, after, limit + 1).await?;
    let more = i64::try_from(all.len()).is_ok_and(|n| n > limit);
    all.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    let mut response = Json(all.iter().map(secret_json).collect::<Vec<_>>()).into_response();
    if let Some(last) = all.last().filter(|_| more)
        && let Ok(token) = http::HeaderValue::from_bytes(last.name.as_bytes())
    {
        response.headers_mut().insert("x-next-token", token);
    }
    Ok(response)
}

pub async fn detail(
    State(api): Shared,
    team: Team,
    Path(selector): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(secret_json(&api.secret(&team, &selector).await?)))
}

pub async fn update(
    State(api): Shared,
    team: Team,
    Path(selector): Path<String>,
    Input(update): Input<SecretUpdate>,
) -> Result<Json<Value>, ApiError> {
    let s = api.secret(&team, &selector).await?;
    check_value(&update.value)?;
    let metadata = update.metadata.as_ref().map(metadata_text).transpose()?;
    let sealed = api.config.master_key.seal(&owner(&team.id, &s.name), update.value.as_bytes())?;
    api.store.update_secret(&s.id, &sealed, metadata.as_deref()).await?;
    Ok(Json(secret_json(&api.secret(&team, &s.id).await?)))
}

pub async fn delete(
    State(api): Shared,
    team: Team,
    Path(selector): Path<String>,
) -> Result<StatusCode, ApiError> {
    let s = api.secret(&team, &selector).await?;
    api.store.delete_secret(&s.id).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_found() {
        let of = |v| names(v).collect::<Vec<_>>();
        assert_eq!(of("Bearer ${e2b.secrets.a-b} ${e2b.secrets.c}"), ["a-b", "c"]);
        assert_eq!(of("${e2b.secrets.open"), Vec::<&str>::new());
        assert_eq!(of("${e2b.identity.tokens.x}"), Vec::<&str>::new());
    }

    #[test]
    fn names_and_values_are_checked() {
        assert_eq!(checked_name("OpenAI key").unwrap(), "openai key");
        for bad in ["", "a}b", "a\nb", "a/b", &"x".repeat(129)] {
            assert_eq!(checked_name(bad).unwrap_err().status, 400, "{bad}");
        }
        assert!(check_value("v").is_ok());
        for bad in ["", "a\r\nb", &"x".repeat(2049)] {
            assert_eq!(check_value(bad).unwrap_err().status, 400);
        }
    }
}
