//! The names of what is stored: builds and their artifacts.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The identity of a build: a template's or a snapshot's.
///
/// It is always printed in the hyphenated lower-case form, which is also the name of the build's
/// directory: no text of a caller ever becomes a path.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BuildId(Uuid);

impl BuildId {
    /// The nil id. In a header (see the `block` crate) it names a range of zeros, never a build.
    pub const NIL: Self = Self(Uuid::nil());

    /// A new random id (UUID version 4).
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// The id whose 16 bytes, in network order, are these.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    /// The 16 bytes of the id, in network order.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// Whether this is [`BuildId::NIL`].
    pub const fn is_nil(&self) -> bool {
        self.0.is_nil()
    }

    /// The id as a UUID.
    pub const fn as_uuid(&self) -> Uuid {
        self.0
    }
}

impl From<Uuid> for BuildId {
    fn from(id: Uuid) -> Self {
        Self(id)
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.hyphenated(), f)
    }
}

impl fmt::Debug for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not a UUID was given as a build id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a build id: a UUID is expected")]
pub struct InvalidBuildId {
    /// The text, cut at 64 characters.
    text: String,
}

impl FromStr for BuildId {
    type Err = InvalidBuildId;

    /// Reads any of the usual text forms of a UUID.
    fn from_str(text: &str) -> Result<Self, InvalidBuildId> {
        match Uuid::try_parse(text) {
            Ok(id) => Ok(Self(id)),
            Err(_) => Err(InvalidBuildId { text: text.chars().take(64).collect() }),
        }
    }
}

/// One file of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Artifact {
    /// The blocks of the root file system that this build stores itself.
    Rootfs,
    /// Which build stores which range of the root file system.
    RootfsHeader,
    /// The pages of guest memory that this build stores itself.
    Memfile,
    /// Which build stores which range of guest memory.
    MemfileHeader,
    /// The state of the VMM's devices and processors.
    Snapfile,
    /// What the build is: see the `template` crate. Every build has it.
    Metadata,
    /// What the others must add up to. The store makes it when it publishes a build.
    Checksums,
}

impl Artifact {
    /// Every artifact, in the order of the contract; what is ours alone comes last.
    pub const ALL: [Self; 7] = [
        Self::Rootfs,
        Self::RootfsHeader,
        Self::Memfile,
        Self::MemfileHeader,
        Self::Snapfile,
        Self::Metadata,
        Self::Checksums,
    ];

    /// The artifact's file name within its build's directory.
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Rootfs => "rootfs.ext4",
            Self::RootfsHeader => "rootfs.ext4.header",
            Self::Memfile => "memfile",
            Self::MemfileHeader => "memfile.header",
            Self::Snapfile => "snapfile",
            Self::Metadata => "metadata.json",
            Self::Checksums => "checksums",
        }
    }
}

impl fmt::Display for Artifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.file_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "0f8fad5b-d9cb-469f-a165-70867728950e";

    #[test]
    fn an_id_prints_as_it_was_read_whatever_form_it_was_read_in() {
        for form in [TEXT.to_owned(), TEXT.to_uppercase(), TEXT.replace('-', ""), format!("{{{TEXT}}}")] {
            assert_eq!(form.parse::<BuildId>().unwrap().to_string(), TEXT);
        }
        let id: BuildId = TEXT.parse().unwrap();
        assert_eq!(BuildId::from_bytes(*id.as_bytes()), id);
        assert_eq!(serde_json::to_string(&id).unwrap(), format!("\"{TEXT}\""));
        assert_eq!(serde_json::from_str::<BuildId>(&format!("\"{TEXT}\"")).unwrap(), id);
    }

    #[test]
    fn what_could_leave_the_directory_is_not_an_id() {
        for text in
            ["", "..", "../../etc/passwd", "/etc", ".staging", "0f8fad5b-d9cb-469f-a165-70867728950e/.."]
        {
            assert!(text.parse::<BuildId>().is_err(), "{text}");
        }
        let long = "x".repeat(100_000).parse::<BuildId>().unwrap_err();
        assert!(long.to_string().len() < 200);
    }
}
