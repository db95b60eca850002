//! Running the few programs that a build needs (mmdebstrap, mke2fs, apt, dpkg).

use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::BuildError;

/// Lines of output kept for the error message.
const TAIL: usize = 15;

/// Runs a program to its end, hands each line of its output to `line`, kills it on cancel.
///
/// # Errors
/// [`BuildError::Tool`] with the last lines when it fails, [`BuildError::ToolMissing`] when it
/// is not installed, [`BuildError::Cancelled`].
pub async fn run(
    command: Command,
    package: &'static str,
    cancel: &CancellationToken,
    line: impl FnMut(&str),
) -> Result<(), BuildError> {
    run_and(command, package, cancel, line, |_| false).await
}

/// As [`run`], with further exit codes that are a success.
pub async fn run_and(
    mut command: Command,
    package: &'static str,
    cancel: &CancellationToken,
    mut line: impl FnMut(&str),
    also_good: impl Fn(i32) -> bool,
) -> Result<(), BuildError> {
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    let fail = |source| BuildError::Io { action: format!("run {program}"), source };
    let mut child = match command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
    {
        Ok(c) => c,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(BuildError::ToolMissing { program, package });
        }
        Err(e) => return Err(fail(e)),
    };
    let mut tail = std::collections::VecDeque::new();
    if let Some(stderr) = child.stderr.take() {
        let mut lines = BufReader::new(stderr).lines();
        loop {
            let next = tokio::select! {
                () = cancel.cancelled() => return Err(BuildError::Cancelled),
                n = lines.next_line() => n,
            };
            let Ok(Some(text)) = next else { break };
            line(&text);
            tail.push_back(text);
            if tail.len() > TAIL {
                tail.pop_front();
            }
        }
    }
    let status = tokio::select! {
        () = cancel.cancelled() => return Err(BuildError::Cancelled),
        s = child.wait() => s.map_err(fail)?,
    };
    if status.success() || status.code().is_some_and(also_good) {
        return Ok(());
    }
    let output = Vec::from(tail).join("\n");
    Err(BuildError::Tool { program, status: status.to_string(), output })
}
