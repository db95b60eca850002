//! API keys and access tokens over REST.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::auth::{Admin, Manager};
use crate::input::Input;
use crate::model::stamp;
use crate::store::{ApiKey, NewKey};
use crate::{Api, ApiError};

type Shared = State<Arc<Api>>;

const MAX_NAME: usize = 256;

/// Body of all calls that give a name.
#[derive(Debug, Deserialize)]
pub struct Named {
    name: String,
}

impl Named {
    fn checked(self) -> Result<String, ApiError> {
        let name = self.name.trim();
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(ApiError::bad(format!("A name has 1 to {MAX_NAME} bytes and no control characters")));
        }
        Ok(name.to_owned())
    }
}

/// What may be shown of a key: `e2b_`, its length, its first and last characters.
fn mask(text: &str) -> Value {
    let (front, back) = text.split_once("...").unwrap_or((text, ""));
    let at = front.rfind('_').map_or(0, |at| at + 1);
    let (prefix, first) = front.split_at(at);
    json!({ "prefix": prefix, "valueLength": 40, "maskedValuePrefix": first, "maskedValueSuffix": back })
}

fn made(new: &NewKey, name: &str, value: &str) -> Value {
    json!({
        "id": new.id, "name": name, value: new.key, "mask": mask(&new.mask),
        "createdAt": stamp(new.created_at),
    })
}

fn key_json(k: &ApiKey) -> Value {
    json!({
        "id": k.id, "name": k.name, "mask": mask(&k.mask), "createdAt": stamp(k.created_at),
        "createdBy": null, "lastUsed": k.last_used.map(stamp),
    })
}

fn id(text: &str, what: &str) -> Result<Uuid, ApiError> {
    Uuid::try_parse(text).map_err(|_| ApiError::bad(format!("The id of {what} is a UUID")))
}

fn found(is: bool, what: &str) -> Result<(), ApiError> {
    if is { Ok(()) } else { Err(ApiError::not_found(format!("There is no such {what}"))) }
}

pub async fn list(State(api): Shared, Manager(team): Manager) -> Result<Json<Vec<Value>>, ApiError> {
    let all = api.store.list_keys().await?;
    Ok(Json(all.iter().filter(|k| k.team_id == team.id).map(key_json).collect()))
}

async fn new_key(api: &Api, team: &str, new: Named) -> Result<(StatusCode, Json<Value>), ApiError> {
    let name = new.checked()?;
    let key = api.store.create_key(team, &name).await?;
    Ok((StatusCode::CREATED, Json(made(&key, &name, "key"))))
}

pub async fn create(
    State(api): Shared,
    Manager(team): Manager,
    Input(new): Input<Named>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    new_key(&api, &team.id, new).await
}

pub async fn rename(
    State(api): Shared,
    Manager(team): Manager,
    Path(key): Path<String>,
    Input(new): Input<Named>,
) -> Result<StatusCode, ApiError> {
    found(api.store.rename_key(&team.id, id(&key, "a key")?, &new.checked()?).await?, "key")?;
    Ok(StatusCode::OK)
}

pub async fn delete(
    State(api): Shared,
    Manager(team): Manager,
    Path(key): Path<String>,
) -> Result<StatusCode, ApiError> {
    found(api.store.delete_key_of(&team.id, id(&key, "a key")?).await?, "key")?;
    Ok(StatusCode::NO_CONTENT)
}

pub async fn create_token(
    State(api): Shared,
    Manager(team): Manager,
    Input(new): Input<Named>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let name = new.checked()?;
    let token = api.store.create_token(&team.id, &name).await?;
    Ok((StatusCode::CREATED, Json(made(&token, &name, "token"))))
}

pub async fn delete_token(
    State(api): Shared,
    Manager(team): Manager,
    Path(token): Path<String>,
) -> Result<StatusCode, ApiError> {
    found(api.store.delete_token(&team.id, id(&token, "an access token")?).await?, "access token")?;
    Ok(StatusCode::NO_CONTENT)
}

pub async fn admin_create(
    State(api): Shared,
    _: Admin,
    Path(team): Path<String>,
    Input(new): Input<Named>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let team = api.known_team(&team).await?;
    new_key(&api, &team.id, new).await
}

pub async fn admin_delete(
    State(api): Shared,
    _: Admin,
    Path((team, key)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let team = api.known_team(&team).await?;
    found(api.store.delete_key_of(&team.id, id(&key, "a key")?).await?, "key")?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_their_parts() {
        let m = mask("sk_e2b_ab12...ff00");
        assert_eq!((m["prefix"].as_str(), m["maskedValuePrefix"].as_str()), (Some("sk_e2b_"), Some("ab12")));
        assert_eq!(m["maskedValueSuffix"], "ff00");
        let named = |n: &str| Named { name: n.to_owned() }.checked();
        assert_eq!(named(" a ").unwrap(), "a");
        assert!(named("  ").is_err() && named("a\nb").is_err() && named(&"x".repeat(257)).is_err());
    }
}
