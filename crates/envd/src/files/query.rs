//! What a `/files` request names: path, user, signature.

use std::path::PathBuf;

use http::request::Parts;

use crate::auth::{self, Operation, Signed};
use crate::paths;
use crate::reply::HttpError;
use crate::state::State;
use crate::users::{self, User};

/// The query, decoded.
#[derive(Debug, Default)]
pub struct Query {
    pub path: Option<String>,
    user: Option<String>,
    signature: Option<String>,
    expiration: Option<i64>,
}

impl Query {
    /// Reads it out of the URI.
    pub fn of(parts: &Parts) -> Result<Self, HttpError> {
        let mut q = Self::default();
        for (name, value) in form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes()) {
            let value = value.into_owned();
            match name.as_ref() {
                "path" => q.path = Some(value),
                "username" => q.user = Some(value),
                "signature" => q.signature = Some(value),
                "signature_expiration" => {
                    let bad =
                        |_| HttpError::bad_request(format!("signature_expiration '{value}' is not a number"));
                    q.expiration = Some(value.parse().map_err(bad)?);
                }
                _ => {}
            }
        }
        Ok(q)
    }

    /// Checks the token or the signature.
    pub fn check(&self, parts: &Parts, state: &State, operation: Operation) -> Result<(), HttpError> {
        let token = state.settings(|s| s.token.clone());
        let signed = Signed {
            path: self.path.as_deref().unwrap_or_default(),
            user: self.user.as_deref().unwrap_or_default(),
            signature: self.signature.as_deref(),
            expiration: self.expiration,
        };
        let now = chrono::Utc::now().timestamp();
        auth::check_file_access(token.as_deref(), &parts.headers, &signed, operation, now)
    }

    /// The user that is named, or the default one. Reads /etc/passwd.
    pub fn user(&self, state: &State) -> Result<User, HttpError> {
        user(self.user.clone(), state)
    }
}

/// The user of this name, or the default one. Reads /etc/passwd.
pub fn user(name: Option<String>, state: &State) -> Result<User, HttpError> {
    let name = name.filter(|u| !u.is_empty()).unwrap_or_else(|| state.default_user());
    users::by_name(&name).map_err(|e| HttpError::unauthorized(format!("error looking up user '{name}': {e}")))
}

/// The absolute path.
pub fn resolve(path: &str, user: &User, state: &State) -> Result<PathBuf, HttpError> {
    paths::resolve(path, user, state.default_workdir().as_deref())
        .map_err(|e| HttpError::bad_request(e.to_string()))
}
