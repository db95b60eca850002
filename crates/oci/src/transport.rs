//! HTTP to registries, with a say in which hosts may be asked.
//!
//! Who asks for an image names the registry, and is not trusted with what this host can reach: addresses
//! that a sandbox may not reach are refused here too, in the first request and in every redirect, by
//! the address that is connected to. The host's owner lists the exceptions.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use reqwest::{Client, RequestBuilder, Response};
use serde::{Deserialize, Serialize};
use url::Url;

use crate::OciError;

/// Longest time without a byte.
const READ_LIMIT: Duration = Duration::from_secs(60);
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
const MAX_REDIRECTS: usize = 5;
/// Where Docker's registry is.
const DOCKER: (&str, &str) = ("docker.io", "registry-1.docker.io");

/// What the host's owner says of one registry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegistryHost {
    /// Asked in its place: `HOST[:PORT]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror: Option<String>,
    /// It is spoken to without TLS.
    pub plain_http: bool,
    /// It may have a private address.
    pub private: bool,
}

/// Settings of all registries.
#[derive(Clone)]
pub struct RegistrySettings {
    /// By host, with the port if there is one.
    pub hosts: BTreeMap<String, RegistryHost>,
    /// Which addresses are refused.
    pub is_denied: Denies,
}

/// Says of an address whether it is refused.
pub type Denies = Arc<dyn Fn(IpAddr) -> bool + Send + Sync>;

/// A client and where it may go.
#[derive(Clone)]
pub(crate) struct Transport {
    settings: Arc<RegistrySettings>,
    /// For hosts anywhere, and for those that may be private.
    public: Client,
    private: Client,
}

struct PublicOnly(Denies);

impl Resolve for PublicOnly {
    fn resolve(&self, name: Name) -> Resolving {
        let is_denied = self.0.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let good: Vec<SocketAddr> = found.filter(|a| !is_denied(a.ip())).collect();
            if good.is_empty() {
                return Err(Denied.into());
            }
            Ok(Box::new(good.into_iter()) as Addrs)
        })
    }
}

#[derive(Debug, thiserror::Error)]
#[error("it has a private address")]
struct Denied;

/// Whether the URL names a denied address itself; names are looked at when they are resolved.
fn names_denied(url: &Url, is_denied: &Denies) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(ip)) => is_denied(ip.into()),
        Some(url::Host::Ipv6(ip)) => is_denied(ip.into()),
        _ => false,
    }
}

impl Transport {
    pub fn new(settings: RegistrySettings) -> Result<Self, OciError> {
        // An error says that one is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let is_denied = settings.is_denied.clone();
        let base = || {
            Client::builder()
                .user_agent(concat!("nidus/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(CONNECT_LIMIT)
                .read_timeout(READ_LIMIT)
        };
        let public = base().dns_resolver(Arc::new(PublicOnly(is_denied.clone()))).redirect(Policy::custom(
            move |attempt| {
                if attempt.previous().len() > MAX_REDIRECTS {
                    return attempt.error("too many redirects");
                }
                if names_denied(attempt.url(), &is_denied) {
                    return attempt.error(Denied);
                }
                attempt.follow()
            },
        ));
        let private = base().redirect(Policy::limited(MAX_REDIRECTS));
        let build = |b: reqwest::ClientBuilder| {
            b.build().map_err(|e| OciError::Io {
                action: "make a client for registries".into(),
                source: std::io::Error::other(e),
            })
        };
        Ok(Self { public: build(public)?, private: build(private)?, settings: Arc::new(settings) })
    }

    fn host(&self, host: &str) -> RegistryHost {
        self.settings.hosts.get(host).cloned().unwrap_or_default()
    }

    /// Where the repositories of `host` are, and what is asked for them.
    pub fn registry(&self, host: &str) -> Result<(Endpoint, Url), OciError> {
        let mirror = self.host(host).mirror;
        let default = if host == DOCKER.0 { DOCKER.1 } else { host };
        let name = mirror.as_deref().unwrap_or(default).to_owned();
        let own = self.host(&name);
        let scheme = if own.plain_http { "http" } else { "https" };
        let url = format!("{scheme}://{name}/v2/");
        let url = Url::parse(&url).map_err(|_| OciError::BadReference {
            name: name.clone(),
            reason: "the registry's name is none",
        })?;
        let endpoint = self.endpoint(name, &url, own.private)?;
        Ok((endpoint, url))
    }

    /// Any other server that a registry sends us to, such as the one that gives tokens.
    pub fn other(&self, url: &Url) -> Result<Endpoint, OciError> {
        let port = url.port().map(|p| format!(":{p}")).unwrap_or_default();
        let name = format!("{}{port}", url.host_str().unwrap_or_default());
        let own = self.host(&name);
        if url.scheme() != "https" && !own.plain_http {
            return Err(OciError::HostDenied { host: name, reason: "wants to be asked without TLS" });
        }
        self.endpoint(name, url, own.private)
    }

    fn endpoint(&self, host: String, url: &Url, private: bool) -> Result<Endpoint, OciError> {
        if !private && names_denied(url, &self.settings.is_denied) {
            return Err(OciError::HostDenied { host, reason: "has a private address" });
        }
        let client = if private { self.private.clone() } else { self.public.clone() };
        Ok(Endpoint { host, client })
    }
}

/// A server that may be asked.
#[derive(Clone)]
pub(crate) struct Endpoint {
    /// For messages.
    pub host: String,
    client: Client,
}

impl Endpoint {
    pub fn get(&self, url: Url) -> RequestBuilder {
        self.client.get(url)
    }

    pub fn post(&self, url: Url) -> RequestBuilder {
        self.client.post(url)
    }

    pub async fn send(&self, request: RequestBuilder) -> Result<Response, OciError> {
        request.send().await.map_err(|e| self.failed(&e))
    }

    pub fn failed(&self, e: &reqwest::Error) -> OciError {
        let mut reason = e.to_string();
        let mut cause = e.source();
        while let Some(e) = cause {
            if e.is::<Denied>() {
                return OciError::HostDenied { host: self.host.clone(), reason: "has a private address" };
            }
            reason = e.to_string();
            cause = e.source();
        }
        OciError::Unreachable { host: self.host.clone(), reason }
    }

    /// A body of at most `limit` bytes.
    pub async fn body(&self, mut response: Response, what: &str, limit: usize) -> Result<Vec<u8>, OciError> {
        let mut body = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|e| self.failed(&e))? {
            if body.len() + piece.len() > limit {
                return Err(OciError::TooLarge(format!("{what} has more than {limit} bytes")));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }
}
