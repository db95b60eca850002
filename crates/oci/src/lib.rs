//! OCI images: found in a registry, fetched, checked and flattened into one tree of files.
//!
//! An image is hostile input. Nothing of it is unpacked into a directory of this host by the names that it
//! brings: layers are applied to a [`Tree`] in memory, in which links are followed by rules of our own, and only
//! their bytes go to files, under numbers. What comes out at the end is a tree that is written into an empty
//! directory, top down, without following anything ([`Tree::write`]). Sizes and counts are bounded all the way
//! ([`Limits`]).
//!
//! Formats: [image specification](https://github.com/opencontainers/image-spec/blob/main/spec.md) (manifest,
//! index, configuration, layer), [distribution specification](https://github.com/opencontainers/distribution-spec/blob/main/spec.md)
//! (pull), and Docker's media types of the same documents.

mod auth;
mod digest;
mod error;
mod layer;
mod manifest;
mod reference;
mod registry;
mod transport;
mod tree;
mod write;

pub use auth::Credentials;
pub use digest::Digest;
pub use error::OciError;
pub use layer::{Limits, read_layer};
pub use manifest::ImageConfig;
pub use reference::Reference;
pub use registry::{FetchedImage, Image, Registry};
pub use transport::{Denies, RegistryHost, RegistrySettings};
pub use tree::{Meta, Node, Tree, TreeError};
pub use write::{Device, Written};
