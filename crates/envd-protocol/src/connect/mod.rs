//! The parts of the [Connect protocol](https://connectrpc.com/docs/protocol/) that both ends
//! need: codecs, error codes, and the envelopes of streams.

mod code;
mod codec;
mod envelope;

pub use code::{Code, ConnectError};
pub use codec::{Codec, DecodeError, Rpc};
pub use envelope::{Decoder, EndStream, Envelope, EnvelopeError, MAX_MESSAGE_BYTES, end_stream, frame};
