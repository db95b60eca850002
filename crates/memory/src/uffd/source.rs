//! Where the content of pages comes from.

use std::{io, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

/// Whence a page's bytes came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// From this machine.
    Cache,
    /// From the object store, or whatever is behind the cache.
    Storage,
}

/// What a source can say of a page at once.
#[derive(Debug)]
pub enum Cached<'a> {
    /// All its bytes are zero.
    Zero,
    /// Its bytes, in the caller's buffer or in memory of the source.
    Bytes(&'a [u8]),
    /// It must be fetched.
    Miss,
}

/// What a source has read.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// The bytes. Fewer than asked for count as a failed read, to be tried again.
    pub bytes: Content,
    /// Whence they came.
    pub origin: Origin,
}

/// The content of pages.
#[derive(Debug, Clone)]
pub enum Content {
    /// Zeros, as many as asked for.
    Zero,
    /// These bytes.
    Bytes(Bytes),
}

/// Why a page cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Reading failed; another attempt may succeed.
    #[error("{0}")]
    Read(#[from] io::Error),
    /// There is no use in trying again.
    #[error("{0}")]
    Permanent(Box<dyn std::error::Error + Send + Sync>),
    /// There were fewer bytes than there should be.
    #[error("the read was short: {got} of {wanted} bytes")]
    Short {
        /// How many bytes came.
        got: usize,
        /// How many should have come.
        wanted: usize,
    },
    /// No answer came in time.
    #[error("no answer within {0:?}")]
    Stalled(Duration),
}

/// The memory that a guest had when its template or snapshot was made.
///
/// The content does not change while it is served. One source can serve many VMs at once.
#[async_trait]
pub trait PageSource: Send + Sync + 'static {
    /// The size of the memory in bytes: whole pages.
    fn size(&self) -> u64;

    /// What is known of the `len` bytes at `at`, without waiting for any device: one page, or, to
    /// map several neighbours at once, several pages of which it then gives all (never
    /// [`Cached::Zero`]) or says [`Cached::Miss`]. `buffer` has `len` bytes and can be used for
    /// the answer. The caller asks for what lies within [`size`](Self::size).
    fn cached<'a>(&'a self, at: u64, len: usize, buffer: &'a mut [u8]) -> Cached<'a>;

    /// Reads one page of `len` bytes at `at`, with whatever waiting that takes. It can be dropped
    /// at any time, and tried again.
    async fn fetch(&self, at: u64, len: usize) -> Result<Fetched, SourceError>;
}
