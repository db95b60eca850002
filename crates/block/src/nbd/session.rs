//! One connection, from the greeting to its end.

use std::net::Shutdown;
use std::{fmt, io, sync::Arc, thread, time::Duration};

use tokio::{io::BufReader, net::UnixStream, runtime::Handle, sync::oneshot, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::Span;

use super::{
    HandshakeError,
    handshake::{Agreed, handshake},
    slow::Context,
    transmission::Transmission,
};
use crate::BlockDevice;

/// A client that has not chosen an export by then is sent away.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// The stack of a connection's thread, of which it uses little.
const STACK: usize = 256 << 10;

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
    /// The system has no thread for the connection.
    #[error("cannot start a thread for the connection: {0}")]
    Thread(io::Error),
    /// The device panicked.
    #[error("the device failed in an unforeseen way; the connection was closed")]
    Panicked,
    /// A write of more bytes than a client may send.
    #[error("the client sent a write of {0} bytes")]
    WriteTooLong(u32),
}

/// Serves `export` to one client until the client leaves, breaks the protocol, or `stop` is
/// cancelled; in each case the requests that have arrived are finished and answered first.
///
/// A client that does not take its answers holds this up for as long as it likes: to end it then,
/// drop the future.
pub async fn serve(
    mut stream: UnixStream,
    export: &Export,
    stop: &CancellationToken,
) -> Result<(), SessionError> {
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader);
    let agreed = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        agreed = timeout(HANDSHAKE_TIME, handshake(&mut reader, &mut writer, export)) => agreed,
    };
    match agreed.map_err(|_| SessionError::HandshakeTimeout)?? {
        Some(agreed) => {
            let early = reader.buffer().to_vec();
            transmit(stream, &early, export, agreed, stop).await
        }
        None => Ok(()),
    }
}

/// Like [`serve`], for a client that begins with the transmission phase and takes simple replies, as
/// the kernel does: what a handshake agrees on is settled when the device is attached.
pub async fn serve_transmission(
    stream: UnixStream,
    export: &Export,
    stop: &CancellationToken,
) -> Result<(), SessionError> {
    transmit(stream, &[], export, Agreed { structured: false }, stop).await
}

/// Runs the transmission phase on a thread of its own.
async fn transmit(
    stream: UnixStream,
    early: &[u8],
    export: &Export,
    agreed: Agreed,
    stop: &CancellationToken,
) -> Result<(), SessionError> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    let hangup = Hangup(stream.try_clone()?);
    let context = Context::new(export.device().clone(), agreed.structured);
    let transmission = Transmission::new(stream, early, context, Handle::current())?;
    let (tell, mut end) = oneshot::channel();
    let span = Span::current();
    let run = move || {
        let _entered = span.enter();
        // Nobody listens if the future was dropped.
        let _ = tell.send(transmission.run());
    };
    thread::Builder::new().name("nbd".into()).stack_size(STACK).spawn(run).map_err(SessionError::Thread)?;
    let ended = tokio::select! {
        ended = &mut end => ended,
        () = stop.cancelled() => {
            // What has arrived can still be received.
            let _ = hangup.0.shutdown(Shutdown::Read);
            end.await
        }
    };
    // The thread tells, unless it panics.
    ended.unwrap_or(Err(SessionError::Panicked))
}

/// Ends the thread of a connection when dropped: what it waits for fails at once.
struct Hangup(std::os::unix::net::UnixStream);

impl Drop for Hangup {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}
