//! Template builds.
//!
//! A build begins with a *base*: a root file system that is booted once, or another template. Each instruction after it is
//! run in a VM that is resumed from the layer before, and what changed is stored as a layer of its own: a build like any
//! other, whose blocks are the difference. Layers are found again by what they were made of ([`LayerIndex`]), so
//! that a build that was made before is made again without a VM. At the end the start command runs until it is ready,
//! and the last layer is published under the template's build id.
//!
//! Nothing here outlives the daemon but what was published: a build that was cut off is begun again and finds its layers.

mod base;
mod cache;
mod copy;
mod dockerfile;
mod env;
mod error;
mod files;
mod finalize;
mod guest;
mod key;
mod layers;
mod machine;
mod pipeline;
mod step;

pub use dockerfile::{CopySource, Dockerfile, DockerfileError, Instruction};
pub use error::PipelineError;
pub use files::{FileStore, FilesError, Upload};
pub use layers::{Layer, LayerIndex, Pruned};
pub use pipeline::{Base, BuildSpec, Failed, Pipeline, PipelineConfig, StepSpec};
pub use step::{Step, StepError};
