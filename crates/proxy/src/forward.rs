//! One request, there and back.

use std::net::SocketAddr;
use std::sync::Arc;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::{Authority, Scheme};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body as HttpBody;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use subtle::ConstantTimeEq;
use tokio::runtime::Handle;

use crate::reply::{self, Asked, Body};
use crate::streamed::{Limits, Streamed, Used};
use crate::target::{ID_HEADER, PORT_HEADER};
use crate::unread::Watched;
use crate::upstream::{ConnectError, Upstream, Upstreams};
use crate::{Catalog, ENVD_PORT, ProxyConfig, Route, Target, upgrade};

const TOKEN_HEADER: &str = "e2b-traffic-access-token";
/// Paths of envd that only the node may call.
const CONTROL: &[&str] = &["/init", "/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw"];

/// Headers that concern one connection (RFC 9110, 7.6.1).
const HOP_BY_HOP: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// What all requests share.
pub struct Proxy {
    pub config: ProxyConfig,
    pub catalog: Arc<dyn Catalog>,
    pub upstreams: Upstreams,
    /// Where sandboxes are looked for that are not known: what wakes them outlives a worker's connections.
    pub main: Handle,
}

impl Proxy {
    /// Answers one request of `client`.
    pub async fn handle(
        self: Arc<Self>,
        client: SocketAddr,
        scheme: &Scheme,
        request: Request<Watched>,
    ) -> Response<Body> {
        let (mut parts, body) = request.into_parts();
        let asked = Asked::of(&parts.headers);
        let target = match Target::of(&parts) {
            Ok(t) => t,
            Err(e) => {
                if e == crate::TargetError::None && parts.uri.path() == "/health" {
                    return Response::new(reply::full(""));
                }
                return reply::plain(asked, StatusCode::BAD_REQUEST, e.message());
            }
        };
        let Some(route) = self.route(&target.sandbox_id).await else {
            return reply::not_found(asked, &target);
        };
        if let Err((status, message)) = allowed(&parts, &target, &route) {
            return reply::about(asked, &target, status, message);
        }
        let upstream = self.upstreams.of(&target.sandbox_id, &route);
        let Some(permit) = upstream.admit(self.config.max_connections_per_sandbox) else {
            return reply::busy(asked, &target);
        };
        let client_upgrade = wants_upgrade(&parts.headers)
            .then(|| parts.extensions.remove::<hyper::upgrade::OnUpgrade>())
            .flatten();
        let kind = parts.headers.get(header::UPGRADE).cloned().filter(|_| client_upgrade.is_some());
        let http2 = is_grpc(&parts);
        if let Err(message) = rewrite(&mut parts, client, scheme, &target, &route, kind.as_ref()) {
            return reply::about(asked, &target, StatusCode::BAD_REQUEST, message);
        }
        let empty = HttpBody::is_end_stream(&body);
        let body = if empty { reply::full("") } else { body.map_err(Into::into).boxed() };
        let request = Request::from_parts(parts, body);
        let sending = async {
            match http2 {
                true => self.send_http2(&upstream, target.port, request).await.map(|r| (r, None)),
                false => self.send(&upstream, target.port, request, client_upgrade.is_some()).await,
            }
        };
        let limits = Limits::of(&self.config);
        let sent = tokio::select! {
            () = upstream.gone().cancelled() => return reply::not_found(asked, &target),
            () = limits.over() => {
                let message = "The sandbox did not answer in time";
                return reply::about(asked, &target, StatusCode::GATEWAY_TIMEOUT, message);
            }
            s = sending => s,
        };
        match sent {
            Ok((response, sender)) => {
                let connection = Used { upstream, port: target.port, sender, _permit: permit };
                back(response, client_upgrade, connection, limits)
            }
            Err(SendError::Connect(ConnectError::Closed)) => reply::closed_port(asked, &target),
            Err(SendError::Connect(ConnectError::Unreachable(e))) => {
                tracing::debug!(sandbox = %target.sandbox_id, port = target.port, "no connection: {e}");
                reply::closed_port(asked, &target)
            }
            Err(SendError::Lost(e)) => {
                tracing::debug!(sandbox = %target.sandbox_id, port = target.port, "no answer: {e}");
                let message = "The sandbox closed the connection before it answered";
                reply::about(asked, &target, StatusCode::BAD_GATEWAY, message)
            }
        }
    }

    async fn route(&self, sandbox_id: &str) -> Option<Arc<Route>> {
        if let Some(route) = self.catalog.known(sandbox_id) {
            return Some(route);
        }
        let (catalog, id) = (self.catalog.clone(), sandbox_id.to_owned());
        self.main.spawn(async move { catalog.find(&id).await }).await.ok().flatten()
    }

    /// Sends over a kept connection if there is one. When that one turns out to be closed
    /// before anything was sent, hyper hands the request back and it goes over a new one. When it
    /// may have been sent, it goes again if it changes nothing to do it twice (RFC 9110, 9.2.2)
    /// and nothing of a body is gone.
    async fn send(
        &self,
        upstream: &Upstream,
        port: u16,
        mut request: Request<Body>,
        upgrade: bool,
    ) -> Result<(Response<Incoming>, Option<SendRequest<Body>>), SendError> {
        while let Some(mut kept) = (!upgrade).then(|| upstream.kept(port)).flatten() {
            let again = copy_to_repeat(&request);
            match kept.try_send_request(request).await {
                Ok(response) => return Ok((response, Some(kept))),
                Err(mut e) => match e.take_message().or(again) {
                    Some(unsent) => request = unsent,
                    None => return Err(SendError::Lost(e.into_error())),
                },
            }
        }
        let mut fresh = upstream.connect(port, &self.config).await.map_err(SendError::Connect)?;
        let response = fresh.send_request(request).await.map_err(SendError::Lost)?;
        Ok((response, Some(fresh)))
    }

    /// gRPC is HTTP/2 all the way: its trailers are the answer.
    async fn send_http2(
        &self,
        upstream: &Upstream,
        port: u16,
        mut request: Request<Body>,
    ) -> Result<Response<Incoming>, SendError> {
        *request.version_mut() = Version::HTTP_2;
        let host = request.headers_mut().remove(header::HOST);
        let authority = host.and_then(|h| Authority::try_from(h.as_bytes()).ok());
        let mut uri = std::mem::take(request.uri_mut()).into_parts();
        uri.scheme = Some(Scheme::HTTP);
        uri.authority = Some(authority.unwrap_or_else(|| Authority::from_static("localhost")));
        if let Ok(uri) = Uri::from_parts(uri) {
            *request.uri_mut() = uri;
        }
        let mut sender = upstream.http2(port, &self.config).await.map_err(SendError::Connect)?;
        sender.send_request(request).await.map_err(SendError::Lost)
    }
}

fn is_grpc(parts: &http::request::Parts) -> bool {
    parts.version == Version::HTTP_2
        && parts
            .headers
            .get(header::CONTENT_TYPE)
            .is_some_and(|t| t.as_bytes().starts_with(b"application/grpc"))
}

/// The request once more, if it may be sent twice.
fn copy_to_repeat(request: &Request<Body>) -> Option<Request<Body>> {
    if !request.method().is_idempotent() || !request.body().is_end_stream() {
        return None;
    }
    let mut copy = Request::new(reply::full(""));
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    Some(copy)
}

enum SendError {
    Connect(ConnectError),
    Lost(hyper::Error),
}

/// The token of the sandbox's traffic, and envd's paths that are not for clients.
fn allowed(
    parts: &http::request::Parts,
    target: &Target,
    route: &Route,
) -> Result<(), (StatusCode, &'static str)> {
    if target.port == ENVD_PORT {
        if CONTROL.contains(&normal_path(parts.uri.path()).as_str()) {
            return Err((StatusCode::NOT_FOUND, "This path of envd is for the node alone"));
        }
        return Ok(());
    }
    let Some(token) = &route.traffic_access_token else { return Ok(()) };
    match parts.headers.get(TOKEN_HEADER) {
        None => Err((StatusCode::FORBIDDEN, "The header E2B-Traffic-Access-Token is missing")),
        Some(given) if bool::from(given.as_bytes().ct_eq(token.as_bytes())) => Ok(()),
        Some(_) => Err((StatusCode::FORBIDDEN, "The traffic access token is wrong")),
    }
}

/// The path as a lenient server may read it: decoded, without empty and dot segments, without a
/// slash at its end.
fn normal_path(path: &str) -> String {
    let mut decoded = path.as_bytes().to_vec();
    // Decoded until nothing changes: what is encoded twice may be decoded twice.
    loop {
        let next: Vec<u8> = percent_encoding::percent_decode(&decoded).collect();
        if next == decoded {
            break;
        }
        decoded = next;
    }
    let text = String::from_utf8_lossy(&decoded).to_ascii_lowercase();
    let text = text.split(['?', '#', ';']).next().unwrap_or_default();
    let mut segments: Vec<&str> = Vec::new();
    for s in text.split(['/', '\\']) {
        match s {
            "" | "." => {}
            ".." => {
                segments.pop();
            }
            s => segments.push(s),
        }
    }
    format!("/{}", segments.join("/"))
}

fn wants_upgrade(headers: &HeaderMap) -> bool {
    let listed = |v: &HeaderValue| {
        v.to_str().is_ok_and(|t| t.split(',').any(|w| w.trim().eq_ignore_ascii_case("upgrade")))
    };
    headers.contains_key(header::UPGRADE) && headers.get_all(header::CONNECTION).iter().any(listed)
}

/// Removes what concerned one connection alone, what `Connection` names included.
fn drop_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|n| n.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(*name);
    }
}

/// Makes of the client's request the one that the guest gets.
fn rewrite(
    parts: &mut http::request::Parts,
    client: SocketAddr,
    scheme: &Scheme,
    target: &Target,
    route: &Route,
    upgrade: Option<&HeaderValue>,
) -> Result<(), &'static str> {
    let host = match &route.mask_request_host {
        Some(mask) => HeaderValue::from_str(&mask.replace("${PORT}", &target.port.to_string())).ok(),
        None => parts
            .headers
            .get(header::HOST)
            .cloned()
            .or_else(|| parts.uri.authority().and_then(|a| HeaderValue::from_str(a.as_str()).ok())),
    };
    let host = host.ok_or("The request has no usable host")?;
    let path = parts.uri.path_and_query().map_or("/", |p| p.as_str());
    parts.uri = match path {
        "*" if parts.method == Method::OPTIONS => Uri::from_static("*"),
        path => path.parse().map_err(|_| "The request's path cannot be passed on")?,
    };
    if parts.method == Method::CONNECT {
        return Err("CONNECT is not passed on");
    }
    let trailers =
        parts.headers.get(header::TE).is_some_and(|t| t.as_bytes().eq_ignore_ascii_case(b"trailers"));
    drop_hop_by_hop(&mut parts.headers);
    for name in [ID_HEADER, PORT_HEADER, TOKEN_HEADER] {
        parts.headers.remove(name);
    }
    if trailers {
        parts.headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if let Some(kind) = upgrade {
        parts.headers.insert(header::UPGRADE, kind.clone());
        parts.headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    }
    let came_to = parts.headers.get(header::HOST).cloned().unwrap_or_else(|| host.clone());
    parts.headers.insert(header::HOST, host);
    let earlier = parts.headers.get("x-forwarded-for").and_then(|v| v.to_str().ok());
    let chain = earlier.map_or_else(|| client.ip().to_string(), |e| format!("{e}, {}", client.ip()));
    if let Ok(value) = HeaderValue::from_str(&chain) {
        parts.headers.insert("x-forwarded-for", value);
    }
    let h = &mut parts.headers;
    let proto = if *scheme == Scheme::HTTPS { "https" } else { "http" };
    h.entry("x-forwarded-proto").or_insert(HeaderValue::from_static(proto));
    h.entry("x-forwarded-host").or_insert(came_to);
    parts.version = Version::HTTP_11;
    Ok(())
}

/// Makes of the guest's answer the one that the client gets.
fn back(
    mut response: Response<Incoming>,
    client: Option<hyper::upgrade::OnUpgrade>,
    connection: Used,
    limits: Limits,
) -> Response<Body> {
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let kind = response.headers().get(header::UPGRADE).cloned();
        drop_hop_by_hop(response.headers_mut());
        if let Some(kind) = kind {
            response.headers_mut().insert(header::UPGRADE, kind);
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        }
        if let Some(client) = client {
            let guest = hyper::upgrade::on(&mut response);
            upgrade::join(client, guest, connection, limits);
        }
        return response.map(|_| reply::full(""));
    }
    drop_hop_by_hop(response.headers_mut());
    // The version of the guest's connection says nothing about the client's.
    *response.version_mut() = Version::default();
    response.map(|body| Streamed::new(body, connection, limits).boxed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_spelling_of_a_control_path_passes() {
        for path in [
            "/init",
            "//init",
            "/./init",
            "/x/../init",
            "/%69nit",
            "/%2569nit",
            "/init/",
            "/INIT",
            "/init;x=1",
        ] {
            assert!(CONTROL.contains(&normal_path(path).as_str()), "{path}");
        }
        for path in ["/files", "/initial", "/x/init", "/process.Process/Start"] {
            assert!(!CONTROL.contains(&normal_path(path).as_str()), "{path}");
        }
    }

    #[test]
    fn headers_of_one_connection_stay_there() {
        let mut h = HeaderMap::new();
        h.insert(header::CONNECTION, HeaderValue::from_static("close, X-Secret"));
        h.insert("x-secret", HeaderValue::from_static("1"));
        h.insert("keep-alive", HeaderValue::from_static("timeout=5"));
        h.insert("x-kept", HeaderValue::from_static("1"));
        drop_hop_by_hop(&mut h);
        assert_eq!(h.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-kept"]);
    }
}
