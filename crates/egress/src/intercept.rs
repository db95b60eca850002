//! HTTP that is looked at request by request: where only a host's name lets a flow through, and where headers
//! are set in what goes to a host.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddrV4;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE,
    TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::{Authority, Scheme};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::{Either as EitherBody, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use crate::dial::{DialError, Upstream};
use crate::flows::FlowGuard;
use crate::gateway::Slot;
use crate::sniff::authority_host;
use crate::tcp::Prefixed;
use crate::{Policy, host_name};

/// How long a client may take for the head of a request, or for TLS.
const HEAD_TIME: Duration = Duration::from_secs(15);
const MAX_STREAMS: u32 = 64;
/// What one connection may have in memory, on either side.
const MAX_BUFFER: usize = 64 << 10;
const WINDOW: u32 = 256 << 10;

type Body = EitherBody<Incoming, Full<Bytes>>;

/// What the requests of one connection have in common.
struct Flow {
    slot: Arc<Slot>,
    guard: FlowGuard,
    to: SocketAddrV4,
    /// The name of its certificate, where TLS is ended.
    sni: Option<String>,
    client: Client<Connector, Incoming>,
}

/// Plain HTTP.
pub async fn plain(slot: &Arc<Slot>, guard: FlowGuard, guest: Prefixed, to: SocketAddrV4) {
    serve(slot, guard, guest, to, None, false).await;
}

/// TLS to a host that a rule sets headers for.
pub async fn tls(slot: &Arc<Slot>, guard: FlowGuard, guest: Prefixed, to: SocketAddrV4, sni: String) {
    let config = match slot.gateway.ca.server(&sni) {
        Ok(config) => config,
        Err(e) => return tracing::warn!("a rule's host: {e}"),
    };
    let guest = match timeout(HEAD_TIME, TlsAcceptor::from(config).accept(guest)).await {
        Ok(Ok(guest)) => guest,
        Ok(Err(e)) => return tracing::debug!(sni, "a guest's TLS: {e}"),
        Err(_) => return,
    };
    let h2 = guest.get_ref().1.alpn_protocol() == Some(b"h2");
    serve(slot, guard, guest, to, Some(sni), h2).await;
}

async fn serve<S>(
    slot: &Arc<Slot>,
    guard: FlowGuard,
    guest: S,
    to: SocketAddrV4,
    sni: Option<String>,
    h2: bool,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connector = Connector { slot: slot.clone(), to, sni: sni.clone(), h2 };
    let client = Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(Duration::from_secs(60))
        .pool_max_idle_per_host(8)
        .http1_max_buf_size(MAX_BUFFER)
        .http2_initial_connection_window_size(WINDOW)
        .http1_title_case_headers(true)
        .build(connector);
    let flow = Arc::new(Flow { slot: slot.clone(), guard, to, sni, client });
    let service = service_fn(move |request| {
        let flow = flow.clone();
        async move { Ok::<_, Infallible>(flow.request(request).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(MAX_BUFFER)
        .title_case_headers(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_connection_window_size(WINDOW);
    if let Err(e) = builder.serve_connection_with_upgrades(TokioIo::new(guest), service).await {
        tracing::debug!(%to, "a guest's HTTP: {e}");
    }
}

fn say(status: StatusCode, text: String) -> Response<Body> {
    let mut answer = Response::new(EitherBody::Right(Full::new(Bytes::from(text + "\n"))));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// The one host that a request asks for, as written; an error where it names none or several.
fn asked_host(request: &Request<Incoming>) -> Result<Option<String>, ()> {
    let mut hosts = request.headers().get_all(HOST).iter();
    let (header, more) = (hosts.next(), hosts.next());
    if more.is_some() {
        return Err(());
    }
    let header = match header {
        Some(value) => Some(authority_host(value.to_str().map_err(|_| ())?).ok_or(())?),
        None => None,
    };
    // RFC 9112, 3.2.2: the target's counts. When both are there and differ, the next server may think otherwise.
    match (request.uri().host(), header) {
        (Some(target), Some(header)) if !target.eq_ignore_ascii_case(&header) => Err(()),
        (Some(target), _) => Ok(Some(target.to_owned())),
        (None, header) => Ok(header),
    }
}

impl Flow {
    async fn request(self: Arc<Self>, mut request: Request<Incoming>) -> Response<Body> {
        let Ok(written) = asked_host(&request) else {
            return say(
                StatusCode::BAD_REQUEST,
                "nidus: this request names no host, or more than one".into(),
            );
        };
        let host = written.as_deref().and_then(host_name);
        if self.sni.is_some() && self.sni != host {
            return say(
                StatusCode::MISDIRECTED_REQUEST,
                "nidus: this connection was made to another host than the request names".into(),
            );
        }
        let shown = written.unwrap_or_else(|| self.to.ip().to_string());
        let Some(policy) = self.guard.turn_to(host.as_deref()) else {
            self.slot.counters().requests_denied.one();
            let mut answer = say(
                StatusCode::FORBIDDEN,
                format!("nidus: the network policy of this sandbox does not let it reach {shown}"),
            );
            if request.version() < Version::HTTP_2 {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            return answer;
        };
        if request.method() == Method::CONNECT {
            return say(StatusCode::METHOD_NOT_ALLOWED, "nidus: no tunnels are made here".into());
        }
        let upgrade = wants_upgrade(&request).then(|| hyper::upgrade::on(&mut request));
        if let Err(e) = self.prepare(&policy, host.as_deref(), &mut request, upgrade.is_some()) {
            return say(StatusCode::BAD_REQUEST, format!("nidus: {e}"));
        }
        match self.client.request(request).await {
            Ok(answer) => self.answered(answer, upgrade),
            Err(e) => {
                self.slot.counters().flows_failed.one();
                let why = std::iter::successors(std::error::Error::source(&e), |e| e.source()).last();
                let why = why.map_or_else(|| e.to_string(), ToString::to_string);
                say(StatusCode::BAD_GATEWAY, format!("nidus: {shown} cannot be reached: {why}"))
            }
        }
    }

    /// Makes of the guest's request the one that goes out.
    fn prepare(
        &self,
        policy: &Policy,
        host: Option<&str>,
        request: &mut Request<Incoming>,
        upgrade: bool,
    ) -> Result<(), http::Error> {
        let set = host.and_then(|host| policy.headers_for(host));
        // A secret goes to the host that it is for, wherever the guest says that is.
        let by_name = host.filter(|host| {
            set.is_some()
                || self.sni.is_some()
                || policy.decide(*self.to.ip(), Some(host)) == crate::Verdict::ByName
        });
        let (scheme, usual) = if self.sni.is_some() { (Scheme::HTTPS, 443) } else { (Scheme::HTTP, 80) };
        let port = self.to.port();
        let authority: Authority = match by_name {
            Some(host) if port == usual => host.parse()?,
            Some(host) => format!("{host}:{port}").parse()?,
            None => self.to.to_string().parse()?,
        };
        let mut target = Uri::builder().scheme(scheme).authority(authority);
        if let Some(path) = request.uri().path_and_query() {
            target = target.path_and_query(path.clone());
        } else {
            target = target.path_and_query("/");
        }
        *request.uri_mut() = target.build()?;
        *request.version_mut() = Version::HTTP_11;
        strip(request.headers_mut(), upgrade);
        if let Some(set) = set {
            self.slot.counters().requests_changed.one();
            for (name, value) in &set {
                request.headers_mut().insert(name, value.clone());
            }
        }
        Ok(())
    }

    fn answered(
        self: Arc<Self>,
        mut answer: Response<Incoming>,
        upgrade: Option<hyper::upgrade::OnUpgrade>,
    ) -> Response<Body> {
        let switches = answer.status() == StatusCode::SWITCHING_PROTOCOLS;
        if let (true, Some(guest)) = (switches, upgrade) {
            let upstream = hyper::upgrade::on(&mut answer);
            self.slot.tracker.clone().spawn(self.tunnel(guest, upstream));
        }
        strip(answer.headers_mut(), switches);
        *answer.version_mut() = Version::HTTP_11;
        answer.map(EitherBody::Left)
    }

    /// Lasts as long as its flow, in which it keeps its place.
    async fn tunnel(self: Arc<Self>, guest: hyper::upgrade::OnUpgrade, upstream: hyper::upgrade::OnUpgrade) {
        let copy = async {
            let (Ok(guest), Ok(upstream)) = (guest.await, upstream.await) else { return };
            let (mut guest, mut upstream) = (TokioIo::new(guest), TokioIo::new(upstream));
            if let Err(e) = tokio::io::copy_bidirectional(&mut guest, &mut upstream).await {
                tracing::debug!("a tunnel ended: {e}");
            }
        };
        tokio::select! {
            () = self.slot.stop.cancelled() => {}
            () = self.guard.cut().cancelled() => {}
            () = copy => {}
        }
    }
}

fn wants_upgrade(request: &Request<Incoming>) -> bool {
    let listed = |value: &HeaderValue| {
        value.to_str().is_ok_and(|v| v.split(',').any(|token| token.trim().eq_ignore_ascii_case("upgrade")))
    };
    request.headers().contains_key(UPGRADE) && request.headers().get_all(CONNECTION).iter().any(listed)
}

/// Takes out what is of one connection only (RFC 9110, 7.6.1).
fn strip(headers: &mut HeaderMap, upgrade: bool) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .filter(|name| *name != UPGRADE && *name != HOST)
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in [CONNECTION, TRANSFER_ENCODING, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TRAILER] {
        headers.remove(name);
    }
    headers.remove("keep-alive");
    headers.remove("proxy-connection");
    if headers.get(TE).is_some_and(|te| te != "trailers") {
        headers.remove(TE);
    }
    if upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    } else {
        headers.remove(UPGRADE);
    }
}

/// Connects for requests: to the name in their target, or the address there.
#[derive(Clone)]
struct Connector {
    slot: Arc<Slot>,
    to: SocketAddrV4,
    sni: Option<String>,
    /// Whether the guest speaks HTTP/2; else an upgrade may come, which that has not.
    h2: bool,
}

impl Connector {
    async fn connect(self, target: Uri) -> Result<Conn, DialError> {
        let policy = self.slot.flows.policy();
        let dialer = self.slot.dialer();
        let port = self.to.port();
        let stream = match target.host().and_then(host_name) {
            Some(host) => dialer.name(&policy, &host, port).await?,
            None => dialer.address(&policy, self.to).await?,
        };
        let Some(sni) = &self.sni else {
            return Ok(Conn { io: TokioIo::new(Either::Left(stream)), h2: false });
        };
        let alpn: &[&[u8]] = if self.h2 { &[b"h2", b"http/1.1"] } else { &[b"http/1.1"] };
        let stream = dialer.tls(stream, sni, alpn).await?;
        let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        Ok(Conn { io: TokioIo::new(Either::Right(Box::new(stream))), h2 })
    }
}

impl tower::Service<Uri> for Connector {
    type Response = Conn;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<Conn, DialError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, target: Uri) -> Self::Future {
        Box::pin(self.clone().connect(target))
    }
}

/// A connection to a host.
struct Conn {
    io: TokioIo<Either<Upstream, Box<TlsStream<Upstream>>>>,
    h2: bool,
}

impl Connection for Conn {
    fn connected(&self) -> Connected {
        if self.h2 { Connected::new().negotiated_h2() } else { Connected::new() }
    }
}

impl hyper::rt::Read for Conn {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl hyper::rt::Write for Conn {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
