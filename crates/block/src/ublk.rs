//! ublk, the kernel's faster door to block devices in user space (`Documentation/block/ublk.rst`).

use std::path::Path;

/// What this host and this version make of ublk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ublk {
    /// The kernel has it (`/dev/ublk-control`). Nidus does not use it yet: disks go through NBD.
    PresentUnused,
    /// The kernel has it not.
    Absent,
}

impl std::fmt::Display for Ublk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::PresentUnused => "the kernel has ublk, which is not used yet: disks go through NBD",
            Self::Absent => {
                "the kernel has no ublk, which would not be used yet anyway: disks go through NBD"
            }
        })
    }
}

/// Looks for the driver's control device.
pub fn probe() -> Ublk {
    probe_at(Path::new("/dev/ublk-control"))
}

fn probe_at(control: &Path) -> Ublk {
    if control.exists() { Ublk::PresentUnused } else { Ublk::Absent }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_answers_say_that_it_is_not_used() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (present, absent) = (probe_at(file.path()), probe_at(&file.path().with_extension("gone")));
        assert_eq!((present, absent), (Ublk::PresentUnused, Ublk::Absent));
        assert!([present, absent].iter().all(|u| u.to_string().contains("NBD")));
    }
}
