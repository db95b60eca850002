//! Connections out of the node for a guest: to what its policy let through and never to where no guest goes.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use ipnet::Ipv4Net;
use nidus_network::is_denied;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use crate::{Policy, PolicyError, ResolveError, Resolver, SocksProxy, host_name, socks};

/// How long a connection may take to stand, the proxy's and TLS's part included.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// A connection to where a guest wanted to go; by way of a proxy's TLS, if it has that.
pub type Upstream = Either<TcpStream, TlsStream<TcpStream>>;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name has no address that can be used.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// An address where no guest goes.
    #[error("{0} is in a range that no sandbox reaches")]
    Forbidden(Ipv4Addr),
    /// The connection failed.
    #[error("cannot connect to {to}: {source}")]
    Connect {
        /// To whom.
        to: String,
        /// Why not.
        source: io::Error,
    },
}

fn failed(to: impl ToString) -> impl FnOnce(io::Error) -> DialError {
    move |source| DialError::Connect { to: to.to_string(), source }
}

/// Opens connections.
pub struct Dialer {
    pub resolver: Resolver,
    /// The node's resolvers.
    pub dns: Vec<SocketAddr>,
    /// Ranges that the node's owner opened.
    pub allowed_private: Vec<Ipv4Net>,
    /// Ranges that stay closed whatever the owner opened: the slots' own.
    pub never: Vec<Ipv4Net>,
    pub roots: Arc<RootCertStore>,
    pub provider: Arc<CryptoProvider>,
}

impl Dialer {
    /// Whether no guest may be connected to an address: what is always denied, other sandboxes, and the node.
    pub fn forbidden(&self, ip: Ipv4Addr) -> bool {
        is_denied(ip, &self.allowed_private) || self.never.iter().any(|n| n.contains(&ip)) || is_own(ip)
    }

    /// Connects to an address.
    pub async fn address(&self, policy: &Policy, to: SocketAddrV4) -> Result<Upstream, DialError> {
        if self.forbidden(*to.ip()) {
            return Err(DialError::Forbidden(*to.ip()));
        }
        let connecting = async {
            match policy.proxy() {
                None => Ok(Either::Left(direct(to).await?)),
                Some(proxy) => self.by_proxy(proxy, to).await,
            }
        };
        match timeout(CONNECT_TIME, connecting).await {
            Ok(done) => done,
            Err(_) => Err(failed(to)(io::ErrorKind::TimedOut.into())),
        }
    }

    /// Connects to one of the addresses of a name.
    pub async fn name(&self, policy: &Policy, host: &str, port: u16) -> Result<Upstream, DialError> {
        let servers = policy.dns_servers().unwrap_or(&self.dns);
        let mut last = DialError::from(ResolveError::Forbidden(host.to_owned()));
        for ip in self.resolver.addresses(host, servers).await? {
            match self.address(policy, SocketAddrV4::new(ip, port)).await {
                Ok(stream) => return Ok(stream),
                Err(DialError::Forbidden(_)) => {}
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    /// TLS to a host, verified.
    pub async fn tls<S>(&self, stream: S, host: &str, alpn: &[&[u8]]) -> Result<TlsStream<S>, DialError>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    {
        match timeout(CONNECT_TIME, self.handshake(stream, host, self.roots.clone(), alpn)).await {
            Ok(done) => done.map_err(failed(host)),
            Err(_) => Err(failed(host)(io::ErrorKind::TimedOut.into())),
        }
    }

    async fn handshake<S>(
        &self,
        stream: S,
        name: &str,
        roots: Arc<RootCertStore>,
        alpn: &[&[u8]],
    ) -> io::Result<TlsStream<S>>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(name.to_owned())
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }

    /// The addresses of a proxy that may be used; the name is looked up each time, and what is found is used.
    async fn proxy_address(&self, proxy: &SocksProxy) -> Result<(String, SocketAddrV4), DialError> {
        let wrong =
            || failed(&proxy.address)(io::Error::new(io::ErrorKind::InvalidInput, "it is not HOST:PORT"));
        let (host, port) = proxy.address.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().map_err(|_| wrong())?;
        let addresses = match host.parse::<Ipv4Addr>() {
            Ok(ip) => vec![ip],
            Err(_) => {
                let name = host_name(host).ok_or_else(wrong)?;
                self.resolver.addresses(&name, &self.dns).await?
            }
        };
        match addresses.into_iter().find(|ip| !self.forbidden(*ip)) {
            Some(ip) => Ok((host.to_owned(), SocketAddrV4::new(ip, port))),
            None => Err(ResolveError::Forbidden(host.to_owned()).into()),
        }
    }

    async fn by_proxy(&self, proxy: &SocksProxy, to: SocketAddrV4) -> Result<Upstream, DialError> {
        let (host, address) = self.proxy_address(proxy).await?;
        let mut stream = direct(address).await?;
        let wrap = || failed(format!("{to} by the egress proxy {}", proxy.address));
        let Some(tls) = &proxy.tls else {
            socks::connect(&mut stream, proxy, to).await.map_err(wrap())?;
            return Ok(Either::Left(stream));
        };
        let roots = if tls.ca_cert.is_empty() {
            self.roots.clone()
        } else {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(CertificateDer::pem_slice_iter(tls.ca_cert.as_bytes()).flatten());
            Arc::new(roots)
        };
        let name = if tls.server_name.is_empty() { &host } else { &tls.server_name };
        let mut stream = self.handshake(stream, name, roots, &[]).await.map_err(wrap())?;
        socks::connect(&mut stream, proxy, to).await.map_err(wrap())?;
        Ok(Either::Right(stream))
    }

    /// Whether what a policy needs outside of the node is there.
    ///
    /// # Errors
    /// When its proxy has no address, or only ones where no sandbox goes.
    pub async fn admit(&self, policy: &Policy) -> Result<(), PolicyError> {
        let Some(proxy) = policy.proxy() else { return Ok(()) };
        match self.proxy_address(proxy).await {
            Ok(_) => Ok(()),
            Err(e) => Err(PolicyError::Proxy { address: proxy.address.clone(), why: e.to_string() }),
        }
    }
}

async fn direct(to: SocketAddrV4) -> Result<TcpStream, DialError> {
    let stream = TcpStream::connect(to).await.map_err(failed(to))?;
    prepare(&stream);
    Ok(stream)
}

/// Small writes go at once, and a peer that is gone is noticed.
pub fn prepare(stream: &TcpStream) {
    let alive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15));
    let socket = socket2::SockRef::from(stream);
    if let Err(e) = socket.set_tcp_nodelay(true).and_then(|()| socket.set_tcp_keepalive(&alive)) {
        tracing::debug!("socket options of a flow: {e}");
    }
}

/// Whether an address is the node's own: then the kernel would speak to it from itself.
fn is_own(ip: Ipv4Addr) -> bool {
    let source = || -> io::Result<SocketAddr> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        // Sends nothing: it looks the route up.
        socket.connect((ip, 9))?;
        socket.local_addr()
    };
    source().is_ok_and(|from| from.ip() == ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_own_addresses_are_known() {
        assert!(is_own(Ipv4Addr::LOCALHOST));
        assert!(!is_own(Ipv4Addr::new(203, 0, 113, 200)));
    }
}
