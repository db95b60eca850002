//! Volumes: a directory of files each, kept across sandboxes.
//!
//! Paths come from clients, and what is in a volume may come from guests: no path leads out of a volume,
//! whatever links it meets (`openat2(2)` with `RESOLVE_IN_ROOT`), and nothing of a volume is reached by a
//! path of the host's. All calls block.

mod error;
mod path;
mod store;
mod upload;

pub use error::VolumeError;
pub use path::VolumePath;
pub use store::{Attributes, Entry, Kind, Limits, Volumes};
pub use upload::Upload;
