//! `process.Process`: starts processes, passes their input and output, signals them.

mod events;
mod input;
mod output;
mod spawn;
mod status;

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use nidus_envd_protocol::connect::{Code, ConnectError};
use nidus_envd_protocol::process::process_event::EndEvent;
use nidus_envd_protocol::process::*;
use nix::sys::signal::{self, Signal as Sig};
use nix::unistd::Pid;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::body::Body;
use crate::reply::HttpError;
use crate::rpc;
use crate::state::State;
use events::Fanout;
use input::Input;

/// A process that was started here and runs.
pub struct Process {
    pid: u32,
    tag: Option<String>,
    config: ProcessConfig,
    input: Input,
    output: Fanout,
    end: watch::Sender<Option<EndEvent>>,
}

impl Process {
    /// Signals the process and what it started in its group.
    fn signal(&self, signal: Sig) -> Result<(), ConnectError> {
        if self.end.borrow().is_some() {
            return Ok(());
        }
        match signal::killpg(Pid::from_raw(self.pid.cast_signed()), signal) {
            Ok(()) | Err(nix::Error::ESRCH) => Ok(()),
            Err(e) => {
                Err(ConnectError::new(Code::Internal, format!("cannot signal process {}: {e}", self.pid)))
            }
        }
    }
}

/// The processes that run, by pid.
#[derive(Default)]
pub struct Processes {
    all: Mutex<HashMap<u32, Arc<Process>>>,
}

impl Processes {
    fn add(&self, process: Arc<Process>) {
        self.all.lock().insert(process.pid, process);
    }

    fn remove(&self, pid: u32) {
        self.all.lock().remove(&pid);
    }

    fn find(&self, selector: Option<ProcessSelector>) -> Result<Arc<Process>, ConnectError> {
        use process_selector::Selector;
        let all = self.all.lock();
        let found = match selector.and_then(|s| s.selector) {
            Some(Selector::Pid(pid)) => {
                all.get(&pid).cloned().ok_or_else(|| format!("process with pid {pid} not found"))
            }
            Some(Selector::Tag(tag)) => all
                .values()
                .find(|p| p.tag.as_deref() == Some(tag.as_str()))
                .cloned()
                .ok_or_else(|| format!("process with tag {tag} not found")),
            None => return Err(ConnectError::new(Code::InvalidArgument, "the request selects no process")),
        };
        found.map_err(|text| ConnectError::new(Code::NotFound, text))
    }

    fn list(&self) -> Vec<ProcessInfo> {
        let mut list: Vec<ProcessInfo> = self
            .all
            .lock()
            .values()
            .map(|p| ProcessInfo { config: Some(p.config.clone()), pid: p.pid, tag: p.tag.clone() })
            .collect();
        list.sort_by_key(|p| p.pid);
        list
    }
}

/// Bytes of a message for a process, and whether they are for its terminal.
fn bytes_of(input: Option<ProcessInput>) -> Result<(Bytes, bool), ConnectError> {
    match input.and_then(|i| i.input) {
        Some(process_input::Input::Stdin(bytes)) => Ok((bytes, false)),
        Some(process_input::Input::Pty(bytes)) => Ok((bytes, true)),
        None => Err(ConnectError::new(Code::InvalidArgument, "the request has no input")),
    }
}

/// Answers a call of this service.
pub async fn call(method: &str, request: Request<Incoming>, state: &Arc<State>) -> Response<Body> {
    let processes = &state.processes;
    match method {
        "Start" => {
            rpc::server_stream(request, async |caller, start: StartRequest| {
                let user = caller.user(state).await?;
                let (process, subscription) = spawn::start(state, start, &user)?;
                if let Some(at) = caller.deadline {
                    spawn::kill_at(process.clone(), at);
                }
                Ok(events::start_stream(process.pid, subscription, &caller))
            })
            .await
        }
        "Connect" => {
            rpc::server_stream(request, async |caller, connect: ConnectRequest| {
                let process = processes.find(connect.process)?;
                let subscription = process.output.subscribe();
                Ok(events::connect_stream(process.pid, subscription, &caller))
            })
            .await
        }
        "List" => {
            rpc::unary(request, async |_, _: ListRequest| Ok(ListResponse { processes: processes.list() }))
                .await
        }
        "Update" => {
            rpc::unary(request, async |_, update: UpdateRequest| {
                let process = processes.find(update.process)?;
                if let Some(size) = update.pty.and_then(|p| p.size) {
                    process.input.resize(&size)?;
                }
                Ok(UpdateResponse {})
            })
            .await
        }
        "SendInput" => {
            rpc::unary(request, async |_, send: SendInputRequest| {
                let process = processes.find(send.process)?;
                let (bytes, pty) = bytes_of(send.input)?;
                process.input.write(&bytes, pty).await?;
                Ok(SendInputResponse {})
            })
            .await
        }
        "StreamInput" => {
            let mut process = None;
            rpc::client_stream(
                request,
                async |message: StreamInputRequest| {
                    use stream_input_request::Event;
                    match message.event {
                        Some(Event::Start(start)) => process = Some(processes.find(start.process)?),
                        Some(Event::Data(data)) => {
                            let (bytes, pty) = bytes_of(data.input)?;
                            let none =
                                || ConnectError::new(Code::InvalidArgument, "data came before the start");
                            process.as_ref().ok_or_else(none)?.input.write(&bytes, pty).await?;
                        }
                        Some(Event::Keepalive(_)) | None => {}
                    }
                    Ok(())
                },
                StreamInputResponse {},
            )
            .await
        }
        "SendSignal" => {
            rpc::unary(request, async |_, send: SendSignalRequest| {
                let process = processes.find(send.process)?;
                process.signal(match Signal::try_from(send.signal) {
                    Ok(Signal::Sigterm) => Sig::SIGTERM,
                    Ok(Signal::Sigkill) => Sig::SIGKILL,
                    _ => {
                        let text = format!("signal {} is not SIGTERM or SIGKILL", send.signal);
                        return Err(ConnectError::new(Code::Unimplemented, text));
                    }
                })?;
                Ok(SendSignalResponse {})
            })
            .await
        }
        "CloseStdin" => {
            rpc::unary(request, async |_, close: CloseStdinRequest| {
                processes.find(close.process)?.input.close().await?;
                Ok(CloseStdinResponse {})
            })
            .await
        }
        _ => HttpError::not_found(format!("process.Process has no {method}")).response(),
    }
}
