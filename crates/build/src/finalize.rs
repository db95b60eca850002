//! The end of a build: the start command runs until it is ready.

use std::time::{Duration, Instant};

use nidus_envd_protocol::StartCommand;
use nidus_envd_protocol::process::Signal;
use nidus_sandbox::{START_TAG, in_context, start_command};
use nidus_template::{Context, Level, Start};

use crate::PipelineError;
use crate::guest::{Guest, Lines, follow};

/// Between two tries of the ready command.
const TRY_AGAIN: Duration = Duration::from_millis(300);
/// Longest time of one try.
const TRY_LIMIT: Duration = Duration::from_secs(60);
/// What a start command without a ready command gets: nothing says when it is ready.
const SETTLE: Duration = Duration::from_secs(20);

/// Ends what an earlier template started, starts what this one does, and waits until it is ready.
pub(crate) async fn finalize(
    guest: &Guest<'_>,
    start: &Start,
    context: &Context,
    restart: bool,
    limit: Duration,
) -> Result<(), PipelineError> {
    if restart {
        stop_earlier(guest).await?;
    }
    if restart && !start.command.is_empty() {
        guest.log.info(format!("starting: {}", start.command));
        let mut events = guest.client.start(start_command(start, context)).await?;
        let mut lines = Lines::default();
        let ended = {
            let ready = wait_ready(guest, start, context, limit);
            let mut ready = std::pin::pin!(ready);
            tokio::select! {
                biased;
                ready = &mut ready => Some(ready),
                end = follow(&mut events, &mut lines, guest.log) => match end? {
                    // It went to the background, or did its work.
                    None => Some(ready.await),
                    Some(status) => {
                        let what = format!("the start command '{}'", start.command);
                        return Err(PipelineError::Command { what, status, output: lines.tail() });
                    }
                },
            }
        };
        ended.unwrap_or(Ok(())).map_err(|e| match e {
            PipelineError::NotReady { command, seconds, .. } => {
                PipelineError::NotReady { command, seconds, output: lines.tail() }
            }
            e => e,
        })?;
    } else if !start.ready.is_empty() {
        wait_ready(guest, start, context, limit).await?;
    }
    // What is on the disk must not depend on the memory: sandboxes can be booted from it.
    guest.script("sync", "sync", &[]).await
}

async fn stop_earlier(guest: &Guest<'_>) -> Result<(), PipelineError> {
    let running = guest.client.list().await?;
    for process in running.iter().filter(|p| p.tag.as_deref() == Some(START_TAG)) {
        guest.log.info("ending what the template before started");
        guest.client.send_signal(process.pid, Signal::Sigkill).await?;
    }
    Ok(())
}

async fn wait_ready(
    guest: &Guest<'_>,
    start: &Start,
    context: &Context,
    limit: Duration,
) -> Result<(), PipelineError> {
    if start.ready.is_empty() {
        guest.log.info(format!("no ready command: the start command gets {} s", SETTLE.as_secs()));
        return tokio::select! {
            () = guest.cancel.cancelled() => Err(PipelineError::Cancelled),
            () = tokio::time::sleep(SETTLE) => Ok(()),
        };
    }
    guest.log.info(format!("waiting for: {}", start.ready));
    let began = Instant::now();
    loop {
        let command = StartCommand::shell(start.ready.clone()).timeout(TRY_LIMIT.min(limit));
        let command = in_context(command, context);
        let tried = tokio::select! {
            () = guest.cancel.cancelled() => return Err(PipelineError::Cancelled),
            tried = guest.client.run(command) => tried,
        };
        match tried {
            Ok(out) if out.exit_code == 0 => {
                guest.log.info(format!("ready after {:.1} s", began.elapsed().as_secs_f64()));
                return Ok(());
            }
            Ok(out) => guest.log.at(Level::Debug, format!("not ready yet ({})", out.status)),
            Err(e) => guest.log.at(Level::Debug, format!("not ready yet: {e}")),
        }
        if began.elapsed() >= limit {
            let (command, seconds) = (start.ready.clone(), limit.as_secs());
            return Err(PipelineError::NotReady { command, seconds, output: String::new() });
        }
        tokio::select! {
            () = guest.cancel.cancelled() => return Err(PipelineError::Cancelled),
            () = tokio::time::sleep(TRY_AGAIN) => {}
        }
    }
}
