//! Why a header cannot be read, made or written.

use nidus_storage::BuildId;

use super::Version;

/// Why bytes or mappings are not a valid header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Too short for the fixed part, or cut within a mapping.
    #[error("the header of {0} bytes is cut short")]
    Cut(usize),
    /// A version that this code does not read.
    #[error("the header has version {0}, only 3, 4 and 5 are supported")]
    Version(u64),
    /// The block size is not a power of two of at least 4 KiB.
    #[error("the header's block size of {0} bytes is not a power of two from 4096 on")]
    BlockSize(u64),
    /// The device is empty or too large to be addressed.
    #[error("the header's device size of {0} bytes is not usable")]
    Size(u64),
    /// A mapping is empty, reaches beyond what can be addressed, or is not in 4 KiB units.
    #[error("mapping {index} of the header is not a range of whole 4 KiB units")]
    BadRange {
        /// The mapping's number, from 0.
        index: usize,
    },
    /// A mapping overlaps the one before it, or comes before it.
    #[error("mapping {index} of the header does not come after the one before it")]
    OutOfOrder {
        /// The mapping's number, from 0.
        index: usize,
    },
    /// A part of the device is not mapped.
    #[error("the header does not map the device from byte {0} on")]
    Gap(u64),
    /// A mapping reaches beyond the device's last block.
    #[error("mapping {index} of the header reaches beyond the device")]
    BeyondEnd {
        /// The mapping's number, from 0.
        index: usize,
    },
    /// Flags that this code does not know.
    #[error("the header has unknown flags ({0:#04x})")]
    Flags(u8),
    /// What is compressed cannot be unpacked.
    #[error("the header's compressed part cannot be used: {0}")]
    Lz4(String),
    /// What is compressed has another length than the header says.
    #[error("the header's compressed part does not have the {0} bytes that it is said to have")]
    BlockLength(usize),
    /// What is compressed ends too early.
    #[error("the header's compressed part is cut short")]
    CutBlock,
    /// Bytes after the end.
    #[error("{0} bytes follow the header")]
    Trailing(usize),
    /// More things than fit, or than are accepted.
    #[error("the header states {count} {what}, more than it can have")]
    Count {
        /// What is counted.
        what: &'static str,
        /// How many there are said to be.
        count: u64,
    },
    /// A number that does not fit into 64 bits.
    #[error("a number in the header is too large")]
    Varint,
    /// A mapping of a build id that is not in the header's list.
    #[error("mapping {index} of the header refers to a build that the header does not list")]
    UnknownId {
        /// The mapping's number, from 0.
        index: usize,
    },
    /// A build is described twice.
    #[error("the header describes build {0} twice")]
    Twice(BuildId),
    /// A size that no artifact has.
    #[error("the header gives the artifact of build {build} an unusable size of {size} bytes")]
    StoredSize {
        /// The build.
        build: BuildId,
        /// The size.
        size: u64,
    },
    /// A method of compression that is not known, or frames without one.
    #[error("the header says that build {build} is compressed by method {number}, which is not known")]
    Compression {
        /// The build.
        build: BuildId,
        /// The method's number.
        number: u32,
    },
    /// A frame is empty, too large, or not behind the one before it.
    #[error("frame {index} of build {build} in the header is not a range behind the one before it")]
    BadFrame {
        /// The build.
        build: BuildId,
        /// The frame's number in the header, from 0.
        index: usize,
    },
    /// The version asked for has no room for so much.
    #[error("the header has too many {what} to be written in version {}", *version as u64)]
    Unwritable {
        /// The version.
        version: Version,
        /// What there is too much of.
        what: &'static str,
    },
}
