//! Block devices of sandboxes: header (build map), copy-on-write overlay, NBD server.
//!
//! A sandbox's disk is an [`Overlay`] over a read-only device (a [`FileDevice`] on the template's
//! root file system), given to the VMM by an [`nbd::NbdServer`]. A [`header::Header`] says which
//! build stores which range of a device.
//!
//! Devices are asynchronous. What can be answered without waiting for a disk is answered on the
//! caller's thread; everything else runs on the runtime's blocking threads.
#![forbid(unsafe_code)]

mod bitmap;
mod device;
mod file;
pub mod header;
pub mod nbd;
mod overlay;
pub mod ublk;

pub use bitmap::DirtyBlocks;
pub use device::{BlockDevice, BlockError, ReadDevice, Zeroing};
pub use file::FileDevice;
pub use overlay::{BLOCK_SIZE, Overlay};
