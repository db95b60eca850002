//! `/files`: contents of files over HTTP, streamed both ways, and put together out of parts.

mod compose;
mod download;
mod query;
mod upload;

use std::io;
use std::path::Path;

use http::StatusCode;

use crate::reply::HttpError;

pub use compose::compose;
pub use download::download;
pub use upload::upload;

/// Pieces that are read or written at once.
const CHUNK: usize = 128 << 10;
/// Pieces under way between the network and the disk.
const QUEUE: usize = 8;

fn io_error(action: &str, path: &Path, e: &io::Error) -> HttpError {
    use io::ErrorKind as K;
    let status = match e.kind() {
        K::NotFound => StatusCode::NOT_FOUND,
        K::StorageFull | K::QuotaExceeded | K::FileTooLarge => StatusCode::INSUFFICIENT_STORAGE,
        K::PermissionDenied | K::ReadOnlyFilesystem => StatusCode::FORBIDDEN,
        K::NotADirectory | K::IsADirectory | K::InvalidInput | K::InvalidFilename | K::InvalidData => {
            StatusCode::BAD_REQUEST
        }
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let text = match e.kind() {
        K::StorageFull | K::QuotaExceeded => "not enough disk space available".to_owned(),
        K::InvalidFilename => "the name is too long".to_owned(),
        _ => e.to_string(),
    };
    HttpError::new(status, format!("cannot {action} '{}': {text}", path.display()))
}
