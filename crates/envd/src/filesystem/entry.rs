//! What is told of a file.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nidus_envd_protocol::filesystem::{EntryInfo, FileType};

use crate::paths;
use crate::users::Names;

/// Prefix of the extended attributes that hold a file's metadata.
const ATTRIBUTE: &str = "user.e2b.";
/// Names and values of one file's attributes are bounded by the kernel (xattr(7)).
const MAX_ATTRIBUTES: usize = 64 << 10;

/// Looks at `path` itself; of a symbolic link, type and mode are the target's.
pub fn read(path: &Path, names: &Names) -> io::Result<EntryInfo> {
    Ok(of(path, &fs::symlink_metadata(path)?, names))
}

/// As [`read`], for what was already looked at.
pub fn of(path: &Path, own: &Metadata, names: &Names) -> EntryInfo {
    let mut symlink_target = None;
    let (kind, mode) = if own.file_type().is_symlink() {
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        symlink_target = Some(target.to_string_lossy().into_owned());
        match fs::metadata(path) {
            Ok(m) => (kind(&m), m.mode()),
            // It leads nowhere.
            Err(_) => (FileType::Unspecified, 0),
        }
    } else {
        (kind(own), own.mode())
    };
    EntryInfo {
        name: paths::base(path),
        r#type: kind.into(),
        path: path.to_string_lossy().into_owned(),
        size: own.len().cast_signed(),
        mode: mode & 0o777,
        permissions: permissions(own),
        owner: names.user(own.uid()),
        group: names.group(own.gid()),
        modified_time: Some(pbjson_types::Timestamp {
            seconds: own.mtime(),
            nanos: i32::try_from(own.mtime_nsec()).unwrap_or(0),
        }),
        symlink_target,
        metadata: if own.is_file() { metadata(path) } else { HashMap::new() },
    }
}

fn kind(m: &Metadata) -> FileType {
    if m.is_dir() {
        FileType::Directory
    } else if m.is_file() {
        FileType::File
    } else {
        FileType::Unspecified
    }
}

/// As Go's `FileMode.String` writes it, which clients show: letters of the type and of special
/// bits, a dash when there are none, then nine of `rwx`.
fn permissions(m: &Metadata) -> String {
    let (kind, mode) = (m.file_type(), m.mode());
    let mut text = String::new();
    for (is, letters) in [
        (kind.is_dir(), "d"),
        (kind.is_symlink(), "L"),
        (kind.is_block_device(), "D"),
        (kind.is_char_device(), "Dc"),
        (kind.is_fifo(), "p"),
        (kind.is_socket(), "S"),
        (mode & 0o4000 != 0, "u"),
        (mode & 0o2000 != 0, "g"),
        (mode & 0o1000 != 0, "t"),
    ] {
        if is {
            text.push_str(letters);
        }
    }
    if text.is_empty() {
        text.push('-');
    }
    for (i, letter) in "rwxrwxrwx".chars().enumerate() {
        text.push(if mode & (0o400 >> i) != 0 { letter } else { '-' });
    }
    text
}

/// Metadata that came with the upload.
pub fn metadata(path: &Path) -> HashMap<String, String> {
    let mut list = vec![0u8; MAX_ATTRIBUTES];
    let Ok(len) = rustix::fs::listxattr(path, &mut list[..]) else { return HashMap::new() };
    let names = list[..len].split(|b| *b == 0).filter_map(|n| std::str::from_utf8(n).ok());
    let mut all = HashMap::new();
    for name in names {
        let Some(key) = name.strip_prefix(ATTRIBUTE) else { continue };
        let mut value = vec![0u8; 4096];
        if let Ok(len) = rustix::fs::getxattr(path, name, &mut value[..]) {
            all.insert(key.to_owned(), String::from_utf8_lossy(&value[..len]).into_owned());
        }
    }
    all
}

/// Replaces a file's metadata.
pub fn set_metadata(path: &Path, metadata: &HashMap<String, String>) -> io::Result<()> {
    for old in self::metadata(path).into_keys().filter(|k| !metadata.contains_key(k)) {
        rustix::fs::removexattr(path, format!("{ATTRIBUTE}{old}"))?;
    }
    for (key, value) in metadata {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(path, format!("{ATTRIBUTE}{key}"), value.as_bytes(), flags)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn files_folders_and_links() {
        let dir = tempfile::tempdir().unwrap();
        let names = Names::read();
        let file = dir.path().join("a ü");
        fs::write(&file, b"12345").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o4640)).unwrap();
        let e = read(&file, &names).unwrap();
        assert_eq!((e.name.as_str(), e.size, e.mode), ("a ü", 5, 0o640));
        assert_eq!(e.permissions, "urw-r-----");
        assert_eq!(e.r#type, i32::from(FileType::File));
        symlink("a ü", dir.path().join("link")).unwrap();
        let e = read(&dir.path().join("link"), &names).unwrap();
        assert_eq!(e.r#type, i32::from(FileType::File));
        assert!(e.permissions.starts_with('L'));
        assert_eq!(e.symlink_target, fs::canonicalize(&file).unwrap().to_str().map(str::to_owned));
        symlink("nowhere", dir.path().join("broken")).unwrap();
        let e = read(&dir.path().join("broken"), &names).unwrap();
        assert_eq!(e.r#type, i32::from(FileType::Unspecified));
        assert_eq!(read(dir.path(), &names).unwrap().r#type, i32::from(FileType::Directory));
    }
}
