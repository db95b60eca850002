//! Why something about the network could not be done.

use std::io;

/// Error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A system call or file operation.
    #[error("Cannot {action}: {source}")]
    Io {
        /// What was being done, and to what.
        action: String,
        /// The cause.
        source: io::Error,
    },
    /// A netlink request.
    #[error("Cannot {action}: {source}")]
    Netlink {
        /// What was being done, and to what.
        action: String,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
    /// The nft program is missing.
    #[error("nft was not found. Install it: apt-get install nftables")]
    NftMissing,
    /// nft refused a ruleset.
    #[error("nft refused the rules of {what}: {message}")]
    Nft {
        /// Namespace or table.
        what: String,
        /// Its error output.
        message: String,
    },
    /// Every slot is in use.
    #[error("all {0} network slots are in use")]
    Exhausted(u32),
    /// The pool has been shut down.
    #[error("the network pool is shut down")]
    Closed,
    /// The slot's tenant is gone.
    #[error("the network slot was given back")]
    Released,
    /// A slot that was used is not as it was when it was made.
    #[error("the network slot {slot} is not clean: {what}")]
    NotClean {
        /// Its namespace.
        slot: String,
        /// What is there, or is not.
        what: String,
    },
    /// The configured ranges do not hold the slots.
    #[error("bad network configuration: {0}")]
    Config(String),
}

impl NetworkError {
    pub(crate) fn io(action: impl Into<String>, source: io::Error) -> Self {
        Self::Io { action: action.into(), source }
    }

    pub(crate) fn last(action: impl Into<String>) -> Self {
        Self::io(action, io::Error::last_os_error())
    }
}
