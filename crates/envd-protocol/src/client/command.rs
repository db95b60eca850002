//! Running commands in a guest.

use std::collections::HashMap;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};

use super::{Client, EnvdError, MessageStream};
use crate::connect::Rpc;
use crate::process::process_event::data_event::Output as Data;
use crate::process::process_event::{EndEvent, Event as Wire};
use crate::process::process_input::Input;
use crate::process::process_selector::Selector;
use crate::process::{
    CloseStdinRequest, CloseStdinResponse, ConnectRequest, ConnectResponse, ListRequest, ListResponse,
    ProcessConfig, ProcessEvent, ProcessInfo, ProcessInput, ProcessSelector, Pty, SendInputRequest,
    SendInputResponse, SendSignalRequest, SendSignalResponse, Signal, StartRequest, StartResponse,
    UpdateRequest, UpdateResponse, pty,
};

/// What [`Client::run`] keeps of each of the two outputs, in bytes; a command that writes more
/// fails, so that a guest cannot fill the host's memory.
const MAX_OUTPUT_BYTES: usize = 64 << 20;

/// A command to start.
#[derive(Debug, Clone, Default)]
pub struct StartCommand {
    program: String,
    args: Vec<String>,
    envs: HashMap<String, String>,
    cwd: Option<String>,
    user: Option<String>,
    pty: Option<(u32, u32)>,
    stdin: bool,
    tag: Option<String>,
    timeout: Option<Duration>,
}

impl StartCommand {
    /// A program, found in the guest's `PATH` or named by its path.
    #[must_use]
    pub fn new(program: impl Into<String>) -> Self {
        Self { program: program.into(), ..Self::default() }
    }

    /// A line for a login shell, as SDKs run it.
    #[must_use]
    pub fn shell(line: impl Into<String>) -> Self {
        Self::new("/bin/bash").args(["-l".to_owned(), "-c".to_owned(), line.into()])
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.envs.insert(name.into(), value.into());
        self
    }

    /// Sets the working directory; otherwise the guest's default or the user's home.
    #[must_use]
    pub fn cwd(mut self, dir: impl Into<String>) -> Self {
        self.cwd = Some(dir.into());
        self
    }

    /// Runs it as this user; otherwise the guest's default user.
    #[must_use]
    pub fn user(mut self, name: impl Into<String>) -> Self {
        self.user = Some(name.into());
        self
    }

    /// Gives it a terminal of this size.
    #[must_use]
    pub fn pty(mut self, cols: u32, rows: u32) -> Self {
        self.pty = Some((cols, rows));
        self
    }

    /// Gives it an open standard input; otherwise it reads end of file.
    #[must_use]
    pub fn stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    /// Names it, so that it can be found by the name.
    #[must_use]
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.tag = Some(tag.into());
        self
    }

    /// envd kills it after this time.
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = Some(limit);
        self
    }

    fn headers(&self) -> Result<HeaderMap, EnvdError> {
        let mut headers = HeaderMap::new();
        if let Some(user) = &self.user {
            headers.insert(header::AUTHORIZATION, basic(user)?);
        }
        if let Some(limit) = self.timeout {
            headers.insert("connect-timeout-ms", HeaderValue::from(limit.as_millis() as u64));
        }
        Ok(headers)
    }

    fn request(self) -> StartRequest {
        StartRequest {
            process: Some(ProcessConfig {
                cmd: self.program,
                args: self.args,
                envs: self.envs,
                cwd: self.cwd,
            }),
            pty: self.pty.map(size),
            tag: self.tag,
            stdin: Some(self.stdin),
        }
    }
}

/// The header by which a request names its user: basic authentication without a password.
fn basic(user: &str) -> Result<HeaderValue, EnvdError> {
    HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(format!("{user}:"))))
        .map_err(|e| EnvdError::Request { what: "user".into(), reason: e.to_string() })
}

fn size((cols, rows): (u32, u32)) -> Pty {
    Pty { size: Some(pty::Size { cols, rows }) }
}

fn selector(pid: u32) -> Option<ProcessSelector> {
    Some(ProcessSelector { selector: Some(Selector::Pid(pid)) })
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit code; -1 when a signal ended it.
    pub code: i32,
    /// In words, such as `exit status 3` or `signal: killed`.
    pub status: String,
}

/// What happens to a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It runs, under this process id.
    Started(u32),
    /// It wrote to its standard output.
    Stdout(Bytes),
    /// It wrote to its standard error.
    Stderr(Bytes),
    /// It wrote to its terminal.
    Pty(Bytes),
    /// It ended.
    Ended(Exit),
}

/// What a command left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// Exit code; -1 when a signal ended it.
    pub exit_code: i32,
    /// In words.
    pub status: String,
    /// Standard output, or the terminal's.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// The events of one process. Dropping it leaves the process running.
pub struct EventStream {
    inner: Inner,
}

enum Inner {
    Started(MessageStream<StartResponse>),
    Connected(MessageStream<ConnectResponse>),
}

impl EventStream {
    /// The next event; `None` after the end.
    ///
    /// # Errors
    /// [`EnvdError::Rpc`] when the command could not be started or ran out of time.
    pub async fn next(&mut self) -> Result<Option<Event>, EnvdError> {
        loop {
            let event = match &mut self.inner {
                Inner::Started(s) => s.next().await?.map(|m| m.event),
                Inner::Connected(s) => s.next().await?.map(|m| m.event),
            };
            let Some(event) = event else { return Ok(None) };
            if let Some(event) = event.and_then(plain) {
                return Ok(Some(event));
            }
        }
    }
}

/// Leaves out keepalives, and what a later version may add.
fn plain(event: ProcessEvent) -> Option<Event> {
    Some(match event.event? {
        Wire::Start(e) => Event::Started(e.pid),
        Wire::Data(e) => match e.output? {
            Data::Stdout(b) => Event::Stdout(b),
            Data::Stderr(b) => Event::Stderr(b),
            Data::Pty(b) => Event::Pty(b),
        },
        Wire::End(EndEvent { exit_code, status, .. }) => Event::Ended(Exit { code: exit_code, status }),
        Wire::Keepalive(_) => return None,
    })
}

impl Client {
    /// Starts a command and follows it. The first event is [`Event::Started`].
    ///
    /// # Errors
    /// When the call cannot be made; a command that cannot be started shows in the stream.
    pub async fn start(&self, command: StartCommand) -> Result<EventStream, EnvdError> {
        let headers = command.headers()?;
        let stream = self.stream("process.Process/Start", &command.request(), Some(headers)).await?;
        Ok(EventStream { inner: Inner::Started(stream) })
    }

    /// Follows a running process: what it writes from now on, and its end.
    ///
    /// # Errors
    /// As [`Client::start`].
    pub async fn connect(&self, pid: u32) -> Result<EventStream, EnvdError> {
        let request = ConnectRequest { process: selector(pid) };
        let stream = self.stream("process.Process/Connect", &request, None).await?;
        Ok(EventStream { inner: Inner::Connected(stream) })
    }

    /// Runs a command to its end and keeps what it wrote.
    ///
    /// # Errors
    /// When it cannot be started or followed, ran out of time, or wrote more than 64 MiB.
    pub async fn run(&self, command: StartCommand) -> Result<Output, EnvdError> {
        let mut events = self.start(command).await?;
        let mut output = Output::default();
        let mut ended = false;
        while let Some(event) = events.next().await? {
            match event {
                Event::Started(_) => {}
                Event::Stdout(b) | Event::Pty(b) => keep(&mut output.stdout, &b)?,
                Event::Stderr(b) => keep(&mut output.stderr, &b)?,
                Event::Ended(exit) => {
                    (output.exit_code, output.status) = (exit.code, exit.status);
                    ended = true;
                }
            }
        }
        if ended { Ok(output) } else { Err(EnvdError::Incomplete("process.Process/Start".into())) }
    }

    /// Processes that envd started and that still run.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn list(&self) -> Result<Vec<ProcessInfo>, EnvdError> {
        let list: ListResponse = self.unary("process.Process/List", &ListRequest {}).await?;
        Ok(list.processes)
    }

    /// Writes to a process's standard input.
    ///
    /// # Errors
    /// When there is no such process, or its input is closed.
    pub async fn send_stdin(&self, pid: u32, data: Bytes) -> Result<(), EnvdError> {
        self.input(pid, Input::Stdin(data)).await
    }

    /// Types into a process's terminal.
    ///
    /// # Errors
    /// When there is no such process, or it has no terminal.
    pub async fn send_pty(&self, pid: u32, data: Bytes) -> Result<(), EnvdError> {
        self.input(pid, Input::Pty(data)).await
    }

    async fn input(&self, pid: u32, input: Input) -> Result<(), EnvdError> {
        let input = Some(ProcessInput { input: Some(input) });
        let request = SendInputRequest { process: selector(pid), input };
        self.ignore::<_, SendInputResponse>("process.Process/SendInput", &request).await
    }

    /// Ends a process's standard input.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn close_stdin(&self, pid: u32) -> Result<(), EnvdError> {
        let request = CloseStdinRequest { process: selector(pid) };
        self.ignore::<_, CloseStdinResponse>("process.Process/CloseStdin", &request).await
    }

    /// Sends a signal to a process and its group.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn send_signal(&self, pid: u32, signal: Signal) -> Result<(), EnvdError> {
        let request = SendSignalRequest { process: selector(pid), signal: signal.into() };
        self.ignore::<_, SendSignalResponse>("process.Process/SendSignal", &request).await
    }

    /// Tells a process's terminal its new size.
    ///
    /// # Errors
    /// When there is no such process, or it has no terminal.
    pub async fn resize(&self, pid: u32, cols: u32, rows: u32) -> Result<(), EnvdError> {
        let request = UpdateRequest { process: selector(pid), pty: Some(size((cols, rows))) };
        self.ignore::<_, UpdateResponse>("process.Process/Update", &request).await
    }

    async fn ignore<A: Rpc, B: Rpc>(&self, procedure: &str, argument: &A) -> Result<(), EnvdError> {
        self.unary::<A, B>(procedure, argument).await.map(drop)
    }
}

fn keep(to: &mut Vec<u8>, data: &[u8]) -> Result<(), EnvdError> {
    if to.len() + data.len() > MAX_OUTPUT_BYTES {
        return Err(EnvdError::TooLarge { what: "the command's output".into(), limit: MAX_OUTPUT_BYTES });
    }
    to.extend_from_slice(data);
    Ok(())
}
