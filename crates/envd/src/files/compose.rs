//! `POST /files/compose`: one file out of several that lie here already, such as the parts of a
//! large upload, which are removed then.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use serde::Deserialize;

use super::io_error;
use super::query::{resolve, user};
use super::upload::{Written, collect, create};
use crate::body::Body;
use crate::filesystem::entry;
use crate::reply::{self, HttpError};
use crate::state::State;

const MAX_BODY_BYTES: usize = 4 << 20;
const MAX_SOURCES: usize = 10_000;

#[derive(Debug, Deserialize)]
struct ComposeRequest {
    source_paths: Vec<String>,
    destination: String,
    #[serde(default)]
    username: Option<String>,
}

/// Answers the request.
pub async fn compose(request: Request<Incoming>, state: &Arc<State>) -> Response<Body> {
    match work(request, state.clone()).await {
        Ok(written) => reply::json(StatusCode::OK, &written),
        Err(e) => e.response(),
    }
}

async fn work(request: Request<Incoming>, state: Arc<State>) -> Result<Written, HttpError> {
    let bytes = collect(request.into_body(), MAX_BODY_BYTES).await?;
    let request: ComposeRequest = serde_json::from_slice(&bytes)
        .map_err(|e| HttpError::bad_request(format!("cannot decode the request: {e}")))?;
    tokio::task::spawn_blocking(move || join(request, &state))
        .await
        .map_err(|e| HttpError::internal(format!("the work did not finish: {e}")))?
}

fn join(request: ComposeRequest, state: &State) -> Result<Written, HttpError> {
    if request.source_paths.is_empty() || request.source_paths.len() > MAX_SOURCES {
        return Err(HttpError::bad_request(format!("source_paths has 1 to {MAX_SOURCES} paths")));
    }
    let user = user(request.username, state)?;
    let target = resolve(&request.destination, &user, state)?;
    let sources: Vec<PathBuf> =
        request.source_paths.iter().map(|p| resolve(p, &user, state)).collect::<Result<_, _>>()?;
    for s in &sources {
        let m = fs::metadata(s).map_err(|e| io_error("look at", s, &e))?;
        if !m.is_file() {
            return Err(HttpError::bad_request(format!("'{}' is not a regular file", s.display())));
        }
    }
    // Put together beside the target and moved there whole: it is never seen half made, and may
    // itself be one of the sources.
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = target.with_file_name(name);
    let done = copy_all(&sources, &part, user.uid, user.gid)
        .and_then(|()| fs::rename(&part, &target).map_err(|e| io_error("move", &part, &e)));
    if let Err(e) = done {
        let _ = fs::remove_file(&part);
        return Err(e);
    }
    for s in sources.iter().filter(|s| **s != target) {
        fs::remove_file(s).map_err(|e| io_error("remove", s, &e))?;
    }
    Ok(Written::new(&target, entry::metadata(&target)))
}

fn copy_all(sources: &[PathBuf], part: &std::path::Path, uid: u32, gid: u32) -> Result<(), HttpError> {
    let mut out = create(part, uid, gid)?;
    for s in sources {
        let mut from = File::open(s).map_err(|e| io_error("open", s, &e))?;
        // The kernel copies, without a way through here (copy_file_range(2)).
        io::copy(&mut from, &mut out).map_err(|e| io_error("copy", s, &e))?;
    }
    Ok(())
}
