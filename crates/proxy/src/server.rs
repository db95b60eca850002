//! The listeners: HTTP/1.1 and HTTP/2 on each, with and without TLS.
//!
//! Each worker is a thread with a runtime of its own. A client's connection and those to guests that its requests
//! take live on one of them, so that a request wakes no other thread on its way.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::uri::Scheme;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::forward::Proxy;
use crate::tls::Certificate;
use crate::{Catalog, unread};

/// Streams in flight get this long when the proxy ends.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// A client's connection without a request for this long is closed. The SDKs keep theirs for up to
/// 300 s and must be the first to close.
const IDLE_TIME: Duration = Duration::from_secs(310);
/// How long a client may take for TLS.
const TLS_TIME: Duration = Duration::from_secs(15);

/// Settings of the proxy.
#[derive(Debug, Clone)]
pub struct ProxyConfig {
    /// Longest wait for a connection to a guest.
    pub connect_timeout: Duration,
    /// How long a refused connection is tried again.
    pub connect_retry: Duration,
    /// Open requests to one sandbox; more are answered 429.
    pub max_connections_per_sandbox: usize,
    /// Longest time in which nothing moves in an answer or a tunnel; `None` for ever.
    pub idle_timeout: Option<Duration>,
    /// Longest time for a request and its answer, or a tunnel; `None` for ever.
    pub total_timeout: Option<Duration>,
    /// Threads; `None` for as many as there are processors.
    pub workers: Option<usize>,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            connect_retry: Duration::ZERO,
            max_connections_per_sandbox: 2048,
            idle_timeout: None,
            total_timeout: None,
            workers: None,
        }
    }
}

/// Where the proxy listens.
pub struct Listeners {
    /// Without TLS.
    pub plain: TcpListener,
    /// With TLS, and by which certificate.
    pub tls: Option<(TcpListener, Arc<Certificate>)>,
}

impl From<TcpListener> for Listeners {
    fn from(plain: TcpListener) -> Self {
        Self { plain, tls: None }
    }
}

thread_local! {
    /// Which worker this thread is.
    static WORKER: Cell<usize> = const { Cell::new(0) };
}

/// Which worker the calling thread is.
pub fn worker() -> usize {
    WORKER.get()
}

/// One worker's listeners, not yet watched by its runtime.
struct Sockets {
    plain: std::net::TcpListener,
    tls: Option<(std::net::TcpListener, Arc<Certificate>)>,
}

/// Serves until `stop`, then lets what is open end for a moment.
///
/// # Errors
/// When a worker cannot be started; never for a single connection.
pub async fn serve(
    listeners: impl Into<Listeners>,
    config: ProxyConfig,
    catalog: Arc<dyn Catalog>,
    stop: CancellationToken,
) -> io::Result<()> {
    let Listeners { plain, tls } = listeners.into();
    let (plain, tls) =
        (plain.into_std()?, tls.map(|(l, c)| Ok::<_, io::Error>((l.into_std()?, c))).transpose()?);
    let workers = match config.workers {
        Some(n) => n.max(1),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let proxy = Arc::new(Proxy { config, catalog, upstreams: Default::default(), main: Handle::current() });
    let mut ends = Vec::new();
    for n in 0..workers {
        let tls = tls.as_ref().map(|(l, c)| Ok::<_, io::Error>((l.try_clone()?, c.clone()))).transpose()?;
        let sockets = Sockets { plain: plain.try_clone()?, tls };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (proxy, stop) = (proxy.clone(), stop.clone());
        let (end, ended) = oneshot::channel();
        std::thread::Builder::new().name(format!("proxy-{n}")).spawn(move || {
            WORKER.set(n);
            let _ = end.send(runtime.block_on(work(sockets, proxy, stop)));
        })?;
        ends.push(ended);
    }
    drop((plain, tls));
    for ended in ends {
        ended.await.map_err(|_| io::Error::other("a worker of the proxy ended"))??;
    }
    Ok(())
}

async fn work(sockets: Sockets, proxy: Arc<Proxy>, stop: CancellationToken) -> io::Result<()> {
    let graceful = GracefulShutdown::new();
    let plain = TcpListener::from_std(sockets.plain)?;
    let tls = sockets.tls.map(|(l, c)| Ok::<_, io::Error>((TcpListener::from_std(l)?, c))).transpose()?;
    let with_tls = async {
        match tls {
            Some((listener, certificate)) => {
                accept(listener, Some(certificate), &proxy, &graceful, &stop).await;
            }
            None => stop.cancelled().await,
        }
    };
    tokio::join!(accept(plain, None, &proxy, &graceful, &stop), with_tls);
    if timeout(DRAIN_TIME, graceful.shutdown()).await.is_err() {
        tracing::info!("streams through the proxy were cut after {} s", DRAIN_TIME.as_secs());
    }
    Ok(())
}

async fn accept(
    listener: TcpListener,
    certificate: Option<Arc<Certificate>>,
    proxy: &Arc<Proxy>,
    graceful: &GracefulShutdown,
    stop: &CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            a = listener.accept() => a,
        };
        let (stream, client) = match accepted {
            Ok(a) => a,
            Err(e) => {
                // Out of descriptors, most likely: what is open must end first.
                tracing::warn!("cannot accept a connection: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let (proxy, watcher) = (proxy.clone(), graceful.watcher());
        match &certificate {
            None => drop(tokio::spawn(connection(stream, client, Scheme::HTTP, proxy, watcher))),
            Some(certificate) => {
                let acceptor = TlsAcceptor::from(certificate.config());
                tokio::spawn(async move {
                    match timeout(TLS_TIME, acceptor.accept(stream)).await {
                        Ok(Ok(stream)) => connection(stream, client, Scheme::HTTPS, proxy, watcher).await,
                        Ok(Err(e)) => tracing::debug!(%client, "TLS did not come about: {e}"),
                        Err(_) => tracing::debug!(%client, "TLS took too long"),
                    }
                });
            }
        }
    }
}

async fn connection<S>(
    stream: S,
    client: SocketAddr,
    scheme: Scheme,
    proxy: Arc<Proxy>,
    watcher: hyper_util::server::graceful::Watcher,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIME)
        .max_buf_size(256 << 10)
        // A client that closes its end has left, as with Go's servers: what it asked for ends in the guest too.
        .half_close(false)
        .title_case_headers(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Some(Duration::from_secs(30)))
        .max_concurrent_streams(1000)
        .adaptive_window(true);
    let service = service_fn(move |request| {
        let (proxy, scheme) = (proxy.clone(), scheme.clone());
        async move {
            let (request, watch) = unread::watch(request);
            let mut response = proxy.handle(client, &scheme, request).await;
            watch.close_if_unread(&mut response);
            Ok::<_, Infallible>(response)
        }
    });
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
    if let Err(e) = watcher.watch(connection).await {
        tracing::debug!(%client, "a client's connection ended: {e}");
    }
}
