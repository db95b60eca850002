//! HTTP and WebSocket reverse proxy to sandboxes.
//!
//! A request names its target by the headers `E2b-Sandbox-Id` and `E2b-Sandbox-Port` or by its host
//! name, `{port}-{sandboxID}.{domain}`. Clients speak HTTP/1.1 or HTTP/2 without TLS on one port;
//! guests are spoken to in HTTP/1.1, over connections that are kept and never shared between two
//! sandboxes. Bodies stream both ways, unbuffered; upgrades (WebSocket) become plain tunnels.
//! When a sandbox ends, every connection to it is closed.

/// The port of envd in every guest. Its own token protects it, and its control paths are the
/// host's alone.
const ENVD_PORT: u16 = 49983;

mod catalog;
mod forward;
mod reply;
mod server;
mod streamed;
mod target;
mod tls;
mod unread;
mod upgrade;
mod upstream;

pub use catalog::{Catalog, InProcessCatalog, Route};
pub use server::{Listeners, ProxyConfig, serve};
pub use target::{Target, TargetError};
pub use tls::{Certificate, CertificateError};
