use nidus_sandbox::{CreateError, KillError, RepublishError, SaveError};
use nidus_storage::{BuildId, StorageError};
use nidus_template::BuildError;

use crate::{FilesError, StepError};

/// Why a build failed.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The base.
    #[error(transparent)]
    Base(#[from] BuildError),
    /// An instruction that cannot be read.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The uploaded files of an instruction.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The VM of a step.
    #[error("the VM of this step was not started: {0}")]
    Create(#[from] CreateError),
    /// What a step left.
    #[error("the layer was not stored: {0}")]
    Save(#[from] SaveError),
    /// The last layer under the build's own id.
    #[error(transparent)]
    Republish(#[from] RepublishError),
    /// Storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The guest.
    #[error("envd did not answer: {0}")]
    Envd(#[from] nidus_envd_protocol::EnvdError),
    /// The guest did not start a command.
    #[error("failed to run command '{command}': command failed: {error}")]
    Refused {
        /// The command.
        command: String,
        /// Connect's code and message.
        error: String,
    },
    /// A VM was not released.
    #[error(transparent)]
    Kill(#[from] KillError),
    /// A command of an instruction failed.
    #[error("{what} failed ({status}){output}")]
    Command {
        /// The instruction.
        what: String,
        /// How it ended.
        status: String,
        /// Last lines of its output, each after a line break.
        output: String,
    },
    /// The VM ended in the middle of a step.
    #[error("the VM of this step ended: {0}")]
    Ended(String),
    /// The template was not ready in time.
    #[error("the ready command '{command}' did not succeed within {seconds} s{output}")]
    NotReady {
        /// The command.
        command: String,
        /// The limit.
        seconds: u64,
        /// Last lines of the start command's output.
        output: String,
    },
    /// The build took too long.
    #[error("the build took more than {0} s and was ended")]
    TooLong(u64),
    /// The request cannot be carried out as it stands.
    #[error("{0}")]
    BadRequest(String),
    /// Another template that is not there.
    #[error("the template's build {0} is not on this node")]
    NoTemplate(BuildId),
    /// Cancelled.
    #[error("the build was cancelled")]
    Cancelled,
    /// A file operation.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was being done, and to what.
        action: String,
        /// The cause.
        source: std::io::Error,
    },
}

impl PipelineError {
    /// Of a command that envd did not start: with its words, and envd's.
    pub(crate) fn refused(command: &str, e: Self) -> Self {
        match e {
            Self::Envd(nidus_envd_protocol::EnvdError::Rpc { error, .. }) => {
                let code = serde_json::to_value(error.code).unwrap_or_default();
                let code = code.as_str().unwrap_or("unknown");
                Self::Refused { command: command.to_owned(), error: format!("{code}: {}", error.message) }
            }
            e => e,
        }
    }

    pub(crate) fn io(action: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { action: action.into(), source }
    }
}
