//! Running the programs that make an image.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::vm::die_with_parent;

/// Lines of output that an error shows.
const TAIL: usize = 15;

/// Runs a program of the Debian package `package` to its end; shows those lines of its error
/// output that `progress` chooses.
pub fn run(mut command: Command, package: &str, progress: impl Fn(&str) -> bool) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    die_with_parent(&mut command);
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut child = match spawned {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            bail!("{program} is missing; install it (Debian: apt-get install {package})")
        }
        other => other.with_context(|| format!("start {program}"))?,
    };
    let mut tail = VecDeque::new();
    for line in child.stderr.take().into_iter().flat_map(|e| BufReader::new(e).lines()) {
        let Ok(line) = line else { break };
        if progress(&line) {
            eprintln!("testbed: {program}: {line}");
        }
        tail.push_back(line);
        if tail.len() > TAIL {
            tail.pop_front();
        }
    }
    let status = child.wait().with_context(|| format!("wait for {program}"))?;
    if !status.success() {
        bail!("{program} failed ({status}):\n{}", Vec::from(tail).join("\n"));
    }
    Ok(())
}
