//! The listener and the routes.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header};
use hyper::body::Body as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpSocket};

use crate::body::Body;
use crate::reply::{self, HttpError};
use crate::state::State;
use crate::{auth, files, filesystem, init, metrics, process};

const BACKLOG: u32 = 1024;
/// A connection without a request for this long is closed. Longer than the proxy keeps one, so
/// that it is never closed under a request that is on its way.
const IDLE_TIME: Duration = Duration::from_secs(300);

/// Binds the address, also right after an earlier envd left it.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Everything runs on one thread.
#[derive(Debug, Clone, Copy)]
struct OneThread;

impl<F> hyper::rt::Executor<F> for OneThread
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}

/// Serves for ever. To be called in a `LocalSet`.
pub async fn serve(listener: TcpListener, state: Arc<State>) {
    let mut builder = auto::Builder::new(OneThread);
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_TIME).half_close(false);
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(1000);
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                eprintln!("envd: cannot accept a connection: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let state = state.clone();
        let service = service_fn(move |request| {
            let state = state.clone();
            async move { Ok::<_, Infallible>(handle(request, state).await) }
        });
        let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
        tokio::task::spawn_local(async move {
            // A client that went away is not an event.
            let _ = connection.await;
        });
    }
}

async fn handle(request: Request<Incoming>, state: Arc<State>) -> Response<Body> {
    let origin = request.headers().contains_key(header::ORIGIN);
    let http1_body = request.version() <= Version::HTTP_11 && !request.body().is_end_stream();
    let mut response = route(request, &state).await;
    if http1_body && response.status().as_u16() >= 400 {
        // What was refused may not have been read to its end: the connection ends with the answer,
        // and the answer says so, or the next request would be lost on it.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if origin {
        // Pages use sandboxes from browsers; the token, not the origin, is what protects them.
        let h = response.headers_mut();
        let any = HeaderValue::from_static("*");
        h.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, any.clone());
        h.insert(header::ACCESS_CONTROL_ALLOW_METHODS, any.clone());
        h.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("*, authorization"));
        h.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, any);
        h.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("7200"));
    }
    response
}

async fn route(request: Request<Incoming>, state: &Arc<State>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    match (request.method(), path.as_str()) {
        (&Method::OPTIONS, _) => return reply::status(StatusCode::NO_CONTENT),
        (&Method::GET | &Method::HEAD, "/health") => return reply::status(StatusCode::NO_CONTENT),
        (&Method::POST, "/init") => return init::handle(request, state).await,
        // Signed URLs bring no token.
        (&Method::GET | &Method::HEAD, "/files") => return files::download(request, state).await,
        (&Method::POST, "/files") => return files::upload(request, state).await,
        _ => {}
    }
    let token = state.settings(|s| s.token.clone());
    if let Err(e) = auth::check_token(token.as_deref(), request.headers()) {
        return if path.starts_with("/process.") || path.starts_with("/filesystem.") {
            use nidus_envd_protocol::connect::{Code, ConnectError};
            let mut response = crate::rpc::error(&ConnectError::new(Code::Unauthenticated, e.message));
            *response.status_mut() = StatusCode::UNAUTHORIZED;
            response
        } else {
            e.response()
        };
    }
    match (request.method(), path.as_str()) {
        (&Method::GET, "/metrics") => match metrics::read(&state.cpu) {
            Ok(m) => reply::json(StatusCode::OK, &m),
            Err(e) => e.response(),
        },
        (&Method::GET, "/envs") => reply::json(StatusCode::OK, &state.settings(|s| s.envs.clone())),
        (&Method::POST, "/files/compose") => files::compose(request, state).await,
        (&Method::POST, path) => match path.split_once('/').and_then(|(_, p)| p.split_once('/')) {
            Some(("process.Process", method)) => process::call(method, request, state).await,
            Some(("filesystem.Filesystem", method)) => filesystem::call(method, request, state).await,
            _ => HttpError::not_found(format!("there is no {path}")).response(),
        },
        (_, "/metrics" | "/envs" | "/files" | "/init" | "/health") => {
            HttpError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{} is not for {path}", request.method()))
                .response()
        }
        _ => HttpError::not_found(format!("there is no {path}")).response(),
    }
}
