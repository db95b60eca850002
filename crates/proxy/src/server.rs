//! The listener: HTTP/1.1 and HTTP/2 with prior knowledge on one port.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::Catalog;
use crate::forward::Proxy;
use crate::unread;

/// Streams in flight get this long when the proxy ends.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// A client's connection without a request for this long is closed. The SDKs keep theirs for up to
/// 300 s and must be the first to close.
const IDLE_TIME: Duration = Duration::from_secs(310);

/// Settings of the proxy.
#[derive(Debug, Clone)]
pub struct ProxyConfig {
    /// Longest wait for a connection to a guest.
    pub connect_timeout: Duration,
    /// How long a refused connection is tried again.
    pub connect_retry: Duration,
    /// Open requests to one sandbox; more are answered 429.
    pub max_connections_per_sandbox: usize,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            connect_retry: Duration::ZERO,
            max_connections_per_sandbox: 2048,
        }
    }
}

/// Serves until `stop`, then lets what is open end for a moment.
///
/// # Errors
/// Never for a single connection.
pub async fn serve(
    listener: TcpListener,
    config: ProxyConfig,
    catalog: Arc<dyn Catalog>,
    stop: CancellationToken,
) -> io::Result<()> {
    let proxy = Arc::new(Proxy { config, catalog, upstreams: Default::default() });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIME)
        .max_buf_size(256 << 10)
        .half_close(true)
        .preserve_header_case(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Some(Duration::from_secs(30)))
        .max_concurrent_streams(1000)
        .adaptive_window(true);
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
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
        let proxy = proxy.clone();
        let service = service_fn(move |request| {
            let proxy = proxy.clone();
            async move {
                let (request, watch) = unread::watch(request);
                let mut response = proxy.handle(client, request).await;
                watch.close_if_unread(&mut response);
                Ok::<_, Infallible>(response)
            }
        });
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(e) = connection.await {
                tracing::debug!(%client, "a client's connection ended: {e}");
            }
        });
    }
    drop(listener);
    if tokio::time::timeout(DRAIN_TIME, graceful.shutdown()).await.is_err() {
        tracing::info!("streams through the proxy were cut after {} s", DRAIN_TIME.as_secs());
    }
    Ok(())
}
