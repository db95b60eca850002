//! The host's clients for envd: [`EnvdClient`] brings a guest up, [`Client`] runs commands in it.

mod bringup;
mod command;
mod error;
mod http1;
mod rpc;

pub use bringup::EnvdClient;
pub use command::{Event, EventStream, Exit, Output, StartCommand};
pub use error::EnvdError;
pub use rpc::{Client, MessageStream};
