//! Artifacts of a build by build id: layout, staging, atomic publication.
//!
//! A build is a directory of [`Artifact`]s named by its [`BuildId`]. It is written in a staging
//! directory and renamed into place once everything in it is on the disk, so a build is either
//! absent or whole; once published its files are read-only, and what is read of them is checked
//! by the sums that were made then (see [`ArtifactFile`]).
//!
//! The same builds can lie in an object store ([`remote`]), cut into compressed frames that are
//! fetched when they are read and kept in a [`FrameCache`].

mod artifact;
mod builds;
mod cache;
mod checked;
mod checksums;
mod error;
mod inventory;
mod local;
mod publish;
pub mod remote;

pub use artifact::{Artifact, BuildId, InvalidBuildId};
pub use builds::{BuildArtifact, Builds, Held};
pub use cache::{BuildPin, FrameCache};
pub use checked::ArtifactFile;
pub use checksums::CHECKED_BLOCK;
pub use error::{Damaged, StorageError};
pub use inventory::Stored;
pub use local::LocalStore;
pub use publish::StagedBuild;
pub use remote::is_zero;
