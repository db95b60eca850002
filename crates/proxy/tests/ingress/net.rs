//! Guests, clients and the proxy between them.

use std::convert::Infallible;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use nidus_proxy::{Certificate, InProcessCatalog, Listeners, ProxyConfig, Route};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::sync::CancellationToken;

pub type Body = BoxBody<Bytes, Infallible>;

/// A certificate and its key, in PEM.
pub fn certificate(names: &[&str]) -> (String, String) {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

/// The file was written some time later than it was.
pub fn later(path: &Path) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A server as it runs in a sandbox.
pub struct Guest {
    pub port: u16,
    connections: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Guest {
    pub async fn http1<F>(handle: impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        Self::start(handle, None, false).await
    }

    pub async fn tls<F>(handle: impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let (certificate, key) = certificate(&["whoever"]);
        let config = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap();
        Self::start(handle, Some(TlsAcceptor::from(Arc::new(config))), false).await
    }

    pub async fn http2<F>(handle: impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        Self::start(handle, None, true).await
    }

    async fn start<F>(
        handle: impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
        tls: Option<TlsAcceptor>,
        http2: bool,
    ) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = connections.clone();
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Relaxed);
                let (handle, tls) = (handle.clone(), tls.clone());
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let answer = handle(request);
                        async move { Ok::<_, Infallible>(answer.await) }
                    });
                    let builder = auto::Builder::new(TokioExecutor::new());
                    let builder = if http2 { builder.http2_only() } else { builder.http1_only() };
                    // How it ends is the proxy's affair.
                    let _ = match tls {
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => builder.serve_connection(TokioIo::new(stream), service).await,
                            Err(_) => return,
                        },
                        None => builder.serve_connection(TokioIo::new(stream), service).await,
                    };
                });
            }
        });
        Self { port, connections, task }
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Relaxed)
    }

    pub fn route(&self) -> Route {
        Route {
            host_ip: Ipv4Addr::LOCALHOST,
            traffic_access_token: None,
            mask_request_host: None,
            https_ports: Vec::new(),
            gone: CancellationToken::new(),
        }
    }
}

/// The proxy before one sandbox, `sandbox`.
pub struct Proxy {
    pub plain: SocketAddr,
    pub tls: Option<SocketAddr>,
    stop: CancellationToken,
    task: JoinHandle<std::io::Result<()>>,
}

impl Proxy {
    pub async fn start(config: ProxyConfig, route: Route, certificate: Option<Arc<Certificate>>) -> Self {
        let catalog = InProcessCatalog::new();
        catalog.insert("sandbox".to_owned(), route);
        let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let with_tls = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, tls) = (plain.local_addr().unwrap(), with_tls.local_addr().unwrap());
        let listeners = Listeners { plain, tls: certificate.clone().map(|c| (with_tls, c)) };
        let stop = CancellationToken::new();
        let task = tokio::spawn(nidus_proxy::serve(listeners, config, Arc::new(catalog), stop.clone()));
        Self { plain: address, tls: certificate.map(|_| tls), stop, task }
    }

    pub async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

/// One connection to the proxy.
#[derive(Clone)]
pub struct Http2(http2::SendRequest<Full<Bytes>>);

impl Http2 {
    pub async fn send(&mut self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        self.0.ready().await.unwrap();
        self.0.send_request(request).await.unwrap()
    }
}

pub enum Client {
    One(http1::SendRequest<Full<Bytes>>),
    Two(Http2),
}

impl Client {
    pub async fn http1(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).await.unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self::One(sender)
    }

    pub async fn http2(to: SocketAddr) -> Http2 {
        let stream = TcpStream::connect(to).await.unwrap();
        let (sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Http2(sender)
    }

    /// Trusts that certificate and no other.
    pub async fn tls(to: SocketAddr, name: &str, alpn: &str, trusted: &str) -> std::io::Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(trusted.as_bytes()).unwrap()).unwrap();
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let stream = TcpStream::connect(to).await?;
        let stream = TokioIo::new(TlsConnector::from(Arc::new(config)).connect(name, stream).await?);
        Ok(if alpn == "h2" {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
            tokio::spawn(connection);
            Self::Two(Http2(sender))
        } else {
            let (sender, connection) = http1::handshake(stream).await.unwrap();
            tokio::spawn(connection);
            Self::One(sender)
        })
    }

    async fn send(&mut self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        match self {
            Self::One(sender) => {
                sender.ready().await.unwrap();
                sender.send_request(request).await.unwrap()
            }
            Self::Two(sender) => sender.send(request).await,
        }
    }

    /// By the host's name.
    pub async fn get(&mut self, uri: &str) -> (http::response::Parts, String) {
        let uri: http::Uri = uri.parse().unwrap();
        let mut request = Request::get(uri.clone()).body(Full::default()).unwrap();
        if matches!(self, Self::One(_)) {
            request.headers_mut().insert("host", uri.host().unwrap().parse().unwrap());
            *request.uri_mut() = uri.path().parse().unwrap();
        }
        text(self.send(request).await).await
    }

    /// By the headers.
    pub async fn ask(&mut self, sandbox: &str, port: u16, path: &str) -> Response<Incoming> {
        let request = Request::get(path)
            .header("host", "x")
            .header("e2b-sandbox-id", sandbox)
            .header("e2b-sandbox-port", port)
            .body(Full::default())
            .unwrap();
        self.send(request).await
    }

    pub async fn get_from(
        &mut self,
        sandbox: &str,
        port: u16,
        path: &str,
    ) -> (http::response::Parts, String) {
        text(self.ask(sandbox, port, path).await).await
    }
}

async fn text(answer: Response<Incoming>) -> (http::response::Parts, String) {
    let (head, body) = answer.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    (head, String::from_utf8(bytes.to_vec()).unwrap())
}
