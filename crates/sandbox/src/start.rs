//! What a template starts in all of its sandboxes.

use nidus_envd_protocol::StartCommand;
use nidus_template::{Context, Start};

/// Name of its process, by which envd finds it.
pub const START_TAG: &str = "nidus-start";

/// The start command, in the template's context.
pub fn start_command(start: &Start, context: &Context) -> StartCommand {
    in_context(StartCommand::shell(start.command.clone()).tag(START_TAG), context)
}

/// A command with a template's user, directory and environment, as far as they are said.
pub fn in_context(mut command: StartCommand, context: &Context) -> StartCommand {
    if let Some(user) = &context.user {
        command = command.user(user.clone());
    }
    if let Some(dir) = &context.workdir {
        command = command.cwd(dir.clone());
    }
    for (name, value) in &context.env_vars {
        command = command.env(name.clone(), value.clone());
    }
    command
}
