//! Talking to the kernel's NBD driver. Every call blocks, for at most [`ANSWER_LIMIT`].

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage};
use netlink_packet_core::{NetlinkPayload, NetlinkSerializable};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::message::{Message, command};
use super::sysfs;

/// A disconnect waits in the kernel for requests that are on their way.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Answers are far smaller; so is the kernel's own limit.
const ANSWER_MAX: usize = 32 << 10;

/// What a connection of a device is made with.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub(super) size: u64,
    pub(super) block_size: u64,
    pub(super) flags: u16,
    pub(super) backend: String,
    pub(super) request_timeout: Duration,
    pub(super) dead_connection_timeout: Duration,
}

/// The driver, by the number that its family has in the running kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Driver {
    family: u16,
}

impl Driver {
    /// Asks for the family; fails with `NotFound` where the kernel has no NBD.
    pub(super) fn find() -> io::Result<Self> {
        let attributes = vec![GenlCtrlAttrs::FamilyName(Message::family_name().to_owned())];
        let ask = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: attributes });
        let family = call(ask)?
            .into_iter()
            .flat_map(|answer: GenlMessage<GenlCtrl>| answer.payload.nlas)
            .find_map(|attribute| match attribute {
                GenlCtrlAttrs::FamilyId(id) => Some(id),
                _ => None,
            });
        family.map(|family| Self { family }).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn call(self, message: Message) -> io::Result<Vec<Message>> {
        let mut message = GenlMessage::from_payload(message);
        message.set_resolved_family_id(self.family);
        Ok(call(message)?.into_iter().map(|m| m.payload).collect())
    }

    /// Gives a device its connections; `ResourceBusy` if it is in use.
    pub(super) fn connect(self, index: u32, setup: &Setup, sockets: &[OwnedFd]) -> io::Result<()> {
        let message = Message::new(command::CONNECT, index)
            .size(setup.size, setup.block_size)
            .request_timeout(setup.request_timeout.as_secs())
            .dead_connection_timeout(setup.dead_connection_timeout.as_secs())
            .server_flags(setup.flags)
            .sockets(sockets.iter().map(AsRawFd::as_raw_fd))
            .backend(&setup.backend);
        self.call(message).map(drop)
    }

    /// Puts a socket in the place of a connection that has died; `StorageFull` if none has.
    pub(super) fn reconnect(self, index: u32, backend: &str, socket: &OwnedFd) -> io::Result<()> {
        let message =
            Message::new(command::RECONFIGURE, index).sockets([socket.as_raw_fd()]).backend(backend);
        self.call(message).map(drop)
    }

    /// Ends a device's connections, if they are those of `backend`; requests that wait fail. No error
    /// if it has none.
    pub(super) fn disconnect(self, index: u32, backend: &str) -> io::Result<()> {
        // The kernel does not compare; older ones do not even keep the name.
        if sysfs::backend(index).is_some_and(|other| other != backend) {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "someone else has attached it"));
        }
        match self.call(Message::new(command::DISCONNECT, index)) {
            // Not configured.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(()),
            other => other.map(drop),
        }
    }

    /// Whether a device has connections, or is being opened or closed by someone.
    pub(super) fn in_use(self, index: u32) -> io::Result<bool> {
        let answers = self.call(Message::new(command::STATUS, index))?;
        answers.iter().find_map(|m| m.connected(index)).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer does not name the device")
        })
    }
}

/// Sends a message and collects the answers up to the acknowledgement.
fn call<T>(message: GenlMessage<T>) -> io::Result<Vec<GenlMessage<T>>>
where
    T: GenlFamily + std::fmt::Debug,
    GenlMessage<T>: NetlinkSerializable + NetlinkDeserializable,
{
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_LIMIT))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let kernel = SocketAddr::new(0, 0);
    socket.send_to(&bytes, &kernel, 0)?;
    let mut answers = Vec::new();
    loop {
        let mut buffer = Vec::with_capacity(ANSWER_MAX);
        let from = match socket.recv_from(&mut buffer, 0) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let text = format!("the kernel did not answer within {} s", ANSWER_LIMIT.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            other => other?.1,
        };
        if from.port_number() != 0 {
            continue;
        }
        let mut rest = buffer.as_slice();
        while !rest.is_empty() {
            let answer = NetlinkMessage::deserialize(rest)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
            let length = (answer.header.length as usize).next_multiple_of(4).clamp(1, rest.len());
            rest = &rest[length..];
            match answer.payload {
                NetlinkPayload::Error(e) if e.code.is_none() => return Ok(answers),
                NetlinkPayload::Error(e) => return Err(e.to_io()),
                NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                _ => {}
            }
        }
    }
}
