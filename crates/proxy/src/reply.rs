//! The proxy's own answers.

use bytes::Bytes;
use http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use serde_json::{Value, json};

use crate::Target;

/// Body of an answer, streamed or ours.
pub type Body = BoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// A body that is all there.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// What is to be known of a request for an answer of ours.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// A browser asks.
    html: bool,
}

impl Asked {
    /// Of a request with these headers.
    pub fn of(headers: &HeaderMap) -> Self {
        let accepts = headers.get(ACCEPT).and_then(|a| a.to_str().ok());
        Self { html: accepts.is_some_and(|a| a.contains("text/html")) }
    }
}

/// An answer with this JSON body, or a small page for a browser.
fn answer(asked: Asked, status: StatusCode, body: &Value) -> Response<Body> {
    let (kind, text) = if asked.html {
        ("text/html; charset=utf-8", page(status, body["message"].as_str().unwrap_or_default(), body))
    } else {
        ("application/json; charset=utf-8", body.to_string())
    };
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn page(status: StatusCode, message: &str, body: &Value) -> String {
    let (message, id) = (escape(message), escape(body["sandboxId"].as_str().unwrap_or_default()));
    let port = body["port"].as_u64().map(|p| format!(", port {p}")).unwrap_or_default();
    let what = if id.is_empty() { String::new() } else { format!("<p>Sandbox <code>{id}</code>{port}</p>") };
    format!(
        "<!doctype html><meta charset=utf-8><title>{status}</title>\
         <body style=\"font-family:system-ui;max-width:40rem;margin:15vh auto;padding:0 1rem\">\
         <h1>{message}</h1>{what}<p>{status}</p></body>\n"
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Answers about a request that goes nowhere.
pub fn plain(asked: Asked, status: StatusCode, message: &str) -> Response<Body> {
    answer(asked, status, &json!({ "code": status.as_u16(), "message": message }))
}

/// No sandbox of this id runs here.
pub fn not_found(asked: Asked, target: &Target) -> Response<Body> {
    let status = StatusCode::BAD_GATEWAY;
    let message = "The sandbox was not found";
    answer(asked, status, &json!({ "sandboxId": target.sandbox_id, "message": message, "code": 502 }))
}

/// It runs, but nobody listens there.
pub fn closed_port(asked: Asked, target: &Target) -> Response<Body> {
    let message = "The sandbox is running but port is not open";
    let body =
        json!({ "sandboxId": target.sandbox_id, "message": message, "port": target.port, "code": 502 });
    answer(asked, StatusCode::BAD_GATEWAY, &body)
}

/// Something about this sandbox.
pub fn about(asked: Asked, target: &Target, status: StatusCode, message: &str) -> Response<Body> {
    let body = json!({ "sandboxId": target.sandbox_id, "message": message, "code": status.as_u16() });
    answer(asked, status, &body)
}

/// Too many connections to one sandbox.
pub fn busy(asked: Asked, target: &Target) -> Response<Body> {
    let message = "Too many connections to this sandbox";
    let mut response = about(asked, target, StatusCode::TOO_MANY_REQUESTS, message);
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_browser_gets_a_page_without_what_others_wrote_into_it() {
        let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static("text/html"))]);
        let response = plain(Asked::of(&headers), StatusCode::BAD_REQUEST, "<script>");
        let text = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(text.to_vec()).unwrap();
        assert!(text.contains("&lt;script&gt;") && !text.contains("<script>"), "{text}");
    }
}
