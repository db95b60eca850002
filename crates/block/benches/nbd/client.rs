//! A client that costs little: blocking system calls, buffers made once, as many requests in a call as
//! there are answers in one. Every answer is checked for its magic number, error and cookie.

use std::io::{IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nidus_block::nbd::wire::{INIT_MAGIC, OPTION_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, command, option};

use crate::cases::Case;

const REPLY_LEN: usize = 16;

/// Goes to the transmission phase by the oldest option, which all servers know.
fn connect(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(greeting[..8], INIT_MAGIC.to_be_bytes());
    assert_eq!(greeting[8..16], OPTION_MAGIC.to_be_bytes());
    let mut hello = 3u32.to_be_bytes().to_vec();
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(option::EXPORT_NAME.to_be_bytes());
    hello.extend(4u32.to_be_bytes());
    hello.extend(b"root");
    stream.write_all(&hello).unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
    stream
}

fn request(case: &Case, cookie: usize, offset: u64) -> [u8; 28] {
    let mut out = [0; 28];
    out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    let command = if case.write { command::WRITE } else { command::READ };
    out[6..8].copy_from_slice(&command.to_be_bytes());
    out[8..16].copy_from_slice(&(cookie as u64).to_be_bytes());
    out[16..24].copy_from_slice(&offset.to_be_bytes());
    out[24..].copy_from_slice(&case.len.to_be_bytes());
    out
}

fn send(stream: &mut UnixStream, case: &Case, payload: &[u8], first: usize, offsets: &[u64]) {
    let headers: Vec<_> = offsets.iter().enumerate().map(|(i, o)| request(case, first + i, *o)).collect();
    let mut slices: Vec<IoSlice<'_>> =
        headers.iter().flat_map(|h| [IoSlice::new(h), IoSlice::new(payload)]).collect();
    let mut rest = &mut slices[..];
    while !rest.is_empty() {
        let n = stream.write_vectored(rest).unwrap();
        IoSlice::advance_slices(&mut rest, n);
    }
}

/// Requests per second through a socket.
pub fn run(socket: &Path, case: &Case, offsets: &[u64]) -> f64 {
    let mut stream = connect(socket);
    let payload = vec![0x5a; if case.write { case.len as usize } else { 0 }];
    let answer_len = REPLY_LEN + if case.write { 0 } else { case.len as usize };
    let mut buffer = vec![0; answer_len * case.depth.min(64)];
    let (mut sent, mut received, mut filled) = (0, 0, 0);
    let start = Instant::now();
    while received < offsets.len() {
        let window = (received + case.depth).min(offsets.len());
        if sent < window {
            send(&mut stream, case, &payload, sent, &offsets[sent..window]);
            sent = window;
        }
        while filled < answer_len {
            let n = stream.read(&mut buffer[filled..]).unwrap();
            assert!(n > 0, "the server closed the connection");
            filled += n;
        }
        let whole = filled / answer_len;
        for answer in buffer.chunks_exact(answer_len).take(whole) {
            assert_eq!(answer[..4], SIMPLE_REPLY_MAGIC.to_be_bytes());
            assert_eq!(answer[4..8], [0; 4], "the server answered with an error");
            let cookie = u64::from_be_bytes(answer[8..16].try_into().unwrap());
            assert!((cookie as usize) < sent);
        }
        received += whole;
        buffer.copy_within(whole * answer_len..filled, 0);
        filled -= whole * answer_len;
    }
    let seconds = start.elapsed().as_secs_f64();
    stream.write_all(&disconnect()).unwrap();
    offsets.len() as f64 / seconds
}

fn disconnect() -> [u8; 28] {
    let mut out = [0; 28];
    out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    out[6..8].copy_from_slice(&command::DISC.to_be_bytes());
    out
}
