//! One connection, from the greeting to its end.

use std::{fmt, io, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    HandshakeError,
    handshake::{Agreed, handshake},
    transmission::transmit,
};
use crate::BlockDevice;

/// A client that has not chosen an export by then is sent away.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Enough for a burst of small writes.
const READ_BUFFER: usize = 64 << 10;

/// A device under a name. The empty name asks for it too: it is the server's only one.
#[derive(Clone)]
pub struct Export {
    name: Arc<str>,
    device: Arc<dyn BlockDevice>,
}

impl Export {
    /// Offers `device` under `name`.
    pub fn new(name: impl Into<Arc<str>>, device: Arc<dyn BlockDevice>) -> Self {
        Self { name: name.into(), device }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    pub(super) fn is_named(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export").field("name", &self.name).field("size", &self.device.size()).finish()
    }
}

/// Why a connection ended other than by the client's wish.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No export was agreed on.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The handshake took too long.
    #[error("the client did not finish the handshake in {} s", HANDSHAKE_TIME.as_secs())]
    HandshakeTimeout,
    /// The connection failed.
    #[error("the connection was lost: {0}")]
    Io(#[from] io::Error),
    /// A request did not begin with the request magic: what follows cannot be made sense of.
    #[error("the client sent a request without the request magic")]
    BadMagic,
    /// A write of more bytes than a client may send.
    #[error("the client sent a write of {0} bytes")]
    WriteTooLong(u32),
}

/// Serves `export` to one client until the client leaves, breaks the protocol, or `stop` is
/// cancelled; in each case the requests that are in flight are finished and answered first.
///
/// A client that does not take its answers holds this up for as long as it likes: to end it then,
/// drop the future.
pub async fn serve<R, W>(
    reader: R,
    mut writer: W,
    export: &Export,
    stop: &CancellationToken,
) -> Result<(), SessionError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut reader = BufReader::with_capacity(READ_BUFFER, reader);
    let agreed = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        agreed = timeout(HANDSHAKE_TIME, handshake(&mut reader, &mut writer, export)) => agreed,
    };
    match agreed.map_err(|_| SessionError::HandshakeTimeout)?? {
        Some(agreed) => transmit(reader, writer, export.device().clone(), agreed, stop).await,
        None => Ok(()),
    }
}

/// Like [`serve`], for a client that begins with the transmission phase and takes simple replies, as
/// the kernel does: what a handshake agrees on is settled when the device is attached.
pub async fn serve_transmission<R, W>(
    reader: R,
    writer: W,
    export: &Export,
    stop: &CancellationToken,
) -> Result<(), SessionError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let reader = BufReader::with_capacity(READ_BUFFER, reader);
    transmit(reader, writer, export.device().clone(), Agreed { structured: false }, stop).await
}
