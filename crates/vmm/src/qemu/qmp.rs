//! A typed client for the part of QMP that the driver uses (QEMU's docs/interop/qmp-spec.rst).
//!
//! One command at a time: the protocol answers in order, and the driver never needs two.
//! Events that matter (MIGRATION) are kept while an answer is awaited.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// Why a QMP exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket broke or was closed: the process is ending or gone.
    #[error("the monitor connection was lost: {0}")]
    Lost(std::io::Error),
    /// An answer that is not QMP.
    #[error("not a QMP message: {0}")]
    Malformed(String),
    /// QEMU refused the command.
    #[error("{class}: {desc}")]
    Refused {
        /// QMP error class.
        class: String,
        /// QEMU's sentence.
        desc: String,
    },
    /// A migration (state save or load) failed.
    #[error("the state could not be transferred: {0}")]
    Migration(String),
}

/// Commands of the driver, with the names and arguments of QEMU's QAPI schema.
#[derive(Debug, Serialize)]
#[serde(tag = "execute", content = "arguments", rename_all = "kebab-case")]
pub enum Command {
    /// Ends capability negotiation.
    #[serde(rename = "qmp_capabilities")]
    Capabilities {},
    /// Stops the processors.
    Stop {},
    /// Runs the processors.
    Cont {},
    /// Sets migration capabilities.
    MigrateSetCapabilities {
        /// The capabilities and their states.
        capabilities: Vec<Capability>,
    },
    /// Saves the state to a URI.
    Migrate {
        /// `file:PATH`.
        uri: String,
    },
    /// Loads the state from a URI.
    MigrateIncoming {
        /// `file:PATH`.
        uri: String,
    },
    /// State of the last migration.
    QueryMigrate {},
    /// Saves the state of processors and devices, without any memory, to a file.
    XenSaveDevicesState {
        /// Its path.
        filename: String,
    },
}

/// One migration capability.
#[derive(Debug, Serialize)]
pub struct Capability {
    /// Name in QAPI's MigrationCapability.
    pub capability: &'static str,
    /// Wanted state.
    pub state: bool,
}

/// Answer to `query-migrate`, as far as it is read.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MigrationInfo {
    error_desc: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Message {
    #[serde(rename = "return")]
    ret: Option<Value>,
    error: Option<ErrorBody>,
    event: Option<String>,
    data: Option<Value>,
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct ErrorBody {
    class: String,
    desc: String,
}

/// A connection to one QEMU's monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    line: String,
    /// Last state told by a MIGRATION event.
    migration: Option<String>,
}

/// A monitor message is small; more than this is not QMP.
const MAX_LINE: u64 = 1 << 20;

impl Qmp {
    /// Reads the greeting and ends the negotiation.
    pub async fn handshake(stream: UnixStream) -> Result<Self, QmpError> {
        let (r, writer) = stream.into_split();
        let mut qmp = Self { reader: BufReader::new(r), writer, line: String::new(), migration: None };
        let hello = qmp.next().await?;
        if hello.greeting.is_none() {
            return Err(QmpError::Malformed("no greeting".into()));
        }
        qmp.execute(&Command::Capabilities {}).await?;
        Ok(qmp)
    }

    async fn next(&mut self) -> Result<Message, QmpError> {
        use tokio::io::AsyncReadExt;
        self.line.clear();
        let n = (&mut self.reader).take(MAX_LINE).read_line(&mut self.line).await.map_err(QmpError::Lost)?;
        if n == 0 {
            return Err(QmpError::Lost(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let m: Message = serde_json::from_str(&self.line)
            .map_err(|e| QmpError::Malformed(format!("{e}: {}", self.line)))?;
        if m.event.as_deref() == Some("MIGRATION") {
            let status = m.data.as_ref().and_then(|d| d.get("status")).and_then(Value::as_str);
            self.migration = status.map(str::to_owned);
        }
        Ok(m)
    }

    /// Sends a command and returns its answer.
    pub async fn execute(&mut self, command: &Command) -> Result<Value, QmpError> {
        let mut text = serde_json::to_vec(command).map_err(|e| QmpError::Malformed(e.to_string()))?;
        text.push(b'\n');
        self.writer.write_all(&text).await.map_err(QmpError::Lost)?;
        self.answer().await
    }

    async fn answer(&mut self) -> Result<Value, QmpError> {
        loop {
            let m = self.next().await?;
            if let Some(e) = m.error {
                return Err(QmpError::Refused { class: e.class, desc: e.desc });
            }
            if let Some(v) = m.ret {
                return Ok(v);
            }
        }
    }

    /// Passes an open file along (SCM_RIGHTS) and returns the number of its /dev/fdset.
    pub async fn add_fd(&mut self, file: OwnedFd) -> Result<u64, QmpError> {
        let text = b"{\"execute\":\"add-fd\"}\n";
        let stream: &UnixStream = self.writer.as_ref();
        let sent = stream
            .async_io(Interest::WRITABLE, || {
                let rights = [file.as_raw_fd()];
                let data = [IoSlice::new(text)];
                let control = [ControlMessage::ScmRights(&rights)];
                sendmsg::<()>(stream.as_raw_fd(), &data, &control, MsgFlags::MSG_NOSIGNAL, None)
                    .map_err(std::io::Error::from)
            })
            .await
            .map_err(QmpError::Lost)?;
        if sent != text.len() {
            return Err(QmpError::Malformed("a command was cut short".into()));
        }
        let answer = self.answer().await?;
        answer
            .get("fdset-id")
            .and_then(Value::as_u64)
            .ok_or_else(|| QmpError::Malformed(format!("add-fd answered {answer}")))
    }

    /// Turns on what a state transfer beside a memfile needs: RAM that lives in a named shared
    /// file is left out (`x-ignore-shared`), and the end is told by an event.
    pub async fn prepare_migration(&mut self) -> Result<(), QmpError> {
        let on = |capability| Capability { capability, state: true };
        self.execute(&Command::MigrateSetCapabilities {
            capabilities: vec![on("x-ignore-shared"), on("events")],
        })
        .await
        .map(drop)
    }

    /// Runs `migrate` or `migrate-incoming` to its end.
    pub async fn migrate(&mut self, command: &Command) -> Result<(), QmpError> {
        self.migration = None;
        self.execute(command).await?;
        loop {
            match self.migration.as_deref() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let info = self.execute(&Command::QueryMigrate {}).await?;
                    let info: MigrationInfo =
                        serde_json::from_value(info).map_err(|e| QmpError::Malformed(e.to_string()))?;
                    let text = info.error_desc.unwrap_or_else(|| "QEMU gave no reason".into());
                    return Err(QmpError::Migration(text));
                }
                _ => {
                    self.next().await?;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[test]
    fn commands_have_qemus_wire_form() {
        let text = |c: &Command| serde_json::to_string(c).unwrap();
        assert_eq!(text(&Command::Capabilities {}), r#"{"execute":"qmp_capabilities","arguments":{}}"#);
        assert_eq!(
            text(&Command::MigrateIncoming { uri: "file:/x".into() }),
            r#"{"execute":"migrate-incoming","arguments":{"uri":"file:/x"}}"#
        );
    }

    async fn peer(script: &'static str) -> UnixStream {
        let (a, b) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let (r, mut w) = b.into_split();
            w.write_all(b"{\"QMP\":{\"version\":{},\"capabilities\":[]}}\n").await.unwrap();
            let mut lines = BufReader::new(r).lines();
            let mut answers = script.split('|');
            while let Ok(Some(_)) = lines.next_line().await {
                if let Some(a) = answers.next() {
                    w.write_all(a.as_bytes()).await.unwrap();
                    w.write_all(b"\n").await.unwrap();
                }
            }
        });
        a
    }

    #[tokio::test]
    async fn a_failed_load_tells_qemus_reason() {
        let stream = peer(
            "{\"return\":{}}|{\"return\":{}}\n{\"event\":\"MIGRATION\",\"data\":{\"status\":\"failed\"}}|\
             {\"return\":{\"status\":\"failed\",\"error-desc\":\"bad section\"}}",
        )
        .await;
        let mut qmp = Qmp::handshake(stream).await.unwrap();
        let e = qmp.migrate(&Command::MigrateIncoming { uri: "file:/x".into() }).await.unwrap_err();
        assert!(matches!(e, QmpError::Migration(t) if t == "bad section"));
    }

    #[tokio::test]
    async fn an_event_before_the_answer_is_not_lost() {
        let stream = peer(
            "{\"return\":{}}|{\"event\":\"MIGRATION\",\"data\":{\"status\":\"completed\"}}\n{\"return\":{}}",
        )
        .await;
        let mut qmp = Qmp::handshake(stream).await.unwrap();
        qmp.migrate(&Command::Migrate { uri: "file:/x".into() }).await.unwrap();
    }

    #[tokio::test]
    async fn a_refusal_and_a_closed_monitor_are_errors() {
        let stream = peer("{\"return\":{}}|{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\"}}").await;
        let mut qmp = Qmp::handshake(stream).await.unwrap();
        assert!(matches!(qmp.execute(&Command::Cont {}).await, Err(QmpError::Refused { .. })));
        let (a, b) = UnixStream::pair().unwrap();
        drop(b);
        assert!(matches!(Qmp::handshake(a).await, Err(QmpError::Lost(_))));
    }
}
