//! Who calls: the key in `X-API-Key`, or as a bearer token.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use http::StatusCode;
use http::header::AUTHORIZATION;
use http::request::Parts;

use crate::{Api, ApiError};

/// The team whose key came with the request.
#[derive(Debug, Clone)]
pub struct Team {
    pub id: String,
    pub name: String,
}

fn refused(message: &str) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, message)
}

impl FromRequestParts<Arc<Api>> for Team {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, ApiError> {
        let text = |name: &str| parts.headers.get(name).map(|v| v.to_str().unwrap_or_default().trim());
        let bearer = text(AUTHORIZATION.as_str()).and_then(|v| {
            let (kind, token) = v.split_once(' ')?;
            kind.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        let key = text("x-api-key").or(bearer).filter(|k| !k.is_empty()).ok_or_else(|| {
            refused("An API key is missing: send it in the header X-API-Key (nidus key create makes one)")
        })?;
        match api.store.team_of_key(key).await? {
            Some((id, name)) => Ok(Self { id, name }),
            None => Err(refused("The API key is not valid: nidus key create makes one")),
        }
    }
}
