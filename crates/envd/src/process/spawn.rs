//! Starting a process as a user, with pipes or a terminal, and seeing it through to its end.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use nidus_envd_protocol::connect::{Code, ConnectError};
use nidus_envd_protocol::process::process_event::{DataEvent, data_event};
use nidus_envd_protocol::process::pty::Size;
use nidus_envd_protocol::process::{ProcessConfig, StartRequest};
use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::signal::Signal;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::Process;
use super::events::{Fanout, Item};
use super::input::{Input, window};
use super::output::Source;
use super::status::end_event;
use crate::paths;
use crate::state::State;
use crate::users::User;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What others still write after the process's end is read up to here.
const MAX_REST: usize = 8 << 20;
/// Sandboxed programs go first when memory runs out; envd goes last.
const OOM_SCORE: &[u8] = b"100";

/// A descriptor pair's ends: ours, and the child's.
struct Ends {
    ours: Ours,
    child: [Stdio; 3],
}

/// Which of the three outputs bytes are.
type Kind = fn(bytes::Bytes) -> data_event::Output;

struct Ours {
    input: Input,
    /// Descriptor and which of the three outputs it is.
    outputs: Vec<(Source, Kind)>,
    terminal: bool,
}

/// Starts it. The subscription misses nothing.
pub fn start(
    state: &Arc<State>,
    request: StartRequest,
    user: &User,
) -> Result<(Arc<Process>, mpsc::Receiver<Item>), ConnectError> {
    let bad = |text: String| ConnectError::new(Code::InvalidArgument, text);
    let config = request.process.ok_or_else(|| bad("the request has no process".into()))?;
    if config.cmd.is_empty() {
        return Err(bad("the process has no command".into()));
    }
    let (envs, workdir) = state.settings(|s| (s.envs.clone(), s.workdir.clone()));
    let cwd = paths::resolve(config.cwd.as_deref().unwrap_or_default(), user, workdir.as_deref())
        .map_err(|e| bad(e.to_string()))?;
    if !cwd.is_dir() {
        return Err(bad(format!("cwd '{}' does not exist", cwd.display())));
    }
    let size = request.pty.as_ref().map(|p| p.size.unwrap_or(Size { cols: 80, rows: 24 }));
    // Clients from before there was the flag send input without having asked for it.
    let stdin = request.stdin.unwrap_or(true);
    let ends = match &size {
        Some(size) => terminal_ends(size),
        None => pipe_ends(stdin),
    }
    .map_err(|e| {
        ConnectError::new(Code::Internal, format!("cannot open the process's input and output: {e}"))
    })?;
    let Ends { ours, child: [stdin, stdout, stderr] } = ends;
    let mut command = Command::new(&config.cmd);
    command
        .args(&config.args)
        .env_clear()
        .envs(environment(&config, envs, user, ours.terminal))
        .stdin(stdin)
        .stdout(stdout)
        .stderr(stderr);
    confine(&mut command, user, &cwd, ours.terminal).map_err(|e| bad(e.to_string()))?;
    let child = command.spawn().map_err(|e| spawn_error(&config, e))?;
    drop(command);
    let pid = child.id().unwrap_or(0);
    let process = Arc::new(Process {
        pid,
        tag: request.tag,
        config,
        input: ours.input,
        output: Fanout::default(),
        end: watch::Sender::new(None),
    });
    let subscription = process.output.subscribe();
    state.processes.add(process.clone());
    tokio::spawn(see_through(state.clone(), process.clone(), child, ours.outputs));
    Ok((process, subscription))
}

fn spawn_error(config: &ProcessConfig, e: io::Error) -> ConnectError {
    let code = match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::InvalidInput => Code::InvalidArgument,
        io::ErrorKind::PermissionDenied => Code::PermissionDenied,
        io::ErrorKind::OutOfMemory | io::ErrorKind::WouldBlock => Code::ResourceExhausted,
        _ => Code::Internal,
    };
    ConnectError::new(code, format!("error starting process '{}': {e}", config.cmd))
}

/// Kills it when its time is over, unless it ended before.
pub fn kill_at(process: Arc<Process>, at: Instant) {
    tokio::spawn(async move {
        let mut end = process.end.subscribe();
        tokio::select! {
            _ = end.wait_for(Option::is_some) => {}
            () = tokio::time::sleep_until(at) => {
                let _ = process.signal(Signal::SIGKILL);
            }
        }
    });
}

fn environment(
    config: &ProcessConfig,
    sandbox: HashMap<String, String>,
    user: &User,
    terminal: bool,
) -> HashMap<String, String> {
    let path = std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned());
    let mut all = HashMap::from([
        ("PATH".to_owned(), path),
        ("HOME".to_owned(), user.home.clone()),
        ("USER".to_owned(), user.name.clone()),
        ("LOGNAME".to_owned(), user.name.clone()),
        ("SHELL".to_owned(), user.shell.clone()),
    ]);
    if let Ok(language) = std::env::var("LANG") {
        all.insert("LANG".to_owned(), language);
    }
    if terminal {
        all.insert("TERM".to_owned(), "xterm-256color".to_owned());
    }
    all.extend(sandbox);
    all.extend(config.envs.clone());
    // execve(2) takes no such strings; they would fail the start with an unclear error.
    all.retain(|k, v| !k.is_empty() && !k.contains(['=', '\0']) && !v.contains('\0'));
    all
}

fn pipe_ends(stdin: bool) -> io::Result<Ends> {
    let pipe = || nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from);
    let (out_ours, out_child) = pipe()?;
    let (err_ours, err_child) = pipe()?;
    let (input, in_child) = if stdin {
        let (child, ours) = pipe()?;
        (Input::pipe(ours)?, Stdio::from(child))
    } else {
        (Input::None, Stdio::null())
    };
    Ok(Ends {
        ours: Ours {
            input,
            outputs: vec![
                (Source::new(out_ours)?, data_event::Output::Stdout),
                (Source::new(err_ours)?, data_event::Output::Stderr),
            ],
            terminal: false,
        },
        child: [in_child, out_child.into(), err_child.into()],
    })
}

fn terminal_ends(size: &Size) -> io::Result<Ends> {
    let size = window(size);
    let pair = nix::pty::openpty(Some(&size), None)?;
    // openpty(3) cannot be asked for this, and children must not get each other's terminals.
    // Nothing is started between the two calls: there is one thread that starts processes.
    for fd in [&pair.master, &pair.slave] {
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    }
    let reader = pair.master.try_clone()?;
    let stdio = |fd: &OwnedFd| -> io::Result<Stdio> { Ok(fd.try_clone()?.into()) };
    Ok(Ends {
        child: [stdio(&pair.slave)?, stdio(&pair.slave)?, pair.slave.into()],
        ours: Ours {
            input: Input::terminal(pair.master)?,
            outputs: vec![(Source::new(reader)?, data_event::Output::Pty)],
            terminal: true,
        },
    })
}

/// What the child does to itself before it becomes the program: session or group, identity,
/// directory (as the user, whose right it needs).
fn confine(command: &mut Command, user: &User, cwd: &Path, terminal: bool) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let cwd = CString::new(cwd.as_os_str().as_bytes())?;
    let (uid, gid, groups) = (user.uid, user.gid, user.groups.clone());
    let change = uid != nix::unistd::geteuid().as_raw() || nix::unistd::geteuid().is_root();
    let score = File::options().write(true).open("/proc/self/oom_score_adj").is_ok();
    let check = |result: libc::c_int| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: between fork and exec only system calls are made (signal-safety(7)); everything
    // they need was allocated before.
    unsafe {
        command.pre_exec(move || {
            if terminal {
                if libc::setsid() < 0 {
                    return Err(io::Error::last_os_error());
                }
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            } else {
                check(libc::setpgid(0, 0))?;
                if score {
                    // Best effort: a guest without it only loses an order of preference.
                    let fd =
                        libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                    if fd >= 0 {
                        libc::write(fd, OOM_SCORE.as_ptr().cast(), OOM_SCORE.len());
                        libc::close(fd);
                    }
                }
            }
            if change {
                if terminal {
                    check(libc::fchown(0, uid, gid))?;
                }
                check(libc::setgroups(groups.len(), groups.as_ptr()))?;
                check(libc::setgid(gid))?;
                check(libc::setuid(uid))?;
            }
            check(libc::chdir(cwd.as_ptr()))
        });
    }
    Ok(())
}

/// Passes on what it writes, waits for its end, tells it.
async fn see_through(
    state: Arc<State>,
    process: Arc<Process>,
    mut child: Child,
    outputs: Vec<(Source, Kind)>,
) {
    let exited = watch::Sender::new(false);
    let readers: Vec<_> = outputs
        .into_iter()
        .map(|(source, kind)| tokio::spawn(pass_on(process.clone(), source, kind, exited.subscribe())))
        .collect();
    let status = child.wait().await;
    exited.send_replace(true);
    for reader in readers {
        let _ = reader.await;
    }
    let end = match status {
        Ok(status) => end_event(status),
        Err(e) => nidus_envd_protocol::process::process_event::EndEvent {
            exit_code: -1,
            exited: false,
            status: "unknown".into(),
            error: Some(format!("cannot wait for the process: {e}")),
        },
    };
    state.processes.remove(process.pid);
    process.end.send_replace(Some(end.clone()));
    process.output.finish(end).await;
}

/// After the exit, what the process itself wrote is all there to be read; what its children may
/// still write, for as long as they like, does not hold the end up. It is read all the same, to
/// nowhere, so that they are not killed by a pipe without a reader.
async fn pass_on(process: Arc<Process>, source: Source, kind: Kind, mut exited: watch::Receiver<bool>) {
    let send = |bytes| process.output.send(Item::Data(DataEvent { output: Some(kind(bytes)) }));
    loop {
        tokio::select! {
            biased;
            () = async { exited.wait_for(|e| *e).await.ok(); } => break,
            piece = source.next() => match piece {
                Some(bytes) => send(bytes).await,
                None => return,
            },
        }
    }
    let mut rest = 0;
    while let Some(bytes) = source.now() {
        rest += bytes.len();
        send(bytes).await;
        if rest > MAX_REST {
            break;
        }
    }
    tokio::spawn(async move { while source.next().await.is_some() {} });
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn the_calls_environment_wins_and_bad_names_are_left_out() {
        let user = User {
            name: "u".into(),
            uid: 1,
            gid: 1,
            home: "/h".into(),
            shell: "/bin/sh".into(),
            groups: vec![],
        };
        let config = ProcessConfig {
            envs: HashMap::from([
                ("A".into(), "call".into()),
                ("B=".into(), "x".into()),
                ("C".into(), "\0".into()),
            ]),
            ..Default::default()
        };
        let sandbox = HashMap::from([("A".into(), "sandbox".into()), ("S".into(), "s".into())]);
        let all = environment(&config, sandbox, &user, true);
        assert_eq!((all["A"].as_str(), all["S"].as_str(), all["HOME"].as_str()), ("call", "s", "/h"));
        assert!(!all.contains_key("B=") && !all.contains_key("C"));
        assert_eq!(all["TERM"], "xterm-256color");
    }

    #[test]
    fn both_ends_of_a_terminal_close_on_exec() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _entered = runtime.enter();
        let ends = terminal_ends(&Size { cols: 80, rows: 24 }).unwrap();
        let Input::Terminal { fd, .. } = &ends.ours.input else { panic!("no terminal") };
        let flags = nix::fcntl::fcntl(fd.get_ref(), nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        assert!(fd.get_ref().as_raw_fd() > 2);
    }
}
