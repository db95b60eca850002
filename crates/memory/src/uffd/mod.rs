//! Guest memory served page by page through userfaultfd.
//!
//! A VMM that resumes a snapshot (Firecracker's UFFD backend) maps memory without content,
//! registers it with a userfaultfd and hands that over, with the layout, on a Unix socket: the
//! [`Handshake`]. A [`Handler`] then answers each page fault of the VM from a [`PageSource`].
//!
//! What it promises:
//! - **Never a wrong byte.** A page gets the source's bytes, or zeros if the source says so or the
//!   VM has given the page up (balloon). What cannot be read, after bounded attempts within a
//!   deadline, ends the handler with an error that names offset and cause; the VM's threads stay
//!   blocked, and the owner kills it. The userfaultfd stays open until the [`Handler`] is dropped,
//!   because the kernel answers the faults of a closed one with zeros: **kill the VM first**.
//! - **No VM holds up another.** Each has its own threads for everything that enters its memory,
//!   since a VMM that was taken over can make such a call wait (by holding its memory map's lock).
//!   Only reads of the source run on the shared runtime.
//! - **A slow page holds up no other.** Cached pages are answered at once; misses are fetched by
//!   concurrent tasks, of a bounded number.
//!
//! ## Removed pages
//! The kernel announces that pages lose their content (madvise with MADV_DONTNEED, what a balloon
//! does) by an event; the process waits until that is *read*, then drops the pages. A copy of old
//! content that was decided on before the event was read must not come after the drop. So reading
//! events excludes copying (`Vm::intake`): a copy comes wholly before the read, and is then dropped
//! with the rest, or after what was read has been noted, and then is a page of zeros. While
//! such an event waits the kernel refuses copies with EAGAIN; they are put off and tried again.

mod bitmap;
mod error;
mod fault;
mod fetch;
mod handler;
mod handshake;
mod layout;
mod live;
mod metrics;
mod prefetch;
mod process;
mod protect;
mod reader;
mod recording;
mod source;
mod sys;
mod vm;

pub use bitmap::PageSet;
pub use error::{End, HandlerError, SnapshotError, StartError, Violation};
pub use handler::{Config, Handler, Touched};
pub use handshake::{Handshake, HandshakeError};
pub use layout::{Layout, LayoutError, MAX_MESSAGE, MAX_REGIONS, Region};
pub use live::{LiveSnapshot, PageSink, Saved};
pub use metrics::MetricsSnapshot;
pub use prefetch::{OtherMemory, Prefetch};
pub use process::Process;
pub use recording::{MAX_RECORDED, Recorded, Recording, RecordingError};
pub use source::{Cached, Content, Fetched, Origin, PageSource, SourceError};
