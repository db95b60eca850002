//! A small NBD client for tests and benches. It trusts the server no more than it must: every magic
//! number, length and cookie is checked.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use nidus_block::nbd::wire::{
    INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
    chunk, command, option, option_reply,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

/// The answer to one request.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Success, with the bytes of a read.
    Done(Vec<u8>),
    /// Failure: error value and text (empty with simple replies).
    Error(u32, String),
}

impl Answer {
    pub fn data(self) -> Vec<u8> {
        match self {
            Self::Done(data) => data,
            Self::Error(errno, text) => panic!("error {errno}: {text}"),
        }
    }
    pub fn errno(&self) -> u32 {
        match self {
            Self::Done(_) => 0,
            Self::Error(errno, _) => *errno,
        }
    }
}

pub struct Client<R = OwnedReadHalf, W = OwnedWriteHalf> {
    pub reader: BufReader<R>,
    pub writer: W,
    pub structured: bool,
    pub size: u64,
    pub flags: u16,
    /// Lengths of reads in flight: simple replies do not say them.
    reads: std::collections::HashMap<u64, usize>,
}

pub async fn connect(socket: &std::path::Path) -> (OwnedReadHalf, OwnedWriteHalf) {
    UnixStream::connect(socket).await.unwrap().into_split()
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Client<R, W> {
    /// Greets, with these client flags.
    pub async fn greet((reader, writer): (R, W), flags: u32) -> Self {
        let mut client = Self {
            reader: BufReader::with_capacity(256 << 10, reader),
            writer,
            structured: false,
            size: 0,
            flags: 0,
            reads: Default::default(),
        };
        assert_eq!(client.reader.read_u64().await.unwrap(), INIT_MAGIC);
        assert_eq!(client.reader.read_u64().await.unwrap(), OPTION_MAGIC);
        assert_eq!(client.reader.read_u16().await.unwrap(), 3);
        client.writer.write_u32(flags).await.unwrap();
        client
    }

    pub async fn send_option(&mut self, option: u32, data: &[u8]) {
        let mut out = OPTION_MAGIC.to_be_bytes().to_vec();
        out.extend(option.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        self.writer.write_all(&out).await.unwrap();
    }

    /// Sends an option and returns the replies up to the last.
    pub async fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send_option(option, data).await;
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.reader.read_u64().await.unwrap(), OPTION_REPLY_MAGIC);
            assert_eq!(self.reader.read_u32().await.unwrap(), option);
            let kind = self.reader.read_u32().await.unwrap();
            let mut data = vec![0; self.reader.read_u32().await.unwrap() as usize];
            self.reader.read_exact(&mut data).await.unwrap();
            replies.push((kind, data));
            if kind == option_reply::ACK || kind >> 31 == 1 {
                return replies;
            }
        }
    }

    /// Goes to the transmission phase by `NBD_OPT_GO`.
    pub async fn go(halves: (R, W), export: &str, structured: bool) -> Self {
        let mut client = Self::greet(halves, 3).await;
        if structured {
            let replies = client.option(option::STRUCTURED_REPLY, &[]).await;
            assert_eq!(replies, [(option_reply::ACK, vec![])]);
        }
        client.structured = structured;
        let replies = client.option(option::GO, &info_request(export)).await;
        assert_eq!(replies.last().unwrap().0, option_reply::ACK, "{replies:?}");
        let export_info = &replies.iter().find(|(_, data)| data.starts_with(&[0, 0])).unwrap().1;
        client.size = u64::from_be_bytes(export_info[2..10].try_into().unwrap());
        client.flags = u16::from_be_bytes(export_info[10..12].try_into().unwrap());
        client
    }

    /// Sends a request; `data` is the payload of a write.
    pub async fn send(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, len: u32, data: &[u8]) {
        let mut out = Vec::with_capacity(28 + data.len());
        out.extend(REQUEST_MAGIC.to_be_bytes());
        out.extend(flags.to_be_bytes());
        out.extend(command.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend(len.to_be_bytes());
        out.extend_from_slice(data);
        self.writer.write_all(&out).await.unwrap();
        if command == command::READ {
            self.reads.insert(cookie, len as usize);
        }
    }

    /// Receives the next answer, to whichever request.
    pub async fn receive(&mut self) -> std::io::Result<(u64, Answer)> {
        match self.reader.read_u32().await? {
            SIMPLE_REPLY_MAGIC => {
                let errno = self.reader.read_u32().await?;
                let cookie = self.reader.read_u64().await?;
                let len = self.reads.remove(&cookie);
                assert!(!self.structured || len.is_none(), "a simple reply to a read");
                let mut data = vec![0; if errno == 0 { len.unwrap_or(0) } else { 0 }];
                self.reader.read_exact(&mut data).await?;
                Ok((
                    cookie,
                    if errno == 0 { Answer::Done(data) } else { Answer::Error(errno, String::new()) },
                ))
            }
            STRUCTURED_REPLY_MAGIC => {
                assert!(self.structured);
                assert_eq!(self.reader.read_u16().await?, chunk::FLAG_DONE);
                let kind = self.reader.read_u16().await?;
                let cookie = self.reader.read_u64().await?;
                let len = self.reader.read_u32().await? as usize;
                let asked = self.reads.remove(&cookie);
                match kind {
                    chunk::NONE => {
                        assert!(len == 0 && asked.unwrap_or(0) == 0);
                        Ok((cookie, Answer::Done(Vec::new())))
                    }
                    chunk::OFFSET_DATA => {
                        assert_eq!(Some(len - 8), asked);
                        self.reader.read_u64().await?;
                        let mut data = vec![0; len - 8];
                        self.reader.read_exact(&mut data).await?;
                        Ok((cookie, Answer::Done(data)))
                    }
                    chunk::ERROR => {
                        let errno = self.reader.read_u32().await?;
                        let mut text = vec![0; self.reader.read_u16().await? as usize];
                        assert_eq!(text.len(), len - 6);
                        self.reader.read_exact(&mut text).await?;
                        Ok((cookie, Answer::Error(errno, String::from_utf8(text).unwrap())))
                    }
                    kind => panic!("chunk type {kind:#x}"),
                }
            }
            magic => panic!("reply magic {magic:#x}"),
        }
    }

    /// One request and its answer, nothing else in flight.
    pub async fn call(&mut self, command: u16, flags: u16, offset: u64, len: u32, data: &[u8]) -> Answer {
        let cookie = offset ^ u64::from(len) << 32 ^ u64::from(command);
        self.send(command, flags, cookie, offset, len, data).await;
        let (answered, answer) = self.receive().await.unwrap();
        assert_eq!(answered, cookie);
        answer
    }

    pub async fn read(&mut self, offset: u64, len: u32) -> Answer {
        self.call(command::READ, 0, offset, len, &[]).await
    }

    pub async fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        self.call(command::WRITE, 0, offset, data.len() as u32, data).await
    }
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO` that asks for block sizes.
pub fn info_request(export: &str) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend([0, 1, 0, 3]);
    data
}
