//! The VM of one step: resumed from the layer before, and saved as the next one.

use std::path::PathBuf;
use std::time::Duration;

use nidus_envd_protocol::StartCommand;
use nidus_sandbox::{MachineSize, Sandbox, SandboxSpec, SaveSpec, in_context};
use nidus_storage::BuildId;
use nidus_template::{Context, Level, Start};
use uuid::Uuid;

use crate::PipelineError;
use crate::copy::{Copy, copy};
use crate::finalize::finalize;
use crate::guest::Guest;
use crate::layers::Layer;
use crate::pipeline::{Pipeline, Run};

/// What is done in the VM of a step.
pub(crate) enum Work {
    Run {
        command: String,
        context: Context,
    },
    Copy {
        source: String,
        target: String,
        owner: String,
        mode: Option<u32>,
        directory: String,
        archive: PathBuf,
    },
    /// Login shells get this path.
    Path(String),
    Directory {
        path: String,
        owner: String,
    },
    User(String),
    /// The root file system takes the room that its disk has now.
    Grow,
    Finalize {
        start: Start,
        context: Context,
        restart: bool,
    },
}

/// Makes a directory and those above it; a new one is the user's. words: PATH OWNER
const DIRECTORY: &str = r#"set -e; [ -d "$1" ] && exit 0; mkdir -p "$1"; chown "$2:$(id -gn "$2")" "$1""#;

/// Makes a user with a home and the right to be root, unless there is one. words: NAME
const USER: &str = r#"set -e
id "$1" >/dev/null 2>&1 && exit 0
case "$1" in *[!0-9]*) ;; *) echo "there is no user with the id $1" >&2; exit 1 ;; esac
if command -v useradd >/dev/null; then useradd -m -s /bin/bash "$1"; else adduser -D -s /bin/bash "$1"; fi
mkdir -p /etc/sudoers.d
echo "$1 ALL=(ALL) NOPASSWD: ALL" > "/etc/sudoers.d/nidus-$1"
chmod 0440 "/etc/sudoers.d/nidus-$1""#;

/// Debian's /etc/profile sets a path of its own and then reads these. words: PATH
const PATH: &str =
    r#"mkdir -p /etc/profile.d && printf 'export PATH=%q\n' "$1" > /etc/profile.d/nidus-path.sh"#;

const GROW: &str = r#"command -v resize2fs >/dev/null || { echo "resize2fs is missing: the disk cannot grow (Debian: e2fsprogs)" >&2; exit 1; }
resize2fs "$(findmnt -n -o SOURCE / 2>/dev/null || echo /dev/vda)" 2>&1 && sync"#;

impl Pipeline {
    /// Resumes `from` (or boots its disk in another size), does the work and stores what it left in `next`.
    pub(crate) async fn in_machine(
        &self,
        run: &Run<'_>,
        from: &Layer,
        size: Option<MachineSize>,
        work: Work,
        next: &mut Layer,
    ) -> Result<(), PipelineError> {
        let spec = SandboxSpec {
            sandbox_id: format!("build-{}", Uuid::new_v4().simple()),
            execution_id: Uuid::new_v4().to_string(),
            template_id: run.spec.template_id.clone(),
            build_id: from.build_id,
            env_vars: from.context.env_vars.clone().into_iter().collect(),
            access_token: None,
            network: run.spec.network.clone(),
            // Once: nothing is to be kept warm of it.
            snapshot: true,
            filesystem_boot: false,
            size,
        };
        let mut sandbox = self.factory.create(spec, run.cancel.clone()).await.map_err(|e| match e {
            nidus_sandbox::CreateError::Cancelled => PipelineError::Cancelled,
            e => e.into(),
        })?;
        let result = self.work_and_save(run, &mut sandbox, &work, next).await;
        let killed = sandbox.kill().await;
        let (build, bytes) = result?;
        killed?;
        (next.build_id, next.bytes, next.owned) = (build, bytes, true);
        Ok(())
    }

    async fn work_and_save(
        &self,
        run: &Run<'_>,
        sandbox: &mut Sandbox,
        work: &Work,
        next: &Layer,
    ) -> Result<(BuildId, u64), PipelineError> {
        let failed = sandbox.failed();
        let guest = Guest {
            client: sandbox.client()?,
            log: &run.log,
            cancel: run.cancel,
            limit: self.config.build_limit,
        };
        tokio::select! {
            biased;
            done = do_it(&guest, work, self.config.ready_limit, &next.what) => done?,
            reason = failed => return Err(PipelineError::Ended(reason)),
        }
        let save = SaveSpec {
            build_id: BuildId::random(),
            template_id: run.spec.template_id.clone(),
            filesystem_only: false,
            programs: Some((next.context.clone(), next.start.clone())),
        };
        let saved = sandbox.pause(&save).await?;
        run.log.at(
            Level::Debug,
            format!(
                "stored {} KiB of memory and {} KiB of disk",
                saved.memory_bytes >> 10,
                saved.disk_bytes >> 10
            ),
        );
        Ok((save.build_id, saved.memory_bytes + saved.disk_bytes))
    }
}

async fn do_it(
    guest: &Guest<'_>,
    work: &Work,
    ready_limit: Duration,
    what: &str,
) -> Result<(), PipelineError> {
    match work {
        Work::Run { command, context } => {
            let done = guest.run(what, in_context(StartCommand::shell(command), context)).await;
            done.map_err(|e| PipelineError::refused(command, e))
        }
        Work::Copy { source, target, owner, mode, directory, archive } => {
            let c = Copy { source, target, owner, mode: *mode, directory, archive };
            copy(guest, what, &c).await
        }
        Work::Path(path) => guest.script(what, PATH, &[path]).await,
        Work::Directory { path, owner } => guest.script(what, DIRECTORY, &[path, owner]).await,
        Work::User(name) => guest.script(what, USER, &[name]).await,
        Work::Grow => guest.script(what, GROW, &[]).await,
        Work::Finalize { start, context, restart } => {
            finalize(guest, start, context, *restart, ready_limit).await
        }
    }
}
