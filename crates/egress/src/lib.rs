//! What a sandbox may reach beyond what the kernel can tell: names, headers in requests, DNS, an upstream proxy.
//!
//! Each slot has listeners inside its own namespace ([`nidus_network::GatewaySockets`]); the kernel redirects
//! to them what a [`Policy`] wants looked at, and only that ([`Policy::kernel_rules`]). Who calls is known by the
//! listener. The rest goes through the kernel alone.
//!
//! A flow that its name lets through is connected to an address that the node itself resolves, never to the one
//! that the guest gave: neither its DNS nor its /etc/hosts can lead a name elsewhere.

mod ca;
mod counters;
mod dial;
mod dns;
mod flows;
mod forward;
mod gateway;
mod intercept;
mod names;
mod policy;
mod sniff;
mod socks;
mod tcp;

pub use ca::CaError;
pub use counters::CounterSnapshot;
pub use dns::{Asked, ResolveError, Resolver, datagram, parse_question, reply};
pub use gateway::{Gateway, GatewayConfig, GatewayError, Services, SlotGateway};
pub use names::host_name;
pub use policy::{EgressConfig, Policy, PolicyError, ProxyTls, SocksProxy, Verdict};
pub use sniff::{Sniffed, sniff};
