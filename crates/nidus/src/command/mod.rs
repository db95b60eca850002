//! The commands beside `serve` and `doctor`.

pub mod env;
pub mod fetch;
pub mod gc;
pub mod key;
pub mod sandbox;
pub mod team;
pub mod template;
pub mod volume;
