//! What can go wrong with a VMM.

/// Why a VMM did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The VMM's program is not there.
    #[error("{program} was not found. Install it (Debian: apt-get install {package}) or set {variable}")]
    NotInstalled {
        /// What was looked for.
        program: String,
        /// Debian package that has it.
        package: &'static str,
        /// Configuration variable that names another one.
        variable: &'static str,
    },
    /// The program is there but too old.
    #[error("{program} is version {found}, but {needed} or newer is needed: {why}")]
    TooOld {
        /// What was found.
        program: String,
        /// Its version.
        found: String,
        /// Lowest version that works.
        needed: &'static str,
        /// What the older ones lack.
        why: &'static str,
    },
    /// There is no Firecracker where one was looked for.
    #[error(
        "{place}: {reason}. Unpack a release of Firecracker (https://github.com/firecracker-microvm/firecracker/releases) there as {place}/VERSION/firecracker, or set NIDUS_FIRECRACKER to the program or to such a directory"
    )]
    NoFirecracker {
        /// Where it was looked for.
        place: String,
        /// What was found instead.
        reason: String,
    },
    /// The program cannot be run in a jail without libraries.
    #[error(
        "{program} is dynamically linked, but there are no libraries in its jail: use the static program of Firecracker's releases"
    )]
    NotStatic {
        /// The program.
        program: String,
    },
    /// Something was asked for that this driver does not do.
    #[error("{vm}: the {driver} driver cannot {what}")]
    Unsupported {
        /// Name of the VM.
        vm: String,
        /// Name of the driver.
        driver: &'static str,
        /// What it cannot.
        what: String,
    },
    /// A kernel image that no ELF kernel could be taken out of.
    #[error("No kernel could be taken out of {image}: {reason}")]
    KernelImage {
        /// The file.
        image: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A system call or file operation failed.
    #[error("Cannot {action}: {source}")]
    Io {
        /// What was being done, and to what.
        action: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The process ended while something was wanted of it.
    #[error("{vm}: the VMM exited ({status}) while {action}: {log}")]
    Exited {
        /// Name of the VM.
        vm: String,
        /// Exit status.
        status: String,
        /// What was being done.
        action: &'static str,
        /// The last lines of its error output.
        log: String,
    },
    /// The VMM answered a command with an error.
    #[error("{vm}: {command} failed: {message}")]
    Command {
        /// Name of the VM.
        vm: String,
        /// Command that was sent.
        command: String,
        /// The VMM's text.
        message: String,
    },
    /// No answer in time.
    #[error("{vm}: no answer within {seconds} s while {action}")]
    Timeout {
        /// Name of the VM.
        vm: String,
        /// What was being done.
        action: &'static str,
        /// The limit in seconds.
        seconds: u64,
    },
}

impl VmmError {
    /// An [`VmmError::Io`] with what was being done.
    pub fn io(action: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { action: action.into(), source }
    }
}

/// Result of this crate.
pub type Result<T, E = VmmError> = std::result::Result<T, E>;
