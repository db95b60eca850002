//! State files of a VM whose memory is a private mapping.
//!
//! QEMU's migration stream has the memory of such a VM in it, all of it. Another command of QEMU's
//! (`xen-save-devices-state`, which has nothing to do with Xen but its name) writes the sections of
//! devices and processors alone, in the same format but without what frames them in a migration: the
//! section that tells the machine's configuration and, at the end, the description for debuggers.
//! [`complete`] puts both back, so that one kind of load serves every state file. The format is told
//! in QEMU's docs/devel/migration ("Stream structure").

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use nix::sys::memfd::{MFdFlags, memfd_create};

/// "QEVM", version 3.
const MAGIC: [u8; 8] = [0x51, 0x45, 0x56, 0x4d, 0, 0, 0, 3];
const EOF: u8 = 0x00;
const SUBSECTION: u8 = 0x05;
const DESCRIPTION: u8 = 0x06;
const CONFIGURATION: u8 = 0x07;
/// A microvm's devices have some 60 KiB of state. It comes from a process that may be hostile.
const MAX_STATE: u64 = 64 << 20;
/// The name of a machine and the capabilities in use.
const MAX_CONFIGURATION: usize = 4096;

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file operation.
    #[error("the state file cannot be read or written: {0}")]
    Io(#[from] io::Error),
    /// Not in QEMU's format.
    #[error("the state is not in QEMU's format: {0}")]
    Malformed(&'static str),
}

/// A file in memory.
pub fn scratch() -> io::Result<File> {
    Ok(File::from(memfd_create(c"nidus-state", MFdFlags::MFD_CLOEXEC)?))
}

/// What a state says of the machine that [`super::args::arguments`] starts: its name, and that
/// memory in a file is not part of the state. A machine that was booted has loaded no state that says so.
pub const BOOTED: &[u8] = b"\x07\0\0\0\x07microvm\
    \x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared";

/// The section of a state file that says for which machine it is; the file's position is at its
/// beginning before and after.
pub fn configuration(mut file: &File) -> Result<Vec<u8>, StateError> {
    let mut head = Vec::with_capacity(MAX_CONFIGURATION);
    file.take(MAX_CONFIGURATION as u64).read_to_end(&mut head)?;
    file.seek(SeekFrom::Start(0))?;
    let Some(rest) = head.strip_prefix(&MAGIC) else {
        return Err(StateError::Malformed("it does not begin as one"));
    };
    let len = section(rest).ok_or(StateError::Malformed("it does not say for which machine it is"))?;
    Ok(rest[..len].to_vec())
}

/// Length of the configuration section that `bytes` begin with.
fn section(bytes: &[u8]) -> Option<usize> {
    let mut at = Cursor(bytes);
    if at.byte()? != CONFIGURATION {
        return None;
    }
    let name = at.number()?;
    at.skip(name)?;
    while at.0.first() == Some(&SUBSECTION) {
        at.byte()?;
        let id = at.counted()?;
        // Version of the subsection.
        at.number()?;
        match id {
            b"configuration/target-page-bits" => at.skip(4)?,
            b"configuration/uuid" => at.skip(16)?,
            b"configuration/capabilities" => {
                for _ in 0..at.number()? {
                    at.counted()?;
                }
            }
            _ => return None,
        }
    }
    Some(bytes.len() - at.0.len())
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn skip(&mut self, len: usize) -> Option<()> {
        self.0 = self.0.get(len..)?;
        Some(())
    }

    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self) -> Option<usize> {
        let (number, rest) = self.0.split_first_chunk::<4>()?;
        self.0 = rest;
        usize::try_from(u32::from_be_bytes(*number)).ok()
    }

    /// Bytes after their number in one byte.
    fn counted(&mut self) -> Option<&'a [u8]> {
        let len = usize::from(self.byte()?);
        let (text, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(text)
    }
}

/// Writes the devices' state in `devices` to `out` in the form that is loaded.
pub fn complete(mut devices: &File, configuration: &[u8], mut out: &File) -> Result<(), StateError> {
    if configuration.is_empty() {
        return Err(StateError::Malformed("no state was loaded before"));
    }
    let mut state = Vec::new();
    devices.seek(SeekFrom::Start(0))?;
    devices.take(MAX_STATE + 1).read_to_end(&mut state)?;
    if state.len() as u64 > MAX_STATE {
        return Err(StateError::Malformed("it has more than 64 MiB"));
    }
    let Some(sections) = state.strip_prefix(&MAGIC) else {
        return Err(StateError::Malformed("it does not begin as one"));
    };
    if sections.last() != Some(&EOF) {
        return Err(StateError::Malformed("it is cut short"));
    }
    out.write_all(&MAGIC)?;
    out.write_all(configuration)?;
    out.write_all(sections)?;
    // An empty one: the reader looks for it after the end.
    out.write_all(&[DESCRIPTION, 0, 0, 0, 0])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(parts: &[&[u8]]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        parts.iter().for_each(|p| file.write_all(p).unwrap());
        file.seek(SeekFrom::Start(0)).unwrap();
        file
    }

    #[test]
    fn a_state_of_devices_gets_the_machine_of_the_state_before_it() {
        let before = file(&[&MAGIC, BOOTED, b"\x04section", &[EOF]]);
        let configuration = configuration(&before).unwrap();
        assert_eq!(configuration, BOOTED);
        let (devices, mut out) = (file(&[&MAGIC, b"\x04other", &[EOF]]), file(&[]));
        complete(&devices, &configuration, &out).unwrap();
        out.seek(SeekFrom::Start(0)).unwrap();
        let mut bytes = Vec::new();
        out.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, [&MAGIC[..], BOOTED, b"\x04other", &[EOF], b"\x06\0\0\0\0"].concat());
    }

    #[test]
    fn what_is_not_a_state_is_refused() {
        let whole = [&MAGIC[..], BOOTED].concat();
        for len in 0..whole.len() {
            // A section ends before a subsection or after it, and nowhere else.
            let found = configuration(&file(&[&whole[..len]]));
            assert!(found.is_err() || found.unwrap().len() == 12, "{len}");
        }
        assert!(configuration(&file(&[&MAGIC, b"\x07\0\0\0\x01m\x05\x01?\0\0\0\x01"])).is_err());
        let out = file(&[]);
        assert!(complete(&file(&[&MAGIC, b"\x04cut"]), BOOTED, &out).is_err());
        assert!(complete(&file(&[b"junk"]), BOOTED, &out).is_err());
        assert!(complete(&file(&[&MAGIC, &[EOF]]), &[], &out).is_err());
    }
}
