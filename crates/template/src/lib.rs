//! What a template is, and how one is built.
//!
//! A template is a directory of artifacts in storage: root disk, guest memory, device state and
//! [`TemplateMetadata`]. It is built once ([`Builder`]): a root file system is made, a VM boots
//! it, and when envd answers the VM is stopped and saved. Sandboxes resume from there; what a disk alone
//! is booted with comes from here too ([`BootFiles`]).

mod boot;
mod boot_files;
mod build;
mod command;
mod disk;
mod host;
mod image;
mod kernel;
mod metadata;
mod registry_rootfs;
mod rootfs;

pub use boot::limits;
pub use boot_files::BootFiles;
pub use build::{
    BuildConfig, BuildError, BuildLog, BuildRequest, Builder, Level, Log, READY_LIMIT, Source, check_sizes,
};
pub use disk::DiskServer;
pub use host::{DiskError, RootDisk, VmHost, tap_mode};
pub use image::{identity as image_identity, make as make_image};
pub use kernel::ensure as ensure_kernel;
pub use metadata::{Context, GuestState, MetadataError, Start, TemplateMetadata};
