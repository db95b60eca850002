//! `nidus sandbox`.

use std::collections::HashMap;
use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use clap::{Args, Subcommand};
use hyper::Method;
use nidus_envd_protocol::{Client as Envd, Event, EventStream, StartCommand};
use nix::sys::termios::{self, SetArg, Termios};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::client::Client;
use crate::config::Config;
use crate::output::{Output, relative};

/// Sandboxes.
#[derive(Debug, Subcommand)]
pub enum Sandbox {
    /// Create a sandbox and print its id
    Create(Create),
    /// List the running sandboxes
    List,
    /// Run a command in one; input, output and exit code are passed on
    Exec(Exec),
    /// Open a shell in one
    Connect {
        /// Its id
        id: String,
        /// User of the shell
        #[arg(long)]
        user: Option<String>,
    },
    /// Replace what one may reach, while it runs; without options it may reach the whole internet
    Network {
        /// Its id
        id: String,
        #[command(flatten)]
        reach: Reach,
    },
    /// End sandboxes
    Kill {
        /// Their ids
        #[arg(required_unless_present = "all")]
        ids: Vec<String>,
        /// All that run
        #[arg(long, conflicts_with = "ids")]
        all: bool,
    },
}

/// What a sandbox may reach.
#[derive(Debug, Args)]
pub struct Reach {
    /// Address, CIDR or domain that it may reach in spite of --deny-out
    #[arg(long, value_name = "CIDR|DOMAIN")]
    allow_out: Vec<String>,
    /// Address or CIDR that it may not reach; 0.0.0.0/0 for everything that is not allowed
    #[arg(long, value_name = "CIDR")]
    deny_out: Vec<String>,
}

impl Reach {
    fn to_json(&self) -> serde_json::Value {
        json!({ "allowOut": self.allow_out, "denyOut": self.deny_out })
    }
}

/// A new sandbox.
#[derive(Debug, Args)]
pub struct Create {
    #[command(flatten)]
    reach: Reach,
    /// Name or id of the template
    #[arg(default_value = "base")]
    template: String,
    /// Seconds until it is ended
    #[arg(long, default_value_t = 300)]
    timeout: i64,
    /// Environment, as NAME=VALUE
    #[arg(long = "env", short, value_name = "NAME=VALUE", value_parser = pair)]
    envs: Vec<(String, String)>,
    /// Metadata, as KEY=VALUE
    #[arg(long = "metadata", short, value_name = "KEY=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// Without the internet
    #[arg(long)]
    no_internet: bool,
    /// A volume to mount, as NAME:PATH
    #[arg(long = "volume", short, value_name = "NAME:PATH", value_parser = mount)]
    volumes: Vec<(String, String)>,
}

/// A command in a sandbox.
#[derive(Debug, Args)]
pub struct Exec {
    /// Id of the sandbox
    id: String,
    /// User that runs it
    #[arg(long)]
    user: Option<String>,
    /// Directory that it runs in
    #[arg(long)]
    cwd: Option<String>,
    /// Environment, as NAME=VALUE
    #[arg(long = "env", short, value_name = "NAME=VALUE", value_parser = pair)]
    envs: Vec<(String, String)>,
    /// The command and its arguments; a single word is a line for the shell
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((k, v)) if !k.is_empty() => Ok((k.to_owned(), v.to_owned())),
        _ => Err(format!("'{text}' is not NAME=VALUE")),
    }
}

fn mount(text: &str) -> Result<(String, String), String> {
    match text.split_once(':') {
        Some((name, path)) if !name.is_empty() && path.starts_with('/') => {
            Ok((name.to_owned(), path.to_owned()))
        }
        _ => Err(format!("'{text}' is not NAME:/PATH")),
    }
}

pub async fn run(command: Sandbox, config: &Config, out: Output) -> anyhow::Result<ExitCode> {
    let client = Client::new(config).await?;
    match command {
        Sandbox::Create(create) => {
            let envs: HashMap<_, _> = create.envs.into_iter().collect();
            let metadata: HashMap<_, _> = create.metadata.into_iter().collect();
            let mounts = create.volumes.iter().map(|(name, path)| json!({ "name": name, "path": path }));
            let body = json!({
                "volumeMounts": mounts.collect::<Vec<_>>(), "templateID": create.template, "timeout": create.timeout, "envVars": envs, "metadata": metadata,
                "allow_internet_access": !create.no_internet, "network": create.reach.to_json(),
            });
            let made = client.call(Method::POST, "/v2/sandboxes", Some(body)).await?;
            if out.json {
                out.value(&made)?;
            } else {
                println!("{}", made["sandboxID"].as_str().unwrap_or_default());
            }
        }
        Sandbox::List => list(&client, out).await?,
        Sandbox::Exec(exec) => return run_command(&client, exec).await,
        Sandbox::Connect { id, user } => return shell(&client, &id, user).await,
        Sandbox::Network { id, reach } => {
            client.call(Method::PUT, &format!("/sandboxes/{id}/network"), Some(reach.to_json())).await?;
            if out.json {
                out.value(&reach.to_json())?;
            }
        }
        Sandbox::Kill { ids, all } => {
            let ids = if all { all_ids(&client).await? } else { ids };
            for id in &ids {
                client.call(Method::DELETE, &format!("/sandboxes/{id}"), None).await?;
            }
            if out.json {
                out.value(&json!({ "killed": ids }))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn all_ids(client: &Client) -> anyhow::Result<Vec<String>> {
    let list = client.call(Method::GET, "/sandboxes", None).await?;
    let ids = list.as_array().into_iter().flatten().filter_map(|s| s["sandboxID"].as_str());
    Ok(ids.map(str::to_owned).collect())
}

async fn list(client: &Client, out: Output) -> anyhow::Result<()> {
    let list = client.call(Method::GET, "/sandboxes", None).await?;
    if out.json {
        return out.value(&list);
    }
    let rows = list.as_array().into_iter().flatten().map(row).collect();
    let head = ["id", "template", "vcpus", "memory", "started", "ends", "metadata"];
    out.table(&head, rows, "No sandboxes run: nidus sandbox create makes one");
    Ok(())
}

fn row(s: &Value) -> Vec<String> {
    let text = |k: &str| s[k].as_str().unwrap_or_default().to_owned();
    let time = |k: &str| text(k).parse().map(relative).unwrap_or_default();
    let alias = s["alias"].as_str().map_or_else(|| text("templateID"), str::to_owned);
    let mut metadata: Vec<String> = s["metadata"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
        .collect();
    metadata.sort();
    vec![
        text("sandboxID"),
        alias,
        s["cpuCount"].to_string(),
        format!("{} MiB", s["memoryMB"]),
        time("startedAt"),
        time("endAt"),
        metadata.join(" "),
    ]
}

/// envd of a running sandbox.
async fn envd(client: &Client, id: &str) -> anyhow::Result<Envd> {
    let detail = client.call(Method::GET, &format!("/sandboxes/{id}"), None).await?;
    Ok(Envd::of_sandbox(&client.sandbox_url, id, detail["envdAccessToken"].as_str())?)
}

async fn run_command(client: &Client, exec: Exec) -> anyhow::Result<ExitCode> {
    let envd = envd(client, &exec.id).await?;
    let mut start = match exec.command.as_slice() {
        [line] => StartCommand::shell(line),
        [program, args @ ..] => StartCommand::new(program).args(args.to_vec()),
        [] => bail!("no command"),
    };
    start = with(start, exec.user, exec.cwd);
    for (k, v) in exec.envs {
        start = start.env(k, v);
    }
    let piped = !std::io::stdin().is_terminal();
    if piped {
        start = start.stdin();
    }
    let events = envd.start(start).await?;
    follow(&envd, events, piped.then(read_stdin), false).await
}

fn with(mut start: StartCommand, user: Option<String>, cwd: Option<String>) -> StartCommand {
    if let Some(user) = user {
        start = start.user(user);
    }
    if let Some(cwd) = cwd {
        start = start.cwd(cwd);
    }
    start
}

async fn shell(client: &Client, id: &str, user: Option<String>) -> anyhow::Result<ExitCode> {
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    if !terminal {
        bail!("connect needs a terminal; for a command use: nidus sandbox exec {id} COMMAND");
    }
    let envd = envd(client, id).await?;
    let (cols, rows) = size();
    let start = with(StartCommand::new("/bin/bash").args(["-i", "-l"]).pty(cols, rows), user, None);
    let events = envd.start(start).await?;
    let raw = Raw::start()?;
    let code = follow(&envd, events, Some(read_stdin()), true).await;
    drop(raw);
    code
}

/// Passes input, output and the window's size on until the end; the exit code is the command's.
async fn follow(
    envd: &Envd,
    mut events: EventStream,
    mut input: Option<mpsc::Receiver<Bytes>>,
    terminal: bool,
) -> anyhow::Result<ExitCode> {
    let mut window = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::window_change())?;
    let mut pid = None;
    loop {
        let more = async {
            match (&mut input, pid) {
                (Some(i), Some(_)) => i.recv().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            event = events.next() => match event? {
                Some(Event::Started(p)) => pid = Some(p),
                Some(Event::Stdout(bytes) | Event::Pty(bytes)) => write(std::io::stdout(), &bytes)?,
                Some(Event::Stderr(bytes)) => write(std::io::stderr(), &bytes)?,
                Some(Event::Ended(exit)) => {
                    return Ok(ExitCode::from(u8::try_from(exit.code).unwrap_or(137)));
                }
                None => bail!("the sandbox ended before the command"),
            },
            bytes = more => match (bytes, pid) {
                (Some(bytes), Some(p)) if terminal => envd.send_pty(p, bytes).await?,
                (Some(bytes), Some(p)) => envd.send_stdin(p, bytes).await?,
                (None, Some(p)) => {
                    input = None;
                    if !terminal {
                        envd.close_stdin(p).await?;
                    }
                }
                (_, None) => {}
            },
            _ = window.recv(), if terminal => {
                if let Some(p) = pid {
                    let (cols, rows) = size();
                    envd.resize(p, cols, rows).await?;
                }
            }
        }
    }
}

fn write(mut to: impl Write, bytes: &[u8]) -> anyhow::Result<()> {
    to.write_all(bytes).and_then(|()| to.flush()).context("Cannot pass the output on")
}

/// What comes on standard input, read by a thread that ends with the process.
fn read_stdin() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 32 << 10];
        while let Ok(n @ 1..) = std::io::stdin().read(&mut buffer) {
            if sender.blocking_send(Bytes::copy_from_slice(&buffer[..n])).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Columns and rows of the terminal.
fn size() -> (u32, u32) {
    let mut size = nix::libc::winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes a winsize, which lives through the call.
    unsafe { nix::libc::ioctl(1, nix::libc::TIOCGWINSZ, &raw mut size) };
    (u32::from(size.ws_col).max(1), u32::from(size.ws_row).max(1))
}

/// The terminal passes every key on, until this is dropped.
struct Raw(Termios);

impl Raw {
    fn start() -> anyhow::Result<Self> {
        let before = termios::tcgetattr(std::io::stdin())
            .map_err(|e| anyhow!("Cannot read the terminal's mode: {e}"))?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw)
            .map_err(|e| anyhow!("Cannot change the terminal's mode: {e}"))?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
