//! An NFSv3 and MOUNTv3 server (RFC 1813) for the guest of one sandbox, over a listener inside its slot.
//!
//! The guest is hostile. It sees the exports that it was given and nothing else of the node: a file is named by a
//! handle of the kernel's ([open_by_handle_at(2)]) that carries a MAC of the export's key, names have no slash, no link is
//! followed, and each call is made with the file system's user and group of the caller, so that the kernel checks
//! permissions as it does for a local process. What a request may have is bounded before anything is
//! allocated for it. Handles stay good as long as their files do, across restarts of the node and pauses of the guest.
//!
//! [open_by_handle_at(2)]: https://man7.org/linux/man-pages/man2/open_by_handle_at.2.html

mod attributes;
mod call;
mod credentials;
mod directory;
mod export;
mod files;
mod handle;
mod mount;
mod procedures;
mod repeats;
mod request;
mod server;
mod status;
mod xdr;

pub use export::{Export, Limits, OpenError};
pub use handle::HandleKey;
#[doc(hidden)]
pub use request::parse_anything;
pub use server::{Server, serve};

#[cfg(test)]
mod tests;
