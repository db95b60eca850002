//! A sandbox and its life cycle.
//!
//! The [`Factory`] makes sandboxes out of templates. What a resume needs before its guest may run
//! (namespace, disk, VMM process, loaded device state) depends on the template alone, so it is
//! done ahead of need: a *warm* machine stands stopped at the snapshot, and creating a sandbox
//! means to let it run and to tell its envd who it is. What its template runs was asked for once before (`rehearsal`).
//!
//! [`Sandbox::pause`] and [`Sandbox::checkpoint`] make a build of a running sandbox, which stores only
//! what differs from the build it was resumed from; resuming that build is like resuming a template.
//! Either may leave the memory out; sandboxes are booted from such a build.
//!
//! Every part is acquired in the order slot, disk, VMM and released in the reverse order, on
//! every path; what the daemon leaves behind when it is killed is found by `reclaim` at its next
//! start (cgroups, namespaces) or goes with the process (VMs, overlays without a name).

mod cached;
mod checkpoint;
mod compaction;
mod error;
mod factory;
mod garbage;
mod guarded;
mod lineage;
mod machine;
mod opened;
mod pages;
mod pause;
mod rehearsal;
mod republish;
mod saving;
mod served;
mod start;
mod template;
mod warm;

pub use error::{CreateError, KillError, SaveError};
pub use factory::{Factory, FactoryConfig, MachineSize, Sandbox, SandboxSpec};
pub use garbage::{Garbage, GarbageError};
pub use guarded::{NetworkSpec, UpdateError};
pub use lineage::{Lineages, RemoveError, Use};
pub use pages::BuildPages;
pub use republish::RepublishError;
pub use saving::{Lineage, SaveSpec, Saved};
pub use served::{AROUND, MemoryError};
pub use start::{START_TAG, in_context, start_command};
pub use template::OpenTemplate;
pub use warm::WarmStats;
