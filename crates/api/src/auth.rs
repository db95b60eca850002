//! Who calls.
//!
//! - The API key of a team, in `X-API-Key` or as a bearer token: all that SDKs do.
//! - An access token of a team (`sk_e2b_…`), as a bearer token: the same, and the team's keys.
//! - The installation's admin token in `X-Admin-Token`: nodes and all teams; with a team's id in
//!   `X-Team-ID`, what that team's access token may.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use http::StatusCode;
use http::header::AUTHORIZATION;
use http::request::Parts;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::store::TeamRow;
use crate::{Api, ApiError};

/// The team that a request is for.
#[derive(Debug, Clone)]
pub struct Team {
    pub id: String,
    pub name: String,
}

/// A team whose keys the caller may manage.
#[derive(Debug, Clone)]
pub struct Manager(pub Team);

/// The caller has the admin token.
#[derive(Debug, Clone, Copy)]
pub struct Admin;

/// 401.
pub fn refused(message: &str) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, message)
}

fn text<'a>(parts: &'a Parts, name: &str) -> Option<&'a str> {
    parts.headers.get(name).map(|v| v.to_str().unwrap_or_default().trim()).filter(|v| !v.is_empty())
}

/// The token in `Authorization: Bearer`.
pub fn bearer(parts: &Parts) -> Option<&str> {
    let (kind, token) = text(parts, AUTHORIZATION.as_str())?.split_once(' ')?;
    kind.eq_ignore_ascii_case("bearer").then(|| token.trim()).filter(|t| !t.is_empty())
}

/// Whether the caller sent the admin token; an error when it sent a wrong one.
fn admin(parts: &Parts, api: &Api) -> Result<bool, ApiError> {
    let Some(sent) = text(parts, "x-admin-token") else { return Ok(false) };
    let Some(token) = &api.config.admin_token else {
        return Err(refused("This installation has no admin token: set NIDUS_ADMIN_TOKEN for one"));
    };
    // Of their digests, so that not even the length shows.
    let (sent, token) = (Sha256::digest(sent.as_bytes()), Sha256::digest(token.as_bytes()));
    if bool::from(sent.as_slice().ct_eq(token.as_slice())) {
        Ok(true)
    } else {
        Err(refused("The admin token is not valid"))
    }
}

/// Whose request it is, and whether the caller may manage that team's keys.
async fn who(parts: &Parts, api: &Api) -> Result<(TeamRow, bool), ApiError> {
    let named = text(parts, "x-team-id");
    if admin(parts, api)? {
        let id = named.ok_or_else(|| refused("The admin token needs a team's id in X-Team-ID here"))?;
        return Ok((api.known_team(id).await?, true));
    }
    let (team, manages) = match (text(parts, "x-api-key"), bearer(parts)) {
        (Some(key), _) => (api.store.team_of_key(key).await?, false),
        (None, Some(token)) => match api.store.team_of_token(token).await? {
            Some(team) => (Some(team), true),
            None => (api.store.team_of_key(token).await?, false),
        },
        (None, None) => {
            return Err(refused(
                "An API key is missing: send it in the header X-API-Key (nidus key create makes one)",
            ));
        }
    };
    let team = team.ok_or_else(|| refused("The API key is not valid: nidus key create makes one"))?;
    if named.is_some_and(|id| id != team.id) {
        return Err(ApiError::new(StatusCode::FORBIDDEN, "The key is not one of the team in X-Team-ID"));
    }
    Ok((team, manages))
}

/// Lets a team in, unless it is shut out or asks too often.
async fn admitted(parts: &Parts, api: &Api) -> Result<(Team, bool), ApiError> {
    let (t, manages) = who(parts, api).await?;
    if let Some(reason) = t.blocked {
        return Err(ApiError::new(StatusCode::FORBIDDEN, format!("The team is blocked: {reason}")));
    }
    if !api.rates.take(&t.id) {
        return Err(ApiError::new(
            StatusCode::TOO_MANY_REQUESTS,
            format!("The team makes more than {} requests a second: slow down", api.config.request_rate),
        ));
    }
    Ok((Team { id: t.id, name: t.name }, manages))
}

impl FromRequestParts<Arc<Api>> for Team {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, ApiError> {
        Ok(admitted(parts, api).await?.0)
    }
}

impl FromRequestParts<Arc<Api>> for Manager {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, ApiError> {
        let (team, manages) = admitted(parts, api).await?;
        if !manages {
            return Err(refused(
                "An API key does not manage keys: send an access token as bearer (nidus team token makes one)",
            ));
        }
        Ok(Self(team))
    }
}

impl FromRequestParts<Arc<Api>> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, ApiError> {
        if admin(parts, api)? { Ok(Self) } else { Err(refused("The admin token is missing: X-Admin-Token")) }
    }
}
