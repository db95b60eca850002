//! Guest memory: the memfile, what was written to its private mapping, and memory served by page faults.
//!
//! A VMM maps a template's [`Memfile`] private (copy-on-write), so that all sandboxes of a template
//! share its unchanged pages through the page cache. [`pagemap::written_ranges`] finds the pages
//! that one sandbox wrote; [`ProcessMemory`] reads and changes them. A VMM that resumes through userfaultfd (Firecracker) is served by [`uffd`].

mod maps;
mod memfile;
pub mod pagemap;
mod patch;
pub mod uffd;

pub use memfile::{Memfile, MemfileError, PageSize};
pub use pagemap::PagemapError;
pub use patch::{PatchError, ProcessMemory};
