//! Block devices of sandboxes: header (build map), copy-on-write overlay, NBD server.
//!
//! A sandbox's disk is an [`Overlay`] over a read-only device (a [`FileDevice`] on the template's
//! root file system, or a [`MappedDevice`] for a build that stores only what differs from its
//! parent), given to the VMM by an [`nbd::NbdServer`]. A [`header::Header`] says which build stores
//! which range of a device; a [`DiffWriter`] makes the next one, [`compact`] keeps it short.
//!
//! Devices are asynchronous. What can be answered without waiting for a disk is answered on the
//! caller's thread; everything else runs on the runtime's blocking threads.
#![forbid(unsafe_code)]

mod bitmap;
mod checked;
mod compact;
mod device;
mod diff;
mod file;
pub mod header;
mod layers;
mod mapped;
pub mod nbd;
mod overlay;
mod source;
pub mod ublk;

pub use bitmap::DirtyBlocks;
pub use compact::{compact, wants_compaction};
pub use device::{BlockDevice, BlockError, ReadDevice, Zeroing};
pub use diff::{Diff, DiffWriter};
pub use file::FileDevice;
pub use layers::Frozen;
pub use mapped::MappedDevice;
pub use overlay::{BLOCK_SIZE, Overlay};
