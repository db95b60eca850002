//! Pauses and checkpoints as the service's messages have them.

use nidus_proto::node::SchedulingMetadata;
use nidus_sandbox::{Lineage, SaveError, SaveSpec, Saved};
use nidus_storage::StorageError;
use tonic::Status;

use crate::node::{State, Then};

pub(crate) fn spec(build: &str, template: &str, filesystem_only: bool) -> Result<SaveSpec, Status> {
    let build_id =
        build.parse().map_err(|_| Status::invalid_argument(format!("build id '{build}' is not a UUID")))?;
    Ok(SaveSpec { build_id, template_id: template.to_owned(), filesystem_only, programs: None })
}

/// What is done, as a participle.
fn done(then: Then) -> &'static str {
    match then {
        Then::End => "paused",
        Then::RunOn => "checkpointed",
    }
}

pub(crate) fn not_now(id: &str, then: Then, state: State) -> Status {
    let doing = match state {
        State::Starting => "it is still starting",
        State::Running => "it is running",
        State::Checkpointing => "it is being checkpointed",
        State::Pausing => "it is being paused already",
        State::Ending => "it is being ended",
        State::Paused => "it is paused",
    };
    Status::failed_precondition(format!("sandbox '{id}' cannot be {}: {doing}", done(then)))
}

pub(crate) fn status(id: &str, then: Then, e: &SaveError) -> Status {
    let text = match e.runs_on() {
        true => format!("sandbox '{id}' was not {} and runs on: {e}", done(then)),
        false => format!("sandbox '{id}' was lost while it was {}: {e}", done(then)),
    };
    match e {
        SaveError::Storage(StorageError::AlreadyExists(_)) => Status::already_exists(text),
        SaveError::Storage(StorageError::NilId) => Status::invalid_argument(text),
        // In words of ours: what the guest's answer says is for the log.
        SaveError::Sync(_) => Status::unavailable(format!(
            "sandbox '{id}' was not {} and runs on: its guest did not write its cached files to its disk",
            done(then)
        )),
        _ => Status::internal(text),
    }
}

pub(crate) fn scheduling(saved: &Saved) -> SchedulingMetadata {
    let ids = |l: &Lineage| l.builds.iter().map(|(b, _)| b.to_string()).collect();
    let bytes = |l: &Lineage| l.builds.iter().map(|(_, n)| *n).collect();
    let (memory, disk) = (&saved.memory_builds, &saved.disk_builds);
    SchedulingMetadata {
        memfile_base_build_id: memory.as_ref().map(|m| m.base.to_string()).unwrap_or_default(),
        rootfs_base_build_id: disk.base.to_string(),
        build_id: saved.metadata.build_id.to_string(),
        memfile_build_ids: memory.as_ref().map(ids).unwrap_or_default(),
        memfile_build_bytes: memory.as_ref().map(bytes).unwrap_or_default(),
        rootfs_build_ids: ids(disk),
        rootfs_build_bytes: bytes(disk),
        ..Default::default()
    }
}
