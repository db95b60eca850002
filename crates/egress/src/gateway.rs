//! The gateway of a node, and each slot's part of it.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::Ipv4Net;
use nidus_network::GatewaySockets;
use parking_lot::Mutex;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ca::{Ca, CaError};
use crate::counters::{CounterSnapshot, Counters};
use crate::dial::Dialer;
use crate::flows::Flows;
use crate::{Policy, PolicyError, Resolver, forward, tcp};

/// How long the names of a policy may take to be looked up before it comes into force.
const LOOK_UP_TIME: Duration = Duration::from_millis(500);
/// Names that are looked up then.
const MAX_LOOKED_UP: usize = 64;
/// Names whose addresses are remembered of one sandbox.
const MAX_LEARNED: usize = 1024;

/// How a node's gateway works.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Resolvers for guests whose policy names none.
    pub dns: Vec<SocketAddr>,
    /// PEM certificates that are trusted beside the system's when a rule's host is connected to.
    pub extra_roots: Option<PathBuf>,
    /// Ranges of those that are always denied which the node's owner opened.
    pub allowed_private: Vec<Ipv4Net>,
    /// Ranges that stay closed whatever was opened: where the slots are.
    pub never: Vec<Ipv4Net>,
    /// Where the node's certificate authority is kept.
    pub ca_folder: PathBuf,
    /// Flows of one sandbox at once.
    pub max_connections: usize,
    /// Questions of one sandbox at once.
    pub max_questions: usize,
}

/// Why there is no gateway.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// Its certificate authority.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// Certificates that shall be trusted.
    #[error("cannot read certificates from {}: {why}", path.display())]
    Roots {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: String,
    },
}

/// The gateway of a node.
pub struct Gateway {
    pub(crate) ca: Ca,
    pub(crate) counters: Counters,
    dialer: Dialer,
    config: GatewayConfig,
}

/// What the tasks of one slot share.
pub(crate) struct Slot {
    pub gateway: Arc<Gateway>,
    pub flows: Arc<Flows>,
    pub connections: Arc<Semaphore>,
    pub questions: Arc<Semaphore>,
    pub stop: CancellationToken,
    pub tracker: TaskTracker,
    /// Addresses that allowed names were said to have.
    learned: Mutex<HashMap<String, Vec<Ipv4Addr>>>,
}

impl Slot {
    pub fn dialer(&self) -> &Dialer {
        &self.gateway.dialer
    }

    pub fn counters(&self) -> &Counters {
        &self.gateway.counters
    }

    /// The next connection of the guest; `None` when the slot is closed.
    pub async fn accept(&self, listener: &TcpListener) -> Option<TcpStream> {
        loop {
            match self.stop.run_until_cancelled(listener.accept()).await? {
                Ok((stream, _)) => return Some(stream),
                Err(e) => {
                    tracing::debug!("accept a guest's connection: {e}");
                    // Too many open files, say: others must end first.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    pub fn learn(&self, host: String, addresses: Vec<Ipv4Addr>) {
        let mut learned = self.learned.lock();
        if learned.len() < MAX_LEARNED || learned.contains_key(&host) {
            learned.insert(host, addresses);
        }
    }
}

/// A slot's listeners that are not the gateway's own.
pub struct Services {
    /// Hyperloop's.
    pub hyperloop: TcpListener,
    /// Of the guest's volumes.
    pub volumes: TcpListener,
}

/// One sandbox's part of the gateway. Closed before its slot is given back.
pub struct SlotGateway {
    slot: Arc<Slot>,
}

impl Gateway {
    /// Opens the node's certificate authority, and reads whom to trust.
    ///
    /// # Errors
    /// When files cannot be used.
    pub fn new(config: GatewayConfig) -> Result<Arc<Self>, GatewayError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(system.certs);
        if let Some(path) = &config.extra_roots {
            let wrong = |why: String| GatewayError::Roots { path: path.clone(), why };
            let read = CertificateDer::pem_file_iter(path).map_err(|e| wrong(e.to_string()))?;
            let extra = read.collect::<Result<Vec<_>, _>>().map_err(|e| wrong(e.to_string()))?;
            if extra.is_empty() {
                return Err(wrong("there is none in it".to_owned()));
            }
            for certificate in extra {
                roots.add(certificate).map_err(|e| wrong(e.to_string()))?;
            }
        }
        let dialer = Dialer {
            resolver: Resolver::default(),
            dns: config.dns.clone(),
            allowed_private: config.allowed_private.clone(),
            never: config.never.clone(),
            roots: Arc::new(roots),
            provider: provider.clone(),
        };
        let ca = Ca::open(&config.ca_folder, provider)?;
        Ok(Arc::new(Self { ca, counters: Counters::default(), dialer, config }))
    }

    /// The certificate that guests must trust whose policy needs it ([`Policy::needs_ca`]).
    pub fn ca_pem(&self) -> &str {
        self.ca.pem()
    }

    /// Ranges that the node's owner opened.
    pub fn allowed_private(&self) -> &[Ipv4Net] {
        &self.config.allowed_private
    }

    /// What it did up to now.
    pub fn counters(&self) -> CounterSnapshot {
        self.counters.snapshot()
    }

    /// Whether what a policy needs outside of the node is there.
    ///
    /// # Errors
    /// When its egress proxy has no address that can be used.
    pub async fn admit(&self, policy: &Policy) -> Result<(), PolicyError> {
        self.dialer.admit(policy).await
    }

    /// Serves a slot's sockets for the sandbox that has it now. `services` serves the listeners that are not its own.
    ///
    /// # Errors
    /// When the sockets cannot be watched.
    pub fn serve<F>(
        self: &Arc<Self>,
        sockets: GatewaySockets,
        policy: Policy,
        services: impl FnOnce(Services, CancellationToken) -> F,
    ) -> io::Result<SlotGateway>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let slot = Arc::new(Slot {
            gateway: self.clone(),
            flows: Arc::new(Flows::new(policy)),
            connections: Arc::new(Semaphore::new(self.config.max_connections)),
            questions: Arc::new(Semaphore::new(self.config.max_questions)),
            stop: CancellationToken::new(),
            tracker: TaskTracker::new(),
            learned: Mutex::default(),
        });
        let tcp = TcpListener::from_std(sockets.tcp)?;
        let dns_udp = UdpSocket::from_std(sockets.dns_udp)?;
        let dns_tcp = TcpListener::from_std(sockets.dns_tcp)?;
        let others = Services {
            hyperloop: TcpListener::from_std(sockets.hyperloop)?,
            volumes: TcpListener::from_std(sockets.volumes)?,
        };
        slot.tracker.spawn(tcp::serve(slot.clone(), tcp));
        slot.tracker.spawn(forward::serve_udp(slot.clone(), dns_udp));
        slot.tracker.spawn(forward::serve_tcp(slot.clone(), dns_tcp));
        slot.tracker.spawn(services(others, slot.stop.clone()));
        slot.tracker.close();
        Ok(SlotGateway { slot })
    }
}

impl SlotGateway {
    /// Puts another policy in force: flows that it does not allow are cut, others go on.
    pub fn update(&self, policy: Policy) {
        let cut = self.slot.flows.replace(policy);
        tracing::debug!(cut, "a policy was replaced");
    }

    /// The addresses of a policy's allowed names, as far as they can be told within half a second: of flows that
    /// went there before names counted.
    pub async fn addresses_of(&self, policy: &Policy) -> Vec<Ipv4Net> {
        let mut found: Vec<Ipv4Addr> = {
            let learned = self.slot.learned.lock();
            learned
                .iter()
                .filter(|(host, _)| policy.allows_name(host))
                .flat_map(|(_, ips)| ips.clone())
                .collect()
        };
        let mut asking = JoinSet::new();
        for name in policy.exact_names().take(MAX_LOOKED_UP) {
            let (slot, name, policy) = (self.slot.clone(), name.to_owned(), policy.clone());
            asking.spawn(async move {
                let servers = policy.dns_servers().unwrap_or(&slot.dialer().dns);
                slot.dialer().resolver.addresses(&name, servers).await.unwrap_or_default()
            });
        }
        let until = tokio::time::Instant::now() + LOOK_UP_TIME;
        while let Ok(Some(answer)) = tokio::time::timeout_at(until, asking.join_next()).await {
            found.extend(answer.unwrap_or_default());
        }
        found.retain(|ip| !self.slot.dialer().forbidden(*ip));
        Ipv4Net::aggregate(&found.into_iter().map(Ipv4Net::from).collect())
    }

    /// Ends every flow, and all that serves the slot.
    pub async fn close(self) {
        self.slot.stop.cancel();
        self.slot.tracker.wait().await;
    }
}

impl Drop for SlotGateway {
    fn drop(&mut self) {
        self.slot.stop.cancel();
    }
}
