//! Pauses as the service's messages have them.

use nidus_proto::node::{SandboxPauseRequest, SandboxPauseResponse, SchedulingMetadata};
use nidus_sandbox::{Lineage, PauseError, PauseSpec, Paused};
use nidus_storage::StorageError;
use tonic::Status;

use crate::node::State;

pub(crate) fn spec(request: &SandboxPauseRequest) -> Result<PauseSpec, Status> {
    if request.filesystem_only {
        return Err(Status::unimplemented("pausing the disk alone is not supported yet"));
    }
    let build_id = request
        .build_id
        .parse()
        .map_err(|_| Status::invalid_argument(format!("build id '{}' is not a UUID", request.build_id)))?;
    Ok(PauseSpec { build_id, template_id: request.template_id.clone() })
}

pub(crate) fn not_now(id: &str, state: State) -> Status {
    let doing = match state {
        State::Starting => "it is still starting",
        State::Running => "it is running",
        State::Pausing => "it is being paused already",
        State::Ending => "it is being ended",
        State::Paused => "it is paused",
    };
    Status::failed_precondition(format!("sandbox '{id}' cannot be paused: {doing}"))
}

pub(crate) fn status(id: &str, e: &PauseError) -> Status {
    let text = match e.runs_on() {
        true => format!("sandbox '{id}' was not paused and runs on: {e}"),
        false => format!("sandbox '{id}' was lost while it was paused: {e}"),
    };
    match e {
        PauseError::Storage(StorageError::AlreadyExists(_)) => Status::already_exists(text),
        PauseError::Storage(StorageError::NilId) => Status::invalid_argument(text),
        _ => Status::internal(text),
    }
}

pub(crate) fn response(paused: &Paused) -> SandboxPauseResponse {
    let ids = |l: &Lineage| l.builds.iter().map(|(b, _)| b.to_string()).collect();
    let bytes = |l: &Lineage| l.builds.iter().map(|(_, n)| *n).collect();
    let (memory, disk) = (&paused.memory_builds, &paused.disk_builds);
    SandboxPauseResponse {
        scheduling_metadata: Some(SchedulingMetadata {
            memfile_base_build_id: memory.base.to_string(),
            rootfs_base_build_id: disk.base.to_string(),
            build_id: paused.metadata.build_id.to_string(),
            memfile_build_ids: ids(memory),
            memfile_build_bytes: bytes(memory),
            rootfs_build_ids: ids(disk),
            rootfs_build_bytes: bytes(disk),
            ..Default::default()
        }),
    }
}
