//! An NBD server for one device on a unix socket, and the kernel's NBD devices ([`kernel`]).
//!
//! It speaks the fixed newstyle handshake and both simple and structured replies, as in the
//! protocol's specification (`doc/proto.md` of the NetworkBlockDevice/nbd repository); section
//! names in comments refer to it. Several requests of a connection are worked on at once, and
//! answered in the order in which they finish.
//!
//! The client is hostile. A connection has at most 64 requests and 32 MiB of their data in memory,
//! a server at most 16 connections; a connection that breaks the protocol is closed.

mod buffer;
mod handshake;
mod input;
pub mod kernel;
mod pace;
mod patience;
mod reply;
mod server;
mod session;
mod slow;
mod transmission;
pub mod wire;

pub use handshake::HandshakeError;
pub use server::{NbdServer, ServerError, SocketAccess};
pub use session::{Export, SessionError, serve, serve_transmission};
