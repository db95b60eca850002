//! Messages of the generic netlink family "nbd" (`include/uapi/linux/nbd-netlink.h`).

use netlink_packet_core::{DecodeError, Emitable, NLA_F_NESTED, Nla, NlasIterator, ParseableParametrized};
use netlink_packet_generic::{GenlFamily, GenlHeader};

/// The family's name and version.
const FAMILY: &str = "nbd";
const VERSION: u8 = 1;

/// Commands.
pub(super) mod command {
    pub const CONNECT: u8 = 1;
    pub const DISCONNECT: u8 = 2;
    pub const RECONFIGURE: u8 = 3;
    pub const STATUS: u8 = 5;
}

/// Attributes.
mod attribute {
    pub const INDEX: u16 = 1;
    pub const SIZE_BYTES: u16 = 2;
    pub const BLOCK_SIZE_BYTES: u16 = 3;
    pub const TIMEOUT: u16 = 4;
    pub const SERVER_FLAGS: u16 = 5;
    pub const SOCKETS: u16 = 7;
    pub const DEAD_CONN_TIMEOUT: u16 = 8;
    pub const DEVICE_LIST: u16 = 9;
    pub const BACKEND_IDENTIFIER: u16 = 10;
}

/// Attributes within [`attribute::SOCKETS`] and its items.
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;
/// Attributes within [`attribute::DEVICE_LIST`] and its items.
const DEVICE_ITEM: u16 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_CONNECTED: u16 = 2;

/// An attribute with its value as it is on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Attribute {
    kind: u16,
    value: Vec<u8>,
}

impl Attribute {
    fn new(kind: u16, value: impl Into<Vec<u8>>) -> Self {
        Self { kind, value: value.into() }
    }

    /// An attribute that holds attributes.
    fn nested(kind: u16, inner: &[Self]) -> Self {
        let mut value = vec![0; inner.buffer_len()];
        inner.emit(&mut value);
        Self { kind: kind | NLA_F_NESTED, value }
    }

    fn parse_all(buffer: &[u8]) -> Result<Vec<Self>, DecodeError> {
        NlasIterator::new(buffer).map(|nla| nla.map(|nla| Self::new(nla.kind(), nla.value()))).collect()
    }
}

impl Nla for Attribute {
    fn value_len(&self) -> usize {
        self.value.len()
    }

    fn kind(&self) -> u16 {
        self.kind
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.value);
    }
}

/// A message with its attributes in the order in which they are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    command: u8,
    attributes: Vec<Attribute>,
}

impl Message {
    /// A command for the device with this number.
    pub(super) fn new(command: u8, index: u32) -> Self {
        Self { command, attributes: vec![Attribute::new(attribute::INDEX, index.to_ne_bytes())] }
    }

    fn with(mut self, attribute: Attribute) -> Self {
        self.attributes.push(attribute);
        self
    }

    fn number(self, kind: u16, value: u64) -> Self {
        self.with(Attribute::new(kind, value.to_ne_bytes()))
    }

    /// The device's size and the size of its blocks, in bytes.
    pub(super) fn size(self, bytes: u64, block: u64) -> Self {
        self.number(attribute::SIZE_BYTES, bytes).number(attribute::BLOCK_SIZE_BYTES, block)
    }

    /// How long the kernel waits for an answer before it gives a connection up, in seconds.
    pub(super) fn request_timeout(self, seconds: u64) -> Self {
        self.number(attribute::TIMEOUT, seconds)
    }

    /// How long it waits for another connection when it has none, in seconds.
    pub(super) fn dead_connection_timeout(self, seconds: u64) -> Self {
        self.number(attribute::DEAD_CONN_TIMEOUT, seconds)
    }

    /// Transmission flags.
    pub(super) fn server_flags(self, flags: u16) -> Self {
        self.number(attribute::SERVER_FLAGS, flags.into())
    }

    /// Who serves the device, as sysfs shows it.
    pub(super) fn backend(self, identifier: &str) -> Self {
        self.with(Attribute::new(attribute::BACKEND_IDENTIFIER, [identifier.as_bytes(), b"\0"].concat()))
    }

    /// Numbers of connected sockets; the kernel takes references of its own.
    pub(super) fn sockets(self, fds: impl IntoIterator<Item = i32>) -> Self {
        let item = |fd: i32| Attribute::nested(SOCK_ITEM, &[Attribute::new(SOCK_FD, fd.to_ne_bytes())]);
        let items: Vec<_> = fds.into_iter().map(item).collect();
        self.with(Attribute::nested(attribute::SOCKETS, &items))
    }

    /// Whether the answer to [`command::STATUS`] says that the device with this number is in use;
    /// `None` if it does not tell.
    pub(super) fn connected(&self, index: u32) -> Option<bool> {
        let list = Attribute::parse_all(find(&self.attributes, attribute::DEVICE_LIST)?).ok()?;
        list.iter().filter(|item| item.kind & !NLA_F_NESTED == DEVICE_ITEM).find_map(|item| {
            let fields = Attribute::parse_all(&item.value).ok()?;
            let number = u32::from_ne_bytes(find(&fields, DEVICE_INDEX)?.try_into().ok()?);
            let connected = *find(&fields, DEVICE_CONNECTED)?.first()? != 0;
            (number == index).then_some(connected)
        })
    }
}

fn find(attributes: &[Attribute], kind: u16) -> Option<&[u8]> {
    attributes.iter().find(|a| a.kind & !NLA_F_NESTED == kind).map(|a| a.value.as_slice())
}

impl GenlFamily for Message {
    fn family_name() -> &'static str {
        FAMILY
    }

    fn command(&self) -> u8 {
        self.command
    }

    fn version(&self) -> u8 {
        VERSION
    }
}

impl Emitable for Message {
    fn buffer_len(&self) -> usize {
        self.attributes.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.attributes.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Message {
    fn parse_with_param(buffer: &[u8], header: GenlHeader) -> Result<Self, DecodeError> {
        Ok(Self { command: header.cmd, attributes: Attribute::parse_all(buffer)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_encoded_as_the_kernel_reads_it() {
        let message = Message::new(command::CONNECT, 3).sockets([7, 9]).backend("ab");
        let mut bytes = vec![0xff; message.buffer_len()];
        message.emit(&mut bytes);
        let item = |fd: u8| [12, 0, 1, 0x80, 8, 0, 1, 0, fd, 0, 0, 0];
        let mut expected = vec![8, 0, 1, 0, 3, 0, 0, 0];
        expected.extend([28, 0, 7, 0x80]);
        expected.extend(item(7));
        expected.extend(item(9));
        expected.extend([7, 0, 10, 0, b'a', b'b', 0, 0]);
        assert_eq!(bytes, expected);
        let header = GenlHeader { cmd: command::CONNECT, version: 1 };
        let back = Message::parse_with_param(&bytes, header).unwrap();
        assert_eq!(find(&back.attributes, attribute::INDEX), Some(&[3, 0, 0, 0][..]));
    }

    #[test]
    fn the_status_of_a_device_is_found_in_the_list() {
        let device = |index: u32, connected: u8| {
            let fields = [
                Attribute::new(DEVICE_INDEX, index.to_ne_bytes()),
                Attribute::new(DEVICE_CONNECTED, [connected]),
            ];
            Attribute::nested(DEVICE_ITEM, &fields)
        };
        let list = Attribute::nested(attribute::DEVICE_LIST, &[device(1, 0), device(2, 1)]);
        let message = Message { command: command::STATUS, attributes: vec![list] };
        assert_eq!(message.connected(1), Some(false));
        assert_eq!(message.connected(2), Some(true));
        assert_eq!(message.connected(3), None);
        let cut = Attribute::new(attribute::DEVICE_LIST, [9, 0, 1]);
        assert_eq!(Message { command: command::STATUS, attributes: vec![cut] }.connected(1), None);
    }
}
