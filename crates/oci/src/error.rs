use std::path::Path;

use crate::tree::TreeError;

/// Why an image could not be had.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// Not the name of an image.
    #[error("'{name}' is not an image reference: {reason}")]
    BadReference {
        /// What was given.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Credentials that cannot be used.
    #[error("the registry's credentials cannot be used: {0}")]
    BadCredentials(String),
    /// A host that may not be asked.
    #[error(
        "the registry {host} {reason}; the host's owner may allow it: registries = {{ \"{host}\" = ... }} in the configuration"
    )]
    HostDenied {
        /// Host and port.
        host: String,
        /// Why not.
        reason: &'static str,
    },
    /// The registry cannot be reached.
    #[error("cannot reach the registry {host}: {reason}")]
    Unreachable {
        /// Host and port.
        host: String,
        /// The chain of causes.
        reason: String,
    },
    /// It wants other credentials, or hides the image.
    #[error(
        "the registry {host} refuses access to {what} ({status}): is it public, are the credentials right?"
    )]
    Unauthorized {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// HTTP status.
        status: u16,
    },
    /// No such image.
    #[error("the image {0} was not found in its registry")]
    NotFound(String),
    /// An answer that is no answer.
    #[error("the registry {host} answered {status} for {what}: {text}")]
    Answer {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// HTTP status.
        status: u16,
        /// Beginning of the body.
        text: String,
    },
    /// An index without an image for this machine.
    #[error("the image {image} has nothing for {wanted}; it has {found}")]
    NoPlatform {
        /// Image.
        image: String,
        /// As `linux/amd64`.
        wanted: String,
        /// What there is.
        found: String,
    },
    /// A document or a layer that is not what its digest says.
    #[error("{what} does not have the digest that the image gives it: expected {expected}, got {found}")]
    Digest {
        /// What was fetched.
        what: String,
        /// By the image.
        expected: String,
        /// Of what came.
        found: String,
    },
    /// A document that cannot be read.
    #[error("{what} cannot be read: {reason}")]
    Malformed {
        /// Document or layer.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// More than an image may have.
    #[error("the image is too large: {0}")]
    TooLarge(String),
    /// An entry of a layer that would not stay inside, or makes no sense.
    #[error("layer {layer}: {source}")]
    Entry {
        /// Number of the layer, from 1.
        layer: usize,
        /// The cause.
        #[source]
        source: TreeError,
    },
    /// A file operation.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was being done, and to what.
        action: String,
        /// The cause.
        source: std::io::Error,
    },
    /// Cancelled by its caller.
    #[error("cancelled")]
    Cancelled,
}

impl OciError {
    pub(crate) fn io(action: &str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action: format!("{action} {}", path.display()), source }
    }

    pub(crate) fn malformed(what: impl Into<String>, reason: impl ToString) -> Self {
        Self::Malformed { what: what.into(), reason: reason.to_string() }
    }
}
