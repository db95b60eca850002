//! What the daemon tells about itself.
//!
//! [`logging`] sets up `tracing` for a process. [`events`] carries the facts of a sandbox's life
//! (created, updated, killed) to sinks: the log and a bounded memory now, Redis streams and
//! ClickHouse behind the same trait later. Nothing here blocks its caller.

pub mod events;
pub mod guest_logs;
pub mod logging;
pub mod running;

pub use events::{Event, EventKind, Fanout, LogSink, MemorySink, Sink};
pub use guest_logs::{
    EventLogs, GuestLog, GuestLogSink, LogFanout, LogLevel, LogLimits, LogOrigin, MemoryLogs, TracingLogs,
};
pub use logging::{Format, init};
pub use running::RunningSink;
