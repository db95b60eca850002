//! `GET /files`: a file's bytes, whole or in part, plain or compressed.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use tokio::sync::mpsc;

use super::query::{Query, resolve};
use super::{CHUNK, QUEUE, io_error};
use crate::auth::Operation;
use crate::body::{self, Body};
use crate::paths;
use crate::reply::HttpError;
use crate::state::State;

/// Answers the request.
pub async fn download(request: Request<Incoming>, state: &Arc<State>) -> Response<Body> {
    answer(&request, state).await.unwrap_or_else(|e| e.response())
}

async fn answer(request: &Request<Incoming>, state: &Arc<State>) -> Result<Response<Body>, HttpError> {
    let (parts, ()) = request_parts(request);
    let query = Query::of(&parts)?;
    query.check(&parts, state, Operation::Read)?;
    let coding = coding(&parts.headers)?;
    let state = state.clone();
    let opened = tokio::task::spawn_blocking(move || open(&query, &state)).await;
    let (file, path) = opened.map_err(|e| HttpError::internal(format!("the work did not finish: {e}")))??;
    let m = file.metadata().map_err(|e| io_error("look at", &path, &e))?;
    let mut response = Response::new(body::empty());
    let h = response.headers_mut();
    h.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    h.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    if let Ok(v) = HeaderValue::from_str(&disposition(&paths::base(&path))) {
        h.insert(header::CONTENT_DISPOSITION, v);
    }
    if let Ok(v) =
        HeaderValue::from_str(&httpdate::fmt_http_date(m.modified().unwrap_or(SystemTime::UNIX_EPOCH)))
    {
        h.insert(header::LAST_MODIFIED, v);
    }
    let head = parts.method == Method::HEAD;
    if coding == Coding::Gzip {
        h.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        if !head {
            *response.body_mut() = read(file, 0..u64::MAX, true);
        }
        return Ok(response);
    }
    h.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    let size = m.len();
    let range = match range(&parts.headers, size) {
        Range::Whole => 0..size,
        Range::Part(r) => {
            let text = format!("bytes {}-{}/{size}", r.start, r.end - 1);
            h.insert(
                header::CONTENT_RANGE,
                HeaderValue::from_str(&text).map_err(|e| HttpError::internal(e.to_string()))?,
            );
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            r
        }
        Range::Outside => {
            let mut e = HttpError::new(
                StatusCode::RANGE_NOT_SATISFIABLE,
                format!("the file has {size} bytes, which the range does not touch"),
            )
            .response();
            if let Ok(v) = HeaderValue::from_str(&format!("bytes */{size}")) {
                e.headers_mut().insert(header::CONTENT_RANGE, v);
            }
            return Ok(e);
        }
    };
    // Files of /proc say that they are empty and are not: they come without a length.
    if size > 0 || !path.starts_with("/proc") && !path.starts_with("/sys") {
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(range.end - range.start));
        if !head {
            *response.body_mut() = if range.is_empty() { body::empty() } else { read(file, range, false) };
        }
    } else if !head {
        *response.body_mut() = read(file, 0..u64::MAX, false);
    }
    Ok(response)
}

fn request_parts(request: &Request<Incoming>) -> (http::request::Parts, ()) {
    let mut copy = Request::builder().method(request.method()).uri(request.uri());
    if let Some(h) = copy.headers_mut() {
        h.clone_from(request.headers());
    }
    copy.body(()).unwrap_or_default().into_parts()
}

fn open(query: &Query, state: &State) -> Result<(File, PathBuf), HttpError> {
    let user = query.user(state)?;
    let path = resolve(query.path.as_deref().unwrap_or_default(), &user, state)?;
    let m = std::fs::metadata(&path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => HttpError::not_found(format!("path '{}' does not exist", path.display())),
        _ => io_error("look at", &path, &e),
    })?;
    if m.is_dir() {
        return Err(HttpError::bad_request(format!("path '{}' is a directory", path.display())));
    }
    if !m.is_file() {
        return Err(HttpError::bad_request(format!("path '{}' is not a regular file", path.display())));
    }
    let file = File::open(&path).map_err(|e| io_error("open", &path, &e))?;
    Ok((file, path))
}

/// RFC 6266 and 8187: plain for old clients, encoded for the rest.
fn disposition(name: &str) -> String {
    let plain: String = name
        .chars()
        .map(|c| if c.is_ascii_graphic() && c != '"' && c != '\\' || c == ' ' { c } else { '_' })
        .collect();
    let mut encoded = String::new();
    for b in name.bytes() {
        if b.is_ascii_alphanumeric() || b"-._~".contains(&b) {
            encoded.push(b as char);
        } else {
            encoded.push_str(&format!("%{b:02X}"));
        }
    }
    format!("inline; filename=\"{plain}\"; filename*=UTF-8''{encoded}")
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Coding {
    Identity,
    Gzip,
}

/// Compression costs the guest's processor more than the way to its host, so it is for clients
/// that list nothing but gzip, or refuse the plain form.
fn coding(headers: &HeaderMap) -> Result<Coding, HttpError> {
    let Some(text) = headers.get(header::ACCEPT_ENCODING).and_then(|v| v.to_str().ok()) else {
        return Ok(Coding::Identity);
    };
    let listed: Vec<(String, bool)> = text
        .split(',')
        .map(|part| {
            let mut words = part.split(';').map(str::trim);
            let name = words.next().unwrap_or_default().to_ascii_lowercase();
            let zero = words.any(|w| w.strip_prefix("q=").is_some_and(|q| q.trim().parse() == Ok(0f32)));
            (name, !zero)
        })
        .filter(|(name, _)| !name.is_empty())
        .collect();
    let says = |name: &str| listed.iter().find(|(n, _)| n == name).map(|(_, yes)| *yes);
    let gzip = says("gzip").or(says("*")).unwrap_or(false);
    let identity = says("identity").unwrap_or_else(|| says("*").unwrap_or(true));
    let only_gzip = !listed.is_empty() && listed.iter().all(|(n, yes)| n == "gzip" && *yes);
    match (identity, gzip) {
        (_, true) if only_gzip => Ok(Coding::Gzip),
        (true, _) => Ok(Coding::Identity),
        (false, true) => Ok(Coding::Gzip),
        (false, false) => Err(HttpError::new(
            StatusCode::NOT_ACCEPTABLE,
            "none of the accepted encodings is supported: identity and gzip are",
        )),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Range {
    Whole,
    Part(std::ops::Range<u64>),
    Outside,
}

/// One range of bytes (RFC 9110, 14.1.2); several, or what is not understood, mean the whole.
fn range(headers: &HeaderMap, size: u64) -> Range {
    let spec = headers
        .get(header::RANGE)
        .and_then(|v| v.to_str().ok())
        .and_then(|t| t.trim().strip_prefix("bytes="));
    let Some((first, last)) = spec.filter(|s| !s.contains(',')).and_then(|s| s.split_once('-')) else {
        return Range::Whole;
    };
    let (first, last) = (first.trim(), last.trim());
    let part = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..last.saturating_add(1).min(size),
        (Ok(first), Err(_)) if last.is_empty() => first..size,
        (Err(_), Ok(last)) if first.is_empty() => size.saturating_sub(last)..size,
        _ => return Range::Whole,
    };
    if part.is_empty() { Range::Outside } else { Range::Part(part) }
}

/// The file's bytes, read by a thread of their own as fast as the client takes them.
fn read(mut file: File, range: std::ops::Range<u64>, gzip: bool) -> Body {
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::task::spawn_blocking(move || {
        let mut out = Pieces(sender.clone());
        let done = file.seek(SeekFrom::Start(range.start)).and_then(|_| {
            let mut part = file.take(range.end - range.start);
            if gzip {
                let mut encoder =
                    GzEncoder::new(io::BufWriter::with_capacity(CHUNK, out), Compression::fast());
                copy(&mut part, &mut encoder)?;
                encoder.finish()?.flush()
            } else {
                copy(&mut part, &mut out)
            }
        });
        if let Err(e) = done {
            // A length that was promised and is not reached ends the connection, as it must.
            let _ = sender.blocking_send(Err(e));
        }
    });
    body::stream(futures::stream::unfold(receiver, |mut r| async move { Some((r.recv().await?, r)) }))
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => to.write_all(&buffer[..n])?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Sends what is written to it; an error when the client is gone.
struct Pieces(mpsc::Sender<io::Result<Bytes>>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = Ok(Bytes::copy_from_slice(bytes));
        self.0.blocking_send(piece).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn encodings_are_chosen() {
        let of = |v| coding(&headers(header::ACCEPT_ENCODING, v)).map_err(|e| e.status.as_u16());
        assert_eq!(of("gzip, deflate, br"), Ok(Coding::Identity));
        assert_eq!(of("gzip"), Ok(Coding::Gzip));
        assert_eq!(of("gzip;q=0"), Ok(Coding::Identity));
        assert_eq!(of("identity;q=0, gzip"), Ok(Coding::Gzip));
        assert_eq!(of("identity;q=0"), Err(406));
        assert_eq!(of("br, *;q=0"), Err(406));
        assert_eq!(of(""), Ok(Coding::Identity));
    }

    #[test]
    fn ranges_are_read() {
        let of = |v| range(&headers(header::RANGE, v), 10);
        assert_eq!(of("bytes=2-4"), Range::Part(2..5));
        assert_eq!(of("bytes=8-"), Range::Part(8..10));
        assert_eq!(of("bytes=-3"), Range::Part(7..10));
        assert_eq!(of("bytes=-30"), Range::Part(0..10));
        assert_eq!(of("bytes=10-"), Range::Outside);
        assert_eq!(of("bytes=-0"), Range::Outside);
        assert_eq!(of("bytes=4-2"), Range::Whole);
        assert_eq!(of("bytes=0-1,3-4"), Range::Whole);
        assert_eq!(of("lines=1-2"), Range::Whole);
    }

    #[test]
    fn odd_names_fit_a_header() {
        assert_eq!(disposition("a\"ü\n"), "inline; filename=\"a___\"; filename*=UTF-8''a%22%C3%BC%0A");
    }
}
