//! Why a volume could not do what it was asked for.

use std::io;

/// Why a volume could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// No volume of this id is here.
    #[error("there is no volume {0}")]
    NoVolume(String),
    /// Nothing is at the path.
    #[error("path {0} not found")]
    NotFound(String),
    /// Something is at the path already.
    #[error("path {0} already exists")]
    Exists(String),
    /// A file was asked for, and this is something else.
    #[error("path {0} is not a file")]
    NotAFile(String),
    /// A directory was asked for, and this is something else.
    #[error("path {0} is not a directory")]
    NotADirectory(String),
    /// The volume itself is not removed by a path.
    #[error("the root of a volume cannot be removed")]
    Root,
    /// No path.
    #[error("the path is not valid: {0}")]
    Path(&'static str),
    /// More levels than are gone through.
    #[error("a depth of {0} is out of range: it is from 1 to {1}")]
    Depth(u32, u32),
    /// A directory has more entries than are listed at once, or a file more bytes than it may.
    #[error("{what} has more than {limit} {unit}")]
    TooMuch {
        /// What is too large.
        what: String,
        /// The most that there may be.
        limit: u64,
        /// Of what.
        unit: &'static str,
    },
    /// The disk has no space left.
    #[error("there is no space left for {0}")]
    NoSpace(String),
    /// The file system failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what, as the client calls it.
        path: String,
        /// The cause.
        source: io::Error,
    },
}

impl VolumeError {
    /// From what the system said of a path.
    pub(crate) fn of(action: &'static str, path: &str, e: rustix::io::Errno) -> Self {
        use rustix::io::Errno;
        let path = path.to_owned();
        match e {
            Errno::NOENT | Errno::LOOP => Self::NotFound(path),
            Errno::NOTDIR => Self::NotADirectory(path),
            Errno::EXIST | Errno::NOTEMPTY => Self::Exists(path),
            Errno::ISDIR => Self::NotAFile(path),
            Errno::NAMETOOLONG => Self::Path("a name in it is too long"),
            Errno::NOSPC | Errno::DQUOT => Self::NoSpace(path),
            e => Self::Io { action, path, source: e.into() },
        }
    }
}
