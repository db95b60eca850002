//! What a VMM sends first: its memory's layout and the userfaultfd.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use tokio::{io::Interest, net::UnixStream, time::timeout};

use super::{
    layout::{Layout, LayoutError, MAX_MESSAGE},
    process::Process,
    sys::{Uffd, feature},
};

/// Why a VMM's first message is refused.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// It did not come in time.
    #[error("the VMM did not hand over its memory within {limit:?}")]
    Timeout {
        /// How long was waited.
        limit: Duration,
    },
    /// The connection broke.
    #[error("cannot {action} the VMM's memory connection: {source}")]
    Connection {
        /// What was being done, as an infinitive.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The VMM closed the connection before its message was whole.
    #[error("the VMM closed its memory connection after {received} bytes, before its message was whole")]
    Closed {
        /// How many bytes came.
        received: usize,
    },
    /// The message is too long.
    #[error("the VMM's description of its memory is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    /// The description is refused.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Not exactly one descriptor came.
    #[error("the VMM sent {count} file descriptors with its memory, expected one userfaultfd")]
    Descriptors {
        /// How many came, at least.
        count: usize,
    },
    /// The descriptor is something else.
    #[error("the file descriptor that the VMM sent is not a userfaultfd that is ready for use")]
    NotUserfaultfd,
    /// It has features with which its memory cannot be served.
    #[error("the VMM's userfaultfd has features {features:#x}, of which {refused:#x} are refused")]
    Features {
        /// All its features.
        features: u64,
        /// Those that are refused: fork events, SIGBUS and asynchronous write-protect.
        refused: u64,
    },
}

/// A VMM's memory, handed over: its layout, the userfaultfd and the process.
#[derive(Debug)]
pub struct Handshake {
    pub(super) layout: Layout,
    pub(super) uffd: Uffd,
    pub(super) stream: UnixStream,
    pub(super) process: Option<Process>,
}

impl Handshake {
    /// Receives Firecracker's message on an accepted connection, for a memory of `memory_size`
    /// bytes, within `limit`. Nothing of what the sender says is trusted.
    ///
    /// For a connection of the standard library there is [`UnixStream::from_std`].
    pub async fn receive(
        stream: UnixStream,
        memory_size: u64,
        limit: Duration,
    ) -> Result<Self, HandshakeError> {
        let received = timeout(limit, receive_message(&stream, memory_size)).await;
        let (layout, fd) = received.map_err(|_| HandshakeError::Timeout { limit })??;
        let connection = |action| move |source| HandshakeError::Connection { action, source };
        let uffd = Uffd::new(fd).map_err(connection("inspect the descriptor from"))?;
        let uffd = uffd.ok_or(HandshakeError::NotUserfaultfd)?;
        let features = uffd.features();
        let refused = features & (feature::EVENT_FORK | feature::SIGBUS | feature::WP_ASYNC);
        if refused != 0 {
            return Err(HandshakeError::Features { features: features & !feature::INITIALIZED, refused });
        }
        if features & feature::EVENT_REMOVE == 0 {
            tracing::warn!(
                "the VMM's userfaultfd tells nothing of removed pages: with a balloon they would get their old content"
            );
        }
        let process = Process::peer_of(stream.as_fd()).map_err(connection("find the process behind"))?;
        Ok(Self { layout, uffd, stream, process })
    }

    /// Names the VMM's process; for a connection that the VMM inherited instead of making it.
    pub fn with_process(mut self, process: Process) -> Self {
        self.process = Some(process);
        self
    }

    /// Where the guest's memory lies in the VMM.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The VMM's process, if it is known.
    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }
}

async fn receive_message(stream: &UnixStream, memory_size: u64) -> Result<(Layout, OwnedFd), HandshakeError> {
    let mut message = vec![0; MAX_MESSAGE + 1];
    let mut len = 0;
    let mut descriptors = Vec::new();
    loop {
        let part = stream
            .async_io(Interest::READABLE, || receive_part(stream, &mut message[len..], &mut descriptors))
            .await
            .map_err(|source| HandshakeError::Connection { action: "read from", source })?;
        if part.too_many || descriptors.len() > 1 {
            return Err(HandshakeError::Descriptors { count: descriptors.len().max(2) });
        }
        len += part.len;
        if len > MAX_MESSAGE {
            return Err(HandshakeError::TooLong);
        }
        // It is sent in one piece, but a stream may deliver pieces.
        match Layout::parse(&message[..len], memory_size) {
            Err(error) if error.is_incomplete() && part.len > 0 => {}
            Err(error) if error.is_incomplete() => return Err(HandshakeError::Closed { received: len }),
            result => {
                let layout = result?;
                let fd = descriptors.pop().ok_or(HandshakeError::Descriptors { count: 0 })?;
                return Ok((layout, fd));
            }
        }
    }
}

struct Part {
    len: usize,
    too_many: bool,
}

fn receive_part(stream: &UnixStream, to: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<Part> {
    // Room for a few: what does not fit the kernel closes, and says so.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(stream.as_fd(), &mut [IoSliceMut::new(to)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds);
        }
    }
    Ok(Part { len: received.bytes, too_many: received.flags.contains(ReturnFlags::CTRUNC) })
}
