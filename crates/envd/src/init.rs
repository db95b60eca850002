//! `POST /init`: the host tells the guest who it is. On the path of every sandbox's start, so it
//! runs on the one thread, without file work unless it is asked for.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use nidus_envd_protocol::{ENVD_VERSION, InitRequest, VolumeMount};

use crate::auth;
use crate::body::Body;
use crate::reply::{self, HttpError};
use crate::state::{Initialised, Settings, State};
use crate::system::SystemError;

/// Environment and certificates fit well within this.
const MAX_BODY_BYTES: usize = 4 << 20;

/// Answers `POST /init`; every answer names envd's version.
pub async fn handle(request: Request<Incoming>, state: &Arc<State>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let applied = match Limited::new(body, MAX_BODY_BYTES).collect().await {
        Ok(body) => apply(&parts.headers, &body.to_bytes(), state),
        Err(e) => Err(HttpError::bad_request(format!("cannot read the request: {e}"))),
    };
    let done = match applied {
        Ok(Some(volumes)) => mount(volumes, state).await,
        applied => applied.map(drop),
    };
    let mut response = match done {
        Ok(()) => reply::status(StatusCode::NO_CONTENT),
        Err(e) => e.response(),
    };
    response.headers_mut().insert("x-envd-version", HeaderValue::from_static(ENVD_VERSION));
    response.headers_mut().insert(http::header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Where it may wait for the host.
async fn mount(volumes: Vec<VolumeMount>, state: &Arc<State>) -> Result<(), HttpError> {
    let state = state.clone();
    let done = tokio::task::spawn_blocking(move || state.mounts.set(&volumes)).await;
    done.map_err(|e| HttpError::internal(format!("the work on volumes broke off: {e}")))?.map_err(|e| {
        if e.is_bad_request() {
            HttpError::bad_request(e.to_string())
        } else {
            HttpError::internal(e.to_string())
        }
    })
}

/// All but the volumes, which are handed back if they are to be looked after.
fn apply(headers: &HeaderMap, body: &[u8], state: &State) -> Result<Option<Vec<VolumeMount>>, HttpError> {
    let mut request: InitRequest = if body.is_empty() {
        InitRequest::default()
    } else {
        serde_json::from_slice(body)
            .map_err(|e| HttpError::bad_request(format!("cannot decode the request: {e}")))?
    };
    state.settings(|settings| authorise(settings, headers, &request))?;
    // Random state first, and of a stale call too: more never hurts.
    if let Some(entropy) = &request.entropy {
        let bytes = STANDARD
            .decode(entropy)
            .map_err(|e| HttpError::bad_request(format!("the entropy is not base64: {e}")))?;
        state.system.add_entropy(&bytes).map_err(refused)?;
    }
    if !state.settings(|settings| is_news(settings, &request)) {
        return Ok(None);
    }
    let volumes = request.volume_mounts.take().filter(|_| state.system.is_enabled());
    if let Some(time) = request.timestamp {
        state.system.set_clock(time).map_err(refused)?;
    }
    if let Some(name) = &request.hostname {
        state.system.set_hostname(name).map_err(refused)?;
    }
    if let Some(address) = &request.hyperloop_ip {
        state.system.set_events_host(address).map_err(refused)?;
    }
    if let Some(pem) = request.ca_bundle.as_ref().filter(|p| !p.is_empty()) {
        state.system.trust(pem).map_err(refused)?;
    }
    let envs = state.settings(|settings| {
        store(settings, request);
        settings.envs.clone()
    });
    state.system.tell_identity(&envs).map_err(refused)?;
    Ok(volumes)
}

/// The first call sets the token; later ones must bring it, as the new one or in the header, to
/// keep, replace or remove it.
fn authorise(settings: &Settings, headers: &HeaderMap, request: &InitRequest) -> Result<(), HttpError> {
    let Some(token) = &settings.token else { return Ok(()) };
    let given = [request.access_token.as_deref(), auth::token_of(headers)];
    if given.into_iter().flatten().any(|given| auth::equal(given, token)) {
        return Ok(());
    }
    Err(HttpError::unauthorized(match request.access_token {
        Some(_) => "access token validation failed",
        None => "access token reset not authorized",
    }))
}

/// A repeated or delayed call of the same run must not undo a later one. Another run's clock may
/// be behind (another host), so a new life cycle always counts.
fn is_news(settings: &Settings, request: &InitRequest) -> bool {
    match (&settings.initialised, request.timestamp) {
        (Some(last), Some(at)) if last.lifecycle == request.lifecycle_id => {
            at.timestamp_nanos_opt().is_some_and(|at| at > last.at)
        }
        _ => true,
    }
}

fn store(settings: &mut Settings, request: InitRequest) {
    if let Some(at) = request.timestamp.and_then(|t| t.timestamp_nanos_opt()) {
        settings.initialised = Some(Initialised { at, lifecycle: request.lifecycle_id });
    }
    if let Some(envs) = request.env_vars {
        settings.envs = envs;
        settings.envs.entry("E2B_SANDBOX".to_owned()).or_insert_with(|| "true".to_owned());
    }
    settings.token = request.access_token.filter(|t| !t.is_empty());
    if let Some(address) = request.hyperloop_ip {
        settings.envs.insert("E2B_EVENTS_ADDRESS".to_owned(), format!("http://{address}"));
    }
    if let Some(user) = request.default_user.filter(|u| !u.is_empty()) {
        settings.user = user;
    }
    if let Some(dir) = request.default_workdir.filter(|d| !d.is_empty()) {
        settings.workdir = Some(dir);
    }
}

fn refused(e: SystemError) -> HttpError {
    match e {
        SystemError::EntropySize(_) | SystemError::Address(_) => HttpError::bad_request(e.to_string()),
        e => HttpError::internal(e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(state: &State, header: Option<&'static str>, json: &str) -> u16 {
        let mut headers = HeaderMap::new();
        if let Some(token) = header {
            headers.insert("x-access-token", HeaderValue::from_static(token));
        }
        apply(&headers, json.as_bytes(), state).map_or_else(|e| e.status.as_u16(), |_| 204)
    }

    #[test]
    fn the_first_call_sets_the_token_and_others_need_it() {
        let state = State::new(false);
        assert_eq!(call(&state, None, ""), 204);
        assert_eq!(call(&state, None, r#"{"accessToken":"a"}"#), 204);
        assert_eq!(call(&state, None, r#"{"accessToken":"b"}"#), 401);
        assert_eq!(call(&state, None, "{}"), 401);
        assert_eq!(call(&state, Some("b"), r#"{"accessToken":"b"}"#), 401);
        assert_eq!(call(&state, None, r#"{"accessToken":"a"}"#), 204);
        assert_eq!(call(&state, Some("a"), r#"{"accessToken":"b"}"#), 204);
        assert_eq!(state.settings(|s| s.token.clone()).as_deref(), Some("b"));
        assert_eq!(call(&state, Some("b"), "{}"), 204);
        assert_eq!(state.settings(|s| s.token.clone()), None);
    }

    #[test]
    fn stale_calls_change_nothing_unless_the_run_is_another() {
        let state = State::new(false);
        let json = |at: &str, user: &str, run: &str| {
            format!(r#"{{"timestamp":"{at}","defaultUser":"{user}","lifecycleID":"{run}"}}"#)
        };
        let user = || state.settings(|s| s.user.clone());
        assert_eq!(call(&state, None, &json("2026-01-02T00:00:00Z", "a", "1")), 204);
        assert_eq!(call(&state, None, &json("2026-01-01T00:00:00Z", "b", "1")), 204);
        assert_eq!(user(), "a");
        assert_eq!(call(&state, None, &json("2026-01-01T00:00:00Z", "c", "2")), 204);
        assert_eq!(user(), "c");
    }

    #[test]
    fn environment_is_replaced_and_bad_requests_are_refused() {
        let state = State::new(false);
        assert_eq!(call(&state, None, r#"{"envVars":{"A":"1"}}"#), 204);
        assert_eq!(call(&state, None, r#"{"envVars":{"B":"2"},"hyperloopIP":"10.0.0.1"}"#), 204);
        let envs = state.settings(|s| s.envs.clone());
        assert_eq!(envs.get("A"), None);
        assert_eq!(envs["B"], "2");
        assert_eq!(envs["E2B_SANDBOX"], "true");
        assert_eq!(envs["E2B_EVENTS_ADDRESS"], "http://10.0.0.1");
        for bad in ["{", r#"{"entropy":"%"}"#, r#"{"entropy":""}"#, r#"{"hyperloopIP":"x"}"#] {
            assert_eq!(call(&state, None, bad), 400, "{bad}");
        }
    }
}
