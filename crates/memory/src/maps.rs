//! The mappings of a process: `/proc/PID/maps`, as in proc_pid_maps(5).

use std::{fs, io, ops::Range, os::unix::fs::MetadataExt};

use nix::libc::{major, minor};

/// A mapping of a file in a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Addresses in the process.
    pub(crate) addresses: Range<u64>,
    /// Where in the file the mapping begins, in bytes.
    pub(crate) offset: u64,
    /// Copy-on-write, as opposed to shared.
    pub(crate) private: bool,
    dev: (u32, u32),
    ino: u64,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let permissions = fields.next()?;
        let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let ino = fields.next()?.parse().ok()?;
        Some(Self {
            addresses: u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?,
            offset,
            private: permissions.ends_with('p'),
            dev: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
            ino,
        })
    }

    fn len(&self) -> u64 {
        self.addresses.end.saturating_sub(self.addresses.start)
    }

    /// The part of the file that is mapped.
    pub(crate) fn file_range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.len())
    }
}

/// The mappings of the file with this device and inode in a process, in the order of addresses.
pub(crate) fn mappings_of(pid: u32, (dev, ino): (u64, u64)) -> io::Result<Vec<Mapping>> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let same_file = |m: &Mapping| {
        // On file systems with several devices behind one (btrfs, overlay) `maps` shows another
        // device than stat(2) does; the link to the mapped file settles it.
        m.ino == ino
            && (m.dev == (major(dev), minor(dev)) || {
                let Range { start, end } = m.addresses;
                let link = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
                fs::metadata(link).is_ok_and(|meta| (meta.dev(), meta.ino()) == (dev, ino))
            })
    };
    Ok(text.lines().filter_map(Mapping::parse).filter(same_file).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_all_kinds_are_read() {
        let line = "7f1c08000000-7f1c18000000 rw-p 00200000 fe:0a 1234567    /var/lib/a b (deleted)";
        let m = Mapping::parse(line).unwrap();
        assert_eq!(m.addresses, 0x7f1c_0800_0000..0x7f1c_1800_0000);
        assert_eq!((m.offset, m.private, m.dev, m.ino), (0x20_0000, true, (0xfe, 0x0a), 1_234_567));
        assert_eq!(m.file_range(), 0x20_0000..0x1020_0000);
        assert!(!Mapping::parse("00400000-00401000 r--s 00000000 08:02 5 /x").unwrap().private);
        let vsyscall = "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]";
        assert_eq!(Mapping::parse(vsyscall).unwrap().ino, 0);
        for broken in ["", "x", "1-2", "1-2 rw-p zz 0:0 1", "1 rw-p 0 0:0 1"] {
            assert_eq!(Mapping::parse(broken), None);
        }
    }
}
