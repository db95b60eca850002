//! What the host and the agent in the machine say to each other: the specification goes in with
//! the initramfs, events come out through a virtio serial port as frames of a kind, a length and
//! so many bytes.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The specification's name in the initramfs.
pub const SPEC_FILE: &str = "spec.json";
/// The longest payload of a frame: output is cut into pieces, events are small.
const MAX_PAYLOAD: u32 = 256 << 10;

/// Everything that the machine is to do in its life.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Spec {
    /// Directories of the host.
    pub shares: Vec<Share>,
    /// Run one after the other, in this order.
    pub jobs: Vec<Job>,
}

/// A directory of the host that the machine sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// On the host.
    pub host: PathBuf,
    /// In the machine.
    pub guest: PathBuf,
    /// The machine must not change it.
    pub read_only: bool,
}

/// One command.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// For reports.
    pub name: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Beside the few variables that every job has.
    pub env: BTreeMap<String, String>,
    /// In seconds; then everything that the job started is killed.
    pub timeout: u64,
}

/// What the agent tells.
#[derive(Debug, Serialize, Deserialize)]
pub enum Event {
    /// The machine is up: modules loaded, shares mounted.
    Up,
    /// The job of this number begins.
    Started(usize),
    /// It has ended, after so many seconds.
    Ended(usize, End, f64),
    /// Something that a reader should know.
    Note(String),
    /// All jobs have ended; the machine goes off.
    Finished,
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// By itself.
    Exited(i32),
    /// By a signal.
    Killed(i32),
    /// By the agent, as its time was over.
    TimedOut,
    /// It could not be started.
    NotStarted(String),
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::Killed(signal) => write!(f, "killed by signal {signal}"),
            Self::TimedOut => write!(f, "killed, as its time was over"),
            Self::NotStarted(cause) => write!(f, "not started: {cause}"),
        }
    }
}

/// One message.
#[derive(Debug)]
pub enum Frame {
    /// Something happened.
    Event(Event),
    /// Standard output of the running job.
    Out(Vec<u8>),
    /// Its error output.
    Err(Vec<u8>),
}

impl Frame {
    /// Sends the frame in one write.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, payload) = match self {
            Self::Event(event) => (0, &serde_json::to_vec(event)?),
            Self::Out(bytes) => (1, bytes),
            Self::Err(bytes) => (2, bytes),
        };
        let len = u32::try_from(payload.len()).ok().filter(|l| *l <= MAX_PAYLOAD);
        let len = len.ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let mut bytes = vec![kind];
        bytes.extend(len.to_be_bytes());
        bytes.extend(payload);
        to.write_all(&bytes)
    }

    /// Receives a frame; the machine is not trusted with its length.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut head = [0; 5];
        from.read_exact(&mut head)?;
        let [kind, len @ ..] = head;
        let len = u32::from_be_bytes(len);
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        if len > MAX_PAYLOAD {
            return Err(invalid(format!("the machine sent a frame of {len} bytes")));
        }
        let mut payload = vec![0; len as usize];
        from.read_exact(&mut payload)?;
        match kind {
            0 => Ok(Self::Event(serde_json::from_slice(&payload)?)),
            1 => Ok(Self::Out(payload)),
            2 => Ok(Self::Err(payload)),
            _ => Err(invalid(format!("the machine sent a frame of kind {kind}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_arrive_as_they_were_sent() {
        let mut wire = Vec::new();
        Frame::Event(Event::Ended(3, End::Killed(9), 1.5)).write(&mut wire).unwrap();
        Frame::Out(b"text".to_vec()).write(&mut wire).unwrap();
        Frame::Err(vec![]).write(&mut wire).unwrap();
        let mut from = wire.as_slice();
        let first = Frame::read(&mut from).unwrap();
        assert!(matches!(first, Frame::Event(Event::Ended(3, End::Killed(9), _))));
        assert!(matches!(Frame::read(&mut from).unwrap(), Frame::Out(b) if b == b"text"));
        assert!(matches!(Frame::read(&mut from).unwrap(), Frame::Err(b) if b.is_empty()));
        assert!(from.is_empty());
    }

    #[test]
    fn a_frame_that_is_too_long_or_unknown_is_refused() {
        assert!(Frame::Out(vec![0; MAX_PAYLOAD as usize + 1]).write(&mut Vec::new()).is_err());
        let error = Frame::read(&mut &[1, 0xff, 0, 0, 0][..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(Frame::read(&mut &[9, 0, 0, 0, 0][..]).is_err());
    }
}
