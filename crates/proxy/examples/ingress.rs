//! The proxy alone, before a backend of this host: what `scripts/bench_ingress.py` measures.
//!
//! - `ingress proxy LISTEN BACKEND_IP`: sandbox `bench` is at BACKEND_IP, any port.
//! - `ingress sink LISTEN`: a backend that reads what is uploaded.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use nidus_proxy::{InProcessCatalog, ProxyConfig, Route, serve};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

type Failed = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Failed> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["proxy", listen, backend] => proxy(listen.parse()?, backend.parse()?).await,
        ["sink", listen] => sink(listen.parse()?).await,
        _ => Err("usage: ingress proxy LISTEN BACKEND_IP | ingress sink LISTEN".into()),
    }
}

async fn proxy(listen: SocketAddr, host_ip: Ipv4Addr) -> Result<(), Failed> {
    let catalog = InProcessCatalog::new();
    let route = Route {
        host_ip,
        traffic_access_token: None,
        mask_request_host: None,
        https_ports: Vec::new(),
        gone: CancellationToken::new(),
    };
    catalog.insert("bench".to_owned(), route);
    let listener = TcpListener::bind(listen).await?;
    let config =
        ProxyConfig { max_connections_per_sandbox: 100_000, workers: Some(2), ..ProxyConfig::default() };
    serve(listener, config, Arc::new(catalog), CancellationToken::new()).await?;
    Ok(())
}

async fn sink(listen: SocketAddr) -> Result<(), Failed> {
    let listener = TcpListener::bind(listen).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        let service = service_fn(|request: Request<Incoming>| async move {
            let mut body = request.into_body();
            while let Some(Ok(_)) = body.frame().await {}
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::new())))
        });
        tokio::spawn(
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
        );
    }
}
