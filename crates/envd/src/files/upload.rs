//! `POST /files`: one file as it is, or several as a form.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use futures::{Stream, StreamExt, TryStreamExt};
use http::request::Parts;
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, BodyStream};
use hyper::body::Incoming;
use serde::Serialize;
use tokio::sync::mpsc;

use super::query::{Query, resolve};
use super::{QUEUE, io_error};
use crate::auth::Operation;
use crate::body::Body;
use crate::filesystem::entry;
use crate::paths::{self, ensure_dirs};
use crate::reply::{self, HttpError};
use crate::state::State;
use crate::users::User;

/// Files in one form.
const MAX_FILES: usize = 10_000;
const METADATA: &str = "x-metadata-";

/// What is told of a written file.
#[derive(Debug, Serialize)]
pub struct Written {
    path: String,
    name: String,
    r#type: &'static str,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    metadata: HashMap<String, String>,
}

impl Written {
    /// Of the file at `path`.
    pub fn new(path: &Path, metadata: HashMap<String, String>) -> Self {
        let name = paths::base(path);
        Self { path: path.to_string_lossy().into_owned(), name, r#type: "file", metadata }
    }
}

/// Answers the request.
pub async fn upload(request: Request<Incoming>, state: &Arc<State>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    match store(&parts, body, state).await {
        Ok(written) => reply::json(StatusCode::OK, &written),
        Err(e) => e.response(),
    }
}

async fn store(parts: &Parts, body: Incoming, state: &Arc<State>) -> Result<Vec<Written>, HttpError> {
    let query = Query::of(parts)?;
    query.check(parts, state, Operation::Write)?;
    let gzip = match parts.headers.get(header::CONTENT_ENCODING).map(|v| v.as_bytes().to_ascii_lowercase()) {
        None => false,
        Some(v) if v == b"identity" || v.is_empty() => false,
        Some(v) if v == b"gzip" => true,
        Some(_) => return Err(HttpError::bad_request("the content encoding is not supported: gzip is")),
    };
    let (s, q) = (state.clone(), query);
    let (user, query) = tokio::task::spawn_blocking(move || Ok::<_, HttpError>((q.user(&s)?, q)))
        .await
        .map_err(|e| HttpError::internal(format!("the work did not finish: {e}")))??;
    let metadata = metadata(&parts.headers)?;
    let bytes = BodyStream::new(body)
        .try_filter_map(|frame| async move { Ok(frame.into_data().ok()) })
        .map_err(io::Error::other);
    let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    if let Ok(boundary) = multer::parse_boundary(kind) {
        // A compressed form is unpacked on its way to the parser.
        let bytes = if gzip { unpacked(bytes).boxed() } else { bytes.boxed() };
        return form(bytes, &boundary, &query, &user, &metadata, state).await;
    }
    if kind.starts_with("multipart/") {
        return Err(HttpError::bad_request("the form's content type has no boundary"));
    }
    let path = query.path.as_deref().filter(|p| !p.is_empty());
    let path = path.ok_or_else(|| HttpError::bad_request("the path is missing"))?;
    let path = resolve(path, &user, state)?;
    Ok(vec![write(path, &user, metadata, bytes, gzip).await?])
}

fn metadata(headers: &HeaderMap) -> Result<HashMap<String, String>, HttpError> {
    let mut all = HashMap::new();
    for (name, value) in headers {
        if let Some(key) = name.as_str().strip_prefix(METADATA).filter(|k| !k.is_empty()) {
            let value = value.to_str().map_err(|_| {
                HttpError::bad_request(format!("the metadata value of '{key}' is not printable ASCII"))
            })?;
            all.insert(key.to_owned(), value.to_owned());
        }
    }
    Ok(all)
}

/// Each part named `file` is a file; its file name is its path, unless the query has one.
async fn form(
    bytes: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    boundary: &str,
    query: &Query,
    user: &User,
    metadata: &HashMap<String, String>,
    state: &State,
) -> Result<Vec<Written>, HttpError> {
    let bad = |e: multer::Error| HttpError::bad_request(format!("cannot read the form: {e}"));
    let mut bytes = Box::pin(bytes);
    let mut form = multer::Multipart::new(&mut bytes, boundary);
    let mut written: Vec<Written> = Vec::new();
    while let Some(field) = form.next_field().await.map_err(bad)? {
        if field.name() != Some("file") {
            continue;
        }
        if written.len() >= MAX_FILES {
            return Err(HttpError::bad_request(format!("a form may have {MAX_FILES} files")));
        }
        let path = match query.path.as_deref().filter(|p| !p.is_empty()) {
            Some(_) if !written.is_empty() => {
                return Err(HttpError::bad_request("the form has several files, but the query has one path"));
            }
            Some(path) => path.to_owned(),
            None => file_name(field.file_name().unwrap_or_default()),
        };
        if path.is_empty() {
            return Err(HttpError::bad_request("a file of the form has no name, and the query no path"));
        }
        let path = resolve(&path, user, state)?;
        if written.iter().any(|w| Path::new(&w.path) == path) {
            return Err(HttpError::bad_request(format!("the form has '{}' twice", path.display())));
        }
        written.push(write(path, user, metadata.clone(), field.map_err(io::Error::other), false).await?);
    }
    // The form has an end of its own, before that of the body. What is left unread of a body would end the
    // connection, under the client's next request.
    drop(form);
    while bytes.next().await.is_some_and(|piece| piece.is_ok()) {}
    Ok(written)
}

/// A part's file name as its sender meant it: forms escape a quote and line ends in it, and
/// nothing else (WHATWG HTML, "multipart form data": `"`, CR and LF become %22, %0D and %0A).
fn file_name(name: &str) -> String {
    name.replace("%22", "\"").replace("%0D", "\r").replace("%0A", "\n")
}

/// Unpacks gzip piece by piece.
fn unpacked(
    bytes: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send {
    let state = Some((Box::pin(bytes), MultiGzDecoder::new(Vec::new())));
    futures::stream::unfold(state, |state| async move {
        let (mut bytes, mut decoder) = state?;
        loop {
            let step = match bytes.next().await {
                Some(Ok(piece)) => decoder.write_all(&piece),
                Some(Err(e)) => Err(e),
                None => {
                    return match decoder.finish() {
                        Ok(rest) if rest.is_empty() => None,
                        Ok(rest) => Some((Ok(rest.into()), None)),
                        Err(e) => Some((Err(e), None)),
                    };
                }
            };
            if let Err(e) = step {
                return Some((Err(e), None));
            }
            let out = std::mem::take(decoder.get_mut());
            if !out.is_empty() {
                return Some((Ok(out.into()), Some((bytes, decoder))));
            }
        }
    })
}

/// Writes the bytes as they come, by a thread of their own.
async fn write(
    path: PathBuf,
    user: &User,
    metadata: HashMap<String, String>,
    bytes: impl Stream<Item = io::Result<Bytes>> + Send,
    gzip: bool,
) -> Result<Written, HttpError> {
    let (sender, receiver) = mpsc::channel::<Bytes>(QUEUE);
    let (uid, gid) = (user.uid, user.gid);
    let writer = tokio::task::spawn_blocking({
        let (path, metadata) = (path.clone(), metadata.clone());
        move || write_all(&path, uid, gid, &metadata, receiver, gzip)
    });
    let mut bytes = std::pin::pin!(bytes);
    let mut broken = None;
    while let Some(piece) = bytes.next().await {
        match piece {
            // The writer has ended: it says why.
            Ok(piece) => {
                if sender.send(piece).await.is_err() {
                    break;
                }
            }
            Err(e) => {
                broken = Some(HttpError::bad_request(format!("the upload broke off: {e}")));
                break;
            }
        }
    }
    drop(sender);
    writer.await.map_err(|e| HttpError::internal(format!("the work did not finish: {e}")))??;
    match broken {
        Some(e) => Err(e),
        None => Ok(Written::new(&path, metadata)),
    }
}

fn write_all(
    path: &Path,
    uid: u32,
    gid: u32,
    metadata: &HashMap<String, String>,
    mut pieces: mpsc::Receiver<Bytes>,
    gzip: bool,
) -> Result<(), HttpError> {
    let wrap = |e: io::Error| io_error("write", path, &e);
    let mut file = create(path, uid, gid)?;
    if gzip {
        let mut decoder = MultiGzDecoder::new(file);
        while let Some(piece) = pieces.blocking_recv() {
            decoder.write_all(&piece).map_err(wrap)?;
        }
        file = decoder.finish().map_err(wrap)?;
    } else {
        while let Some(piece) = pieces.blocking_recv() {
            file.write_all(&piece).map_err(wrap)?;
        }
    }
    file.flush().map_err(wrap)?;
    // What an earlier file of this name had goes, too.
    entry::set_metadata(path, metadata).map_err(|e| io_error("set the metadata of", path, &e))?;
    Ok(())
}

/// Makes or empties a file that belongs to the user, and the folders above it.
pub fn create(path: &Path, uid: u32, gid: u32) -> Result<File, HttpError> {
    match fs::metadata(path) {
        Ok(m) if m.is_dir() => {
            return Err(HttpError::bad_request(format!("path is a directory: {}", path.display())));
        }
        Ok(m) if !m.is_file() => {
            return Err(HttpError::bad_request(format!("path is not a regular file: {}", path.display())));
        }
        _ => {}
    }
    if let Some(parent) = path.parent() {
        ensure_dirs(parent, uid, gid).map_err(|e| io_error("make", parent, &e))?;
    }
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o666)
        .open(path)
        .map_err(|e| io_error("open", path, &e))?;
    fchown(&file, Some(uid), Some(gid)).map_err(|e| io_error("change the owner of", path, &e))?;
    Ok(file)
}

/// Small bodies as a whole.
pub async fn collect(body: Incoming, limit: usize) -> Result<Bytes, HttpError> {
    let read = http_body_util::Limited::new(body, limit).collect().await;
    read.map(|b| b.to_bytes()).map_err(|e| HttpError::bad_request(format!("cannot read the request: {e}")))
}
