//! Finding Firecracker: one program, or several versions side by side as `{dir}/{version}/firecracker`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::guest::version_key;
use crate::{Result, VmmError};

/// Lowest version: since 1.13 a load can ask for the account of written pages by the name used
/// here, and since 1.12 a tap can be given another name.
const MINIMUM: (u32, u32) = (1, 13);
const MINIMUM_TEXT: &str = "1.13";
/// A program that does not tell its version by then is not Firecracker.
const VERSION_LIMIT: Duration = Duration::from_secs(10);

/// A Firecracker that was seen to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The file.
    pub path: PathBuf,
    /// What it says of itself, such as `1.16.1`.
    pub version: String,
}

/// Finds the program: `place` is it, or is a directory with one for each version. In a directory
/// `wanted` (with or without a `v`) is taken, or else the newest.
///
/// # Errors
/// [`VmmError::NoFirecracker`], [`VmmError::TooOld`], [`VmmError::NotStatic`].
pub async fn find(place: &Path, wanted: Option<&str>) -> Result<Program> {
    let missing = |reason: &str| VmmError::NoFirecracker {
        place: place.display().to_string(),
        reason: reason.to_owned(),
    };
    let path = if place.is_dir() {
        let names = versions(place);
        let named = |w: &str| names.iter().find(|n| n.trim_start_matches('v') == w.trim_start_matches('v'));
        let name = match wanted {
            Some(w) => {
                let have = names.join(", ");
                named(w).ok_or_else(|| missing(&format!("there is no version {w} (there are: {have})")))?
            }
            None => names.last().ok_or_else(|| missing("no VERSION/firecracker is in this directory"))?,
        };
        place.join(name).join("firecracker")
    } else if place.is_file() {
        place.to_owned()
    } else {
        return Err(missing("there is no such file"));
    };
    check_static(&path)?;
    let version = ask_version(&path).await?;
    let mut parts = version.split(['.', '-']).map_while(|p| p.parse::<u32>().ok());
    let found = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if found < MINIMUM {
        return Err(VmmError::TooOld {
            program: path.display().to_string(),
            found: version,
            needed: MINIMUM_TEXT,
            why: "older ones load snapshots in another way",
        });
    }
    Ok(Program { path, version })
}

/// Names of the versions in a directory, oldest first.
pub fn versions(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.path().join("firecracker").is_file())
        .filter_map(|e| e.file_name().into_string().ok())
        .collect();
    names.sort_by_key(|n| version_key(n));
    names
}

async fn ask_version(path: &Path) -> Result<String> {
    let action = || format!("run {} --version", path.display());
    let mut command = Command::new(path);
    command.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
    let out = tokio::time::timeout(VERSION_LIMIT, command.output())
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(|e| VmmError::io(action(), e))?;
    let text = String::from_utf8_lossy(&out.stdout);
    parse_version(&text).ok_or_else(|| {
        VmmError::io(action(), io::Error::new(io::ErrorKind::InvalidData, text.trim().to_owned()))
    })
}

/// `Firecracker v1.16.1` -> `1.16.1`.
fn parse_version(text: &str) -> Option<String> {
    let version = text.lines().next()?.strip_prefix("Firecracker v")?.trim();
    version.starts_with(|c: char| c.is_ascii_digit()).then(|| version.to_owned())
}

/// Number of the program header that names a dynamic linker (elf(5)).
const PT_INTERP: u32 = 3;

/// In the jail there are no libraries and no dynamic linker: exec would say "no such file", which helps
/// nobody.
fn check_static(path: &Path) -> Result<()> {
    let wrap = |e| VmmError::io(format!("read {}", path.display()), e);
    let mut head = Vec::new();
    File::open(path).and_then(|f| f.take(4096).read_to_end(&mut head)).map_err(wrap)?;
    match has_interpreter(&head) {
        Some(false) => Ok(()),
        Some(true) => Err(VmmError::NotStatic { program: path.display().to_string() }),
        None => Err(wrap(io::Error::new(io::ErrorKind::InvalidData, "it is no 64-bit ELF program"))),
    }
}

/// Whether the ELF program asks for a dynamic linker.
fn has_interpreter(head: &[u8]) -> Option<bool> {
    let half = |at: usize| Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?));
    if head.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let start = usize::try_from(u64::from_le_bytes(head.get(32..40)?.try_into().ok()?)).ok()?;
    let (size, count) = (usize::from(half(54)?), usize::from(half(56)?));
    let mut found = false;
    for n in 0..count {
        let at = start.checked_add(n * size)?;
        found |= u32::from_le_bytes(head.get(at..at.checked_add(4)?)?.try_into().ok()?) == PT_INTERP;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn versions_are_read_and_sorted_as_numbers() {
        assert_eq!(parse_version("Firecracker v1.16.1\n\nlog line").as_deref(), Some("1.16.1"));
        assert_eq!(parse_version("QEMU emulator version 10"), None);
        let dir = tempfile::tempdir().unwrap();
        for name in ["v1.9.0", "v1.16.1", "v1.13.0", "empty"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            if name != "empty" {
                fs::write(dir.path().join(name).join("firecracker"), "").unwrap();
            }
        }
        assert_eq!(versions(dir.path()), ["v1.9.0", "v1.13.0", "v1.16.1"]);
    }

    #[tokio::test]
    async fn what_is_missing_is_told_with_the_way_to_get_it() {
        let e = find(Path::new("/nonexistent/fc"), None).await.unwrap_err().to_string();
        assert!(e.contains("/nonexistent/fc/VERSION/firecracker") && e.contains("NIDUS_FIRECRACKER"), "{e}");
        let dir = tempfile::tempdir().unwrap();
        let e = find(dir.path(), Some("1.16.1")).await.unwrap_err().to_string();
        assert!(e.contains("no version 1.16.1"), "{e}");
    }

    #[tokio::test]
    async fn a_script_or_a_dynamic_program_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("script");
        fs::write(&script, "#!/bin/sh\necho Firecracker v9.9\n").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let e = find(&script, None).await.unwrap_err().to_string();
        assert!(e.contains("no 64-bit ELF"), "{e}");
        // This test is a static program, but the system's shell is not.
        let own = fs::read("/proc/self/exe").unwrap();
        assert_eq!(has_interpreter(&own[..4096]), Some(false));
        assert!(matches!(find(Path::new("/bin/sh"), None).await, Err(VmmError::NotStatic { .. })));
    }
}
