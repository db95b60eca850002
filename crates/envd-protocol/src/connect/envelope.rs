//! Envelopes: how Connect frames the messages of a stream. A flag byte, the length as four bytes
//! in network order, the message. The last one of a response has the end-of-stream flag and
//! holds JSON.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::ConnectError;

/// Largest message that either end accepts, in bytes. A process's output comes in far smaller
/// pieces; input through `SendInput` may be large.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

const HEADER: usize = 5;
const COMPRESSED: u8 = 0x01;
const END_STREAM: u8 = 0x02;

/// One piece of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Envelope {
    /// A message, in the stream's codec.
    Message(Bytes),
    /// The end of a response.
    End(EndStream),
}

/// The JSON that ends a response stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndStream {
    /// Why it failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ConnectError>,
}

/// Bytes that are no stream of envelopes.
#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    /// Compression was never agreed on.
    #[error("the stream has a compressed message, but no compression was negotiated")]
    Compressed,
    /// Larger than [`MAX_MESSAGE_BYTES`].
    #[error("a message of {0} bytes is larger than the limit of {MAX_MESSAGE_BYTES}")]
    TooLarge(usize),
    /// The end-of-stream message is not JSON.
    #[error("cannot decode the end-of-stream message: {0}")]
    End(#[from] serde_json::Error),
    /// The stream ended within an envelope.
    #[error("the stream ended in the middle of a message")]
    Truncated,
}

/// One message in its envelope.
#[must_use]
pub fn frame(message: &[u8]) -> Bytes {
    envelope(0, message)
}

/// The last envelope of a response.
#[must_use]
pub fn end_stream(error: Option<ConnectError>) -> Bytes {
    // Strings and a unit enum: JSON can hold them all.
    let json = serde_json::to_vec(&EndStream { error }).unwrap_or_else(|_| b"{}".to_vec());
    envelope(END_STREAM, &json)
}

fn envelope(flags: u8, message: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(HEADER + message.len());
    out.put_u8(flags);
    out.put_u32(message.len() as u32);
    out.put_slice(message);
    out.freeze()
}

/// Takes a stream apart, however it was cut into pieces on its way.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole envelope, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// When the bytes are no envelope; the stream is of no use afterwards.
    pub fn take(&mut self) -> Result<Option<Envelope>, EnvelopeError> {
        if self.buffer.len() < HEADER {
            return Ok(None);
        }
        let flags = self.buffer[0];
        let len =
            u32::from_be_bytes([self.buffer[1], self.buffer[2], self.buffer[3], self.buffer[4]]) as usize;
        if len > MAX_MESSAGE_BYTES {
            return Err(EnvelopeError::TooLarge(len));
        }
        if flags & COMPRESSED != 0 {
            return Err(EnvelopeError::Compressed);
        }
        if self.buffer.len() < HEADER + len {
            return Ok(None);
        }
        self.buffer.advance(HEADER);
        let message = self.buffer.split_to(len).freeze();
        if flags & END_STREAM == 0 {
            return Ok(Some(Envelope::Message(message)));
        }
        let end = if message.is_empty() { EndStream::default() } else { serde_json::from_slice(&message)? };
        Ok(Some(Envelope::End(end)))
    }

    /// Says whether the stream may end here.
    ///
    /// # Errors
    /// When it ends within an envelope.
    pub fn finish(&self) -> Result<(), EnvelopeError> {
        if self.buffer.is_empty() { Ok(()) } else { Err(EnvelopeError::Truncated) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::connect::Code;

    #[test]
    fn the_end_carries_the_error() {
        assert_eq!(&end_stream(None)[..], b"\x02\0\0\0\x02{}");
        let mut decoder = Decoder::default();
        decoder.push(&end_stream(Some(ConnectError::new(Code::NotFound, "gone"))));
        let Some(Envelope::End(end)) = decoder.take().unwrap() else { panic!("no end") };
        assert_eq!(end.error, Some(ConnectError::new(Code::NotFound, "gone")));
    }

    #[test]
    fn refuses_compression_and_too_much() {
        let mut decoder = Decoder::default();
        decoder.push(&[1, 0, 0, 0, 1, 0]);
        assert!(matches!(decoder.take(), Err(EnvelopeError::Compressed)));
        let mut decoder = Decoder::default();
        decoder.push(&[0, 0xff, 0xff, 0xff, 0xff]);
        assert!(matches!(decoder.take(), Err(EnvelopeError::TooLarge(_))));
    }

    proptest! {
        #[test]
        fn any_cutting_gives_the_same_messages(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8),
            cut in 1usize..9,
        ) {
            let wire: Vec<u8> = messages.iter().flat_map(|m| frame(m)).collect();
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for piece in wire.chunks(cut) {
                decoder.push(piece);
                while let Some(Envelope::Message(m)) = decoder.take().unwrap() {
                    seen.push(m.to_vec());
                }
            }
            decoder.finish().unwrap();
            prop_assert_eq!(seen, messages);
        }
    }
}
