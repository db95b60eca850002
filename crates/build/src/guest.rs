//! Commands of a build in the guest of a step.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use nidus_envd_protocol::{Client, Event, EventStream, StartCommand};
use nidus_template::{Level, Log};
use tokio::io::AsyncReadExt;
use tokio_util::sync::CancellationToken;

use crate::PipelineError;

/// Lines that a failure shows again.
const TAIL: usize = 20;
/// Longest line that is shown; the rest of it is left out.
const MAX_LINE: usize = 4096;
/// Where programs are, unless somebody says otherwise.
pub(crate) const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Bytes of files that one message carries.
const PIECE: usize = 512 << 10;

/// Output of a command, cut into lines.
#[derive(Default)]
pub(crate) struct Lines {
    parts: [Vec<u8>; 2],
    tail: VecDeque<String>,
}

impl Lines {
    /// Output of stream 0 (standard) or 1 (errors).
    fn push(&mut self, stream: usize, bytes: &[u8], mut line: impl FnMut(usize, &str)) {
        for piece in bytes.split_inclusive(|b| *b == b'\n' || *b == b'\r') {
            let part = &mut self.parts[stream];
            let room = MAX_LINE.saturating_sub(part.len());
            part.extend_from_slice(&piece[..piece.len().min(room)]);
            if matches!(piece.last(), Some(b'\n' | b'\r')) {
                self.end(stream, &mut line);
            }
        }
    }

    fn end(&mut self, stream: usize, line: &mut impl FnMut(usize, &str)) {
        let bytes = std::mem::take(&mut self.parts[stream]);
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim_end_matches(['\n', '\r']);
        if text.is_empty() {
            return;
        }
        line(stream, text);
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(text.to_owned());
    }

    fn finish(&mut self, mut line: impl FnMut(usize, &str)) {
        for stream in [0, 1] {
            self.end(stream, &mut line);
        }
    }

    /// The last lines, each after a line break.
    pub fn tail(&self) -> String {
        self.tail.iter().map(|l| format!("\n{l}")).collect()
    }
}

fn shown(log: &Log, level: [Level; 2]) -> impl Fn(usize, &str) + '_ {
    move |stream, text| log.at(level[stream], text)
}

/// Follows a command to its end and logs what it says. Its exit's status in words if it failed.
pub(crate) async fn follow(
    events: &mut EventStream,
    lines: &mut Lines,
    log: &Log,
) -> Result<Option<String>, PipelineError> {
    let line = shown(log, [Level::Info, Level::Info]);
    while let Some(event) = events.next().await? {
        match event {
            Event::Started(_) => {}
            Event::Stdout(b) | Event::Pty(b) => lines.push(0, &b, &line),
            Event::Stderr(b) => lines.push(1, &b, &line),
            Event::Ended(exit) => {
                lines.finish(&line);
                return Ok((exit.code != 0).then_some(exit.status));
            }
        }
    }
    Ok(Some("it ended without a word".to_owned()))
}

/// A step's guest.
pub(crate) struct Guest<'a> {
    pub client: Client,
    pub log: &'a Log,
    pub cancel: &'a CancellationToken,
    /// Longest time of one command.
    pub limit: Duration,
}

impl Guest<'_> {
    /// Runs a command to its end.
    pub async fn run(&self, what: &str, command: StartCommand) -> Result<(), PipelineError> {
        let mut events = self.client.start(command.timeout(self.limit)).await?;
        self.to_end(what, &mut events).await
    }

    async fn to_end(&self, what: &str, events: &mut EventStream) -> Result<(), PipelineError> {
        let mut lines = Lines::default();
        let end = tokio::select! {
            () = self.cancel.cancelled() => return Err(PipelineError::Cancelled),
            end = follow(events, &mut lines, self.log) => end?,
        };
        match end {
            None => Ok(()),
            Some(status) => {
                Err(PipelineError::Command { what: what.to_owned(), status, output: lines.tail() })
            }
        }
    }

    /// Runs a script of ours as root, with words that it takes as they are.
    pub async fn script(&self, what: &str, script: &str, words: &[&str]) -> Result<(), PipelineError> {
        self.run(what, script_command(script, words)).await
    }

    /// The same with a file of this host as its input.
    pub async fn script_with_input(
        &self,
        what: &str,
        script: &str,
        words: &[&str],
        input: &Path,
    ) -> Result<(), PipelineError> {
        let command = script_command(script, words).stdin().timeout(self.limit);
        let mut events = self.client.start(command).await?;
        let Some(Event::Started(pid)) = events.next().await? else {
            return Err(PipelineError::Ended(format!("{what} was not started")));
        };
        let (mut end, mut feed) =
            (std::pin::pin!(self.to_end(what, &mut events)), std::pin::pin!(self.feed(pid, input)));
        tokio::select! {
            // A command that fails early reads no more: its own words say why.
            biased;
            ended = &mut end => return ended,
            fed = &mut feed => fed?,
        }
        end.await
    }

    async fn feed(&self, pid: u32, input: &Path) -> Result<(), PipelineError> {
        let read = |e| PipelineError::io(format!("read {}", input.display()), e);
        let mut file = tokio::fs::File::open(input).await.map_err(read)?;
        let mut piece = vec![0; PIECE];
        loop {
            let n = file.read(&mut piece).await.map_err(read)?;
            if n == 0 {
                break;
            }
            self.client.send_stdin(pid, Bytes::copy_from_slice(&piece[..n])).await?;
        }
        self.client.close_stdin(pid).await?;
        Ok(())
    }
}

fn script_command(script: &str, words: &[&str]) -> StartCommand {
    let args = ["-c", script, "nidus"].into_iter().chain(words.iter().copied());
    // Whatever path the template sets for its own programs.
    StartCommand::new("/bin/bash").args(args).user("root").cwd("/").env("PATH", SYSTEM_PATH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_becomes_lines_however_it_arrives() {
        let mut lines = Lines::default();
        let mut seen = Vec::new();
        for (stream, text) in [(0, "a"), (1, "err"), (0, "b\nc\r\nd"), (1, "or\n"), (0, "\n\n")] {
            lines.push(stream, text.as_bytes(), |s, l| seen.push((s, l.to_owned())));
        }
        lines.push(0, &vec![b'x'; 10_000], |_, _| {});
        lines.finish(|s, l| seen.push((s, l.to_owned())));
        let long = "x".repeat(MAX_LINE);
        let expected = [(0, "ab"), (0, "c"), (1, "error"), (0, "d"), (0, long.as_str())];
        assert_eq!(seen, expected.map(|(s, l)| (s, l.to_owned())));
        assert!(lines.tail().starts_with("\nab\nc\nerror\nd\n"));
    }
}
