//! The server of one sandbox: records of its connections (RFC 5531, 11) to calls, and their answers.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::call::{self, Call, NoCall, Refusal};
use crate::export::Export;
use crate::mount;
use crate::procedures::{self, Procedures};
use crate::repeats::Repeats;
use crate::request::{MAX_TRANSFER, Request};

/// Bytes of a call: the largest write and what is around it.
const MAX_RECORD: usize = MAX_TRANSFER as usize + 4096;
/// Connections of a guest at once; more wait.
const MAX_CONNECTIONS: usize = 8;
/// Calls of a guest at once, over all its connections; it is not read from while there are as many.
const MAX_CALLS: usize = 16;
const VERSION: u32 = 3;

/// The volumes of one sandbox.
pub struct Server {
    exports: Vec<Export>,
    repeats: Repeats,
    verifier: [u8; 8],
    room: Arc<Semaphore>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("exports", &self.exports).finish_non_exhaustive()
    }
}

impl Server {
    /// With nothing in it but these.
    pub fn new(exports: Vec<Export>) -> Arc<Self> {
        // A node that starts anew may have lost what was not on the disk yet: no two runs have the same.
        let verifier = uuid::Uuid::new_v4().into_bytes();
        let mut first = [0; 8];
        first.copy_from_slice(&verifier[..8]);
        Arc::new(Self {
            exports,
            repeats: Repeats::default(),
            verifier: first,
            room: Arc::new(Semaphore::new(MAX_CALLS)),
        })
    }

    /// What a record is answered with; `None` when it is not even a call. Blocks for what the file system takes.
    pub fn answer(&self, record: &[u8]) -> Option<Vec<u8>> {
        let mut call = match Call::parse(record) {
            Ok(call) => call,
            Err(NoCall::Version { xid }) => return Some(call::wrong_version(xid).into_bytes()),
            Err(NoCall::Garbage) => return None,
        };
        let results = match call.program {
            _ if ![procedures::PROGRAM, mount::PROGRAM].contains(&call.program) => Err(Refusal::NoProgram),
            _ if call.version != VERSION => Err(Refusal::Version(VERSION)),
            mount::PROGRAM => mount::answer(&self.exports, call.procedure, &mut call.arguments),
            _ => match Request::parse(call.procedure, &mut call.arguments) {
                Err(_) => Err(Refusal::Garbage),
                Ok(None) => Err(Refusal::NoProcedure),
                Ok(Some(request)) if request.is_once() => return Some(self.once(record, &call, &request)),
                Ok(Some(request)) => Ok(self.procedures(&call).answer(&request)),
            },
        };
        let answer = match results {
            Ok(results) => {
                let mut w = call::accepted(call.xid);
                w.append(&results);
                w
            }
            Err(why) => call::refused(call.xid, why),
        };
        Some(answer.into_bytes())
    }

    fn procedures<'a>(&'a self, call: &'a Call<'_>) -> Procedures<'a> {
        Procedures { exports: &self.exports, credentials: &call.credentials, verifier: self.verifier }
    }

    /// As it was answered before, if it was.
    fn once(&self, record: &[u8], call: &Call<'_>, request: &Request<'_>) -> Vec<u8> {
        let key = self.repeats.key(record);
        if let Some(answer) = self.repeats.find(key) {
            return answer;
        }
        let mut w = call::accepted(call.xid);
        w.append(&self.procedures(call).answer(request));
        let answer = w.into_bytes();
        self.repeats.keep(key, answer.clone());
        answer
    }
}

/// The next record, put together of its fragments; `None` at the connection's end.
async fn record(stream: &mut BufReader<OwnedReadHalf>) -> io::Result<Option<Vec<u8>>> {
    let mut whole = Vec::new();
    loop {
        let mut header = [0; 4];
        match stream.read_exact(&mut header).await {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof && whole.is_empty() => return Ok(None),
            read => read?,
        };
        let header = u32::from_be_bytes(header);
        let (is_last, length) = (header >> 31 == 1, (header & 0x7fff_ffff) as usize);
        // A guest could send empty fragments for ever.
        if length > MAX_RECORD - whole.len() || (length == 0 && !is_last) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a call is too long"));
        }
        let begin = whole.len();
        whole.resize(begin + length, 0);
        stream.read_exact(&mut whole[begin..]).await?;
        if is_last {
            return Ok(Some(whole));
        }
    }
}

async fn send(stream: &Mutex<OwnedWriteHalf>, answer: &[u8]) -> io::Result<()> {
    // Far below what 31 bits can say.
    let header = (answer.len() as u32 | 1 << 31).to_be_bytes();
    let mut framed = Vec::with_capacity(4 + answer.len());
    framed.extend_from_slice(&header);
    framed.extend_from_slice(answer);
    stream.lock().await.write_all(&framed).await
}

/// Answers a connection's calls, several at a time, until one side ends it.
async fn converse(server: &Arc<Server>, stream: TcpStream, stop: &CancellationToken) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (read, write) = stream.into_split();
    let (mut read, write) = (BufReader::with_capacity(64 << 10, read), Arc::new(Mutex::new(write)));
    let (calls, broken) = (TaskTracker::new(), stop.child_token());
    let outcome = loop {
        let next = async {
            let Some(record) = record(&mut read).await? else { return Ok(None) };
            // The semaphore is never closed.
            let permit = server.room.clone().acquire_owned().await.map_err(io::Error::other)?;
            Ok(Some((record, permit)))
        };
        let (record, permit) = match broken.run_until_cancelled(next).await {
            Some(Ok(Some(next))) => next,
            None | Some(Ok(None)) => break Ok(()),
            Some(Err(e)) => break Err(e),
        };
        let (server, write, broken) = (server.clone(), write.clone(), broken.clone());
        calls.spawn(async move {
            let answered = tokio::task::spawn_blocking(move || server.answer(&record)).await;
            let sent = match answered {
                Ok(Some(answer)) => {
                    matches!(broken.run_until_cancelled(send(&write, &answer)).await, Some(Ok(())))
                }
                // Not a call, or one whose work broke off: there is nothing to say.
                _ => false,
            };
            if !sent {
                broken.cancel();
            }
            drop(permit);
        });
    };
    calls.close();
    calls.wait().await;
    outcome
}

/// Serves a sandbox's listener until `stop`; its connections end with it, and what they had begun is done.
pub async fn serve(listener: TcpListener, server: Arc<Server>, stop: CancellationToken) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let connections = TaskTracker::new();
    loop {
        let accepted = async {
            let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((listener.accept().await?.0, permit))
        };
        let (stream, permit) = match stop.run_until_cancelled(accepted).await {
            None => break,
            Some(Ok(accepted)) => accepted,
            Some(Err(e)) => {
                tracing::warn!("cannot accept a guest's connection to its volumes: {e}");
                // Too many open files, say: others must end first.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (server, stop) = (server.clone(), stop.clone());
        connections.spawn(async move {
            if let Err(e) = converse(&server, stream, &stop).await {
                tracing::debug!("a guest's connection to its volumes ended: {e}");
            }
            drop(permit);
        });
    }
    connections.close();
    connections.wait().await;
}
