//! Artifacts of a build by build id: layout, staging, atomic publication.
//!
//! A build is a directory of [`Artifact`]s named by its [`BuildId`]. It is written in a staging
//! directory and renamed into place once everything in it is on the disk, so a build is either
//! absent or whole; once published its files are read-only.

mod artifact;
mod error;
mod local;
mod publish;

pub use artifact::{Artifact, BuildId, InvalidBuildId};
pub use error::StorageError;
pub use local::LocalStore;
pub use publish::StagedBuild;
