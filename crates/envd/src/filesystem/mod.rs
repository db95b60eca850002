//! `filesystem.Filesystem`: looks at, makes, moves, removes and watches files.

pub mod entry;
mod ops;
mod watch;
mod watchers;

use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;
use nidus_envd_protocol::connect::{Code, ConnectError};
use nidus_envd_protocol::filesystem::*;

use crate::body::Body;
use crate::paths;
use crate::reply::HttpError;
use crate::rpc::{self, Caller, blocking};
use crate::state::State;
use crate::users::User;
pub use watchers::Watchers;

/// An error with a code and what was being done.
fn failed(code: Code, text: impl Into<String>) -> ConnectError {
    ConnectError::new(code, text)
}

fn io_error(action: &str, path: &std::path::Path, e: &std::io::Error) -> ConnectError {
    use std::io::ErrorKind as K;
    let code = match e.kind() {
        K::NotFound => Code::NotFound,
        K::AlreadyExists => Code::AlreadyExists,
        K::PermissionDenied | K::ReadOnlyFilesystem => Code::PermissionDenied,
        K::StorageFull | K::QuotaExceeded => Code::ResourceExhausted,
        K::NotADirectory | K::IsADirectory | K::InvalidInput | K::InvalidFilename | K::DirectoryNotEmpty => {
            Code::InvalidArgument
        }
        K::CrossesDevices => Code::FailedPrecondition,
        _ => Code::Internal,
    };
    failed(code, format!("cannot {action} {}: {e}", path.display()))
}

/// User and path of a call.
async fn target(
    caller: &Caller,
    state: &State,
    path: &str,
) -> Result<(User, std::path::PathBuf), ConnectError> {
    let user = caller.user(state).await?;
    let path = resolve(path, &user, state)?;
    Ok((user, path))
}

fn resolve(path: &str, user: &User, state: &State) -> Result<std::path::PathBuf, ConnectError> {
    paths::resolve(path, user, state.default_workdir().as_deref())
        .map_err(|e| failed(Code::InvalidArgument, e.to_string()))
}

/// Answers a call of this service.
pub async fn call(method: &str, request: Request<Incoming>, state: &Arc<State>) -> Response<Body> {
    match method {
        "Stat" => {
            rpc::unary(request, async |caller, q: StatRequest| {
                let (_, path) = target(&caller, state, &q.path).await?;
                let entry = blocking(move || ops::stat(&path)).await?;
                Ok(StatResponse { entry: Some(entry) })
            })
            .await
        }
        "ListDir" => {
            rpc::unary(request, async |caller, q: ListDirRequest| {
                let (_, path) = target(&caller, state, &q.path).await?;
                let entries = blocking(move || ops::list(&path, q.depth.max(1))).await?;
                Ok(ListDirResponse { entries })
            })
            .await
        }
        "MakeDir" => {
            rpc::unary(request, async |caller, q: MakeDirRequest| {
                let (user, path) = target(&caller, state, &q.path).await?;
                let entry = blocking(move || ops::make_dir(&path, &user)).await?;
                Ok(MakeDirResponse { entry: Some(entry) })
            })
            .await
        }
        "Move" => {
            rpc::unary(request, async |caller, q: MoveRequest| {
                let (user, from) = target(&caller, state, &q.source).await?;
                let to = resolve(&q.destination, &user, state)?;
                let entry = blocking(move || ops::rename(&from, &to, &user)).await?;
                Ok(MoveResponse { entry: Some(entry) })
            })
            .await
        }
        "Remove" => {
            rpc::unary(request, async |caller, q: RemoveRequest| {
                let (_, path) = target(&caller, state, &q.path).await?;
                blocking(move || ops::remove(&path)).await?;
                Ok(RemoveResponse {})
            })
            .await
        }
        "WatchDir" => {
            rpc::server_stream(request, async |caller, q: WatchDirRequest| {
                let (_, path) = target(&caller, state, &q.path).await?;
                let options = watch::Options {
                    recursive: q.recursive,
                    entries: q.include_entry,
                    network_mounts: q.allow_network_mounts,
                };
                let watch = watch::Watch::start(path, options).await?;
                Ok(watchers::stream(watch, &caller))
            })
            .await
        }
        "CreateWatcher" => {
            rpc::unary(request, async |caller, q: CreateWatcherRequest| {
                let (_, path) = target(&caller, state, &q.path).await?;
                let options = watch::Options {
                    recursive: q.recursive,
                    entries: q.include_entry,
                    network_mounts: q.allow_network_mounts,
                };
                let watch = watch::Watch::start(path, options).await?;
                Ok(CreateWatcherResponse { watcher_id: state.watchers.add(watch)? })
            })
            .await
        }
        "GetWatcherEvents" => {
            rpc::unary(request, async |_, q: GetWatcherEventsRequest| {
                Ok(GetWatcherEventsResponse { events: state.watchers.take(&q.watcher_id)? })
            })
            .await
        }
        "RemoveWatcher" => {
            rpc::unary(request, async |_, q: RemoveWatcherRequest| {
                state.watchers.remove(&q.watcher_id)?;
                Ok(RemoveWatcherResponse {})
            })
            .await
        }
        _ => HttpError::not_found(format!("filesystem.Filesystem has no {method}")).response(),
    }
}
