//! Guest memory: the private mapping of a template's memfile and what was written to it.
//!
//! A VMM maps a template's [`Memfile`] private (copy-on-write), so that all sandboxes of a template
//! share its unchanged pages through the page cache. [`pagemap::written_ranges`] finds the pages
//! that one sandbox wrote.

mod maps;
mod memfile;
pub mod pagemap;

pub use memfile::{Memfile, MemfileError, PageSize};
