//! The handshake: greeting and option haggling, up to the transmission phase.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{
    Export,
    wire::{
        CLIENT_NO_ZEROES, HANDSHAKE_FLAGS, INIT_MAGIC, MAX_OPTION, MAX_PAYLOAD, OPTION_MAGIC,
        OPTION_REPLY_MAGIC, PREFERRED_BLOCK, info, option, option_reply, parse_info_request,
        transmission_flag,
    },
};

/// How a handshake can fail. The connection is closed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection failed or was closed in the middle.
    #[error("the connection was lost during the handshake: {0}")]
    Io(#[from] io::Error),
    /// The client set a flag that the server did not offer.
    #[error("the client set unknown handshake flags {0:#x}")]
    UnknownFlags(u32),
    /// An option did not begin with the option magic.
    #[error("an option of the client has no option magic")]
    BadMagic,
    /// More option data than any option of the protocol needs.
    #[error("option {option} of the client carries {len} bytes")]
    OptionTooLong {
        /// The option's number.
        option: u32,
        /// The length of its data.
        len: u32,
    },
    /// `NBD_OPT_EXPORT_NAME` named something else; it has no error reply.
    #[error("the client asked for an export that is not here")]
    UnknownExport,
}

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Agreed {
    pub(super) structured: bool,
}

/// Runs the handshake. `None`: the client ended it in the orderly way.
pub(super) async fn handshake<R, W>(
    reader: &mut R,
    writer: &mut W,
    export: &Export,
) -> Result<Option<Agreed>, HandshakeError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut greeting = Vec::with_capacity(18);
    greeting.extend(INIT_MAGIC.to_be_bytes());
    greeting.extend(OPTION_MAGIC.to_be_bytes());
    greeting.extend(HANDSHAKE_FLAGS.to_be_bytes());
    writer.write_all(&greeting).await?;
    writer.flush().await?;
    let client_flags = reader.read_u32().await?;
    if client_flags & !u32::from(HANDSHAKE_FLAGS) != 0 {
        return Err(HandshakeError::UnknownFlags(client_flags));
    }

    let mut structured = false;
    let mut data = Vec::new();
    loop {
        if reader.read_u64().await? != OPTION_MAGIC {
            return Err(HandshakeError::BadMagic);
        }
        let option = reader.read_u32().await?;
        let len = reader.read_u32().await?;
        let too_long = len as usize > MAX_OPTION;
        if too_long && (option == option::EXPORT_NAME || len as usize > 64 * MAX_OPTION) {
            return Err(HandshakeError::OptionTooLong { option, len });
        }
        data.resize(len as usize, 0);
        reader.read_exact(&mut data).await?;
        let mut out = Replies::to(option);
        if too_long {
            out.add(option_reply::ERR_TOO_BIG, &[b"too much option data"]);
            data = Vec::new();
        } else {
            match option {
                option::EXPORT_NAME if !export.is_named(&data) => return Err(HandshakeError::UnknownExport),
                option::EXPORT_NAME => {
                    let mut answer = export.size_and_flags(structured).to_vec();
                    if client_flags & CLIENT_NO_ZEROES == 0 {
                        answer.resize(answer.len() + 124, 0);
                    }
                    writer.write_all(&answer).await?;
                    writer.flush().await?;
                    return Ok(Some(Agreed { structured }));
                }
                option::ABORT => {
                    out.add(option_reply::ACK, &[]);
                    // The client may already be gone.
                    let _ = out.send(writer).await;
                    return Ok(None);
                }
                option::LIST | option::STRUCTURED_REPLY if !data.is_empty() => {
                    out.add(option_reply::ERR_INVALID, &[b"this option takes no data"]);
                }
                option::LIST => {
                    let name = export.name().as_bytes();
                    out.add(option_reply::SERVER, &[&(name.len() as u32).to_be_bytes(), name]);
                    out.add(option_reply::ACK, &[]);
                }
                option::STRUCTURED_REPLY => {
                    structured = true;
                    out.add(option_reply::ACK, &[]);
                }
                option::INFO | option::GO => match parse_info_request(&data) {
                    None => out.add(option_reply::ERR_INVALID, &[b"malformed request for information"]),
                    Some(name) if !export.is_named(name) => {
                        out.add(option_reply::ERR_UNKNOWN, &[b"no export of this name"]);
                    }
                    Some(_) => {
                        let export_info = export.size_and_flags(structured);
                        out.add(option_reply::INFO, &[&info::EXPORT.to_be_bytes(), &export_info]);
                        let [min, preferred, max] = [1, PREFERRED_BLOCK, MAX_PAYLOAD].map(u32::to_be_bytes);
                        out.add(
                            option_reply::INFO,
                            &[&info::BLOCK_SIZE.to_be_bytes(), &min, &preferred, &max],
                        );
                        out.add(option_reply::ACK, &[]);
                        if option == option::GO {
                            out.send(writer).await?;
                            return Ok(Some(Agreed { structured }));
                        }
                    }
                },
                _ => out.add(option_reply::ERR_UNSUP, &[b"this option is not supported"]),
            }
        }
        out.send(writer).await?;
    }
}

impl Export {
    /// What the server can do, for a client with simple or structured replies.
    pub(super) fn transmission_flags(&self, structured: bool) -> u16 {
        use transmission_flag as flag;
        let mut flags = flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_TRIM
            | flag::SEND_WRITE_ZEROES
            | flag::CAN_MULTI_CONN;
        if structured {
            flags |= flag::SEND_DF;
        }
        flags
    }

    /// The export's size and transmission flags, as they stand in several answers.
    fn size_and_flags(&self, structured: bool) -> [u8; 10] {
        let mut out = [0; 10];
        out[..8].copy_from_slice(&self.device().size().to_be_bytes());
        out[8..].copy_from_slice(&self.transmission_flags(structured).to_be_bytes());
        out
    }
}

/// The replies to one option.
struct Replies {
    option: u32,
    bytes: Vec<u8>,
}

impl Replies {
    fn to(option: u32) -> Self {
        Self { option, bytes: Vec::new() }
    }

    fn add(&mut self, kind: u32, data: &[&[u8]]) {
        self.bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        self.bytes.extend(self.option.to_be_bytes());
        self.bytes.extend(kind.to_be_bytes());
        self.bytes.extend((data.iter().map(|d| d.len()).sum::<usize>() as u32).to_be_bytes());
        for part in data {
            self.bytes.extend_from_slice(part);
        }
    }

    async fn send<W: AsyncWrite + Unpin>(self, writer: &mut W) -> io::Result<()> {
        writer.write_all(&self.bytes).await?;
        writer.flush().await
    }
}
