//! The calls that change or show the tree, as blocking work.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nidus_envd_protocol::connect::{Code, ConnectError};
use nidus_envd_protocol::filesystem::EntryInfo;

use super::{entry, failed, io_error};
use crate::paths::ensure_dirs;
use crate::users::{Names, User};

/// Entries in one answer. A guest has room for more, a message has not.
const MAX_ENTRIES: usize = 100_000;

pub fn stat(path: &Path) -> Result<EntryInfo, ConnectError> {
    entry::read(path, &Names::read()).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => failed(Code::NotFound, format!("file not found: {}", path.display())),
        _ => io_error("look at", path, &e),
    })
}

/// Entries below `path`, down to `depth`, in the order of their names, a folder before what is in it.
/// Symbolic links below are not followed.
pub fn list(path: &Path, depth: u32) -> Result<Vec<EntryInfo>, ConnectError> {
    let own = fs::metadata(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => failed(Code::NotFound, format!("directory not found: {}", path.display())),
        _ => io_error("look at", path, &e),
    })?;
    if !own.is_dir() {
        return Err(failed(Code::InvalidArgument, format!("path is not a directory: {}", path.display())));
    }
    let names = Names::read();
    let mut entries = Vec::new();
    // Children of a folder, last name first, so that the stack gives the first name first.
    let mut stack = children(path)
        .map_err(|e| io_error("list", path, &e))?
        .into_iter()
        .map(|p| (p, 1))
        .collect::<Vec<_>>();
    while let Some((path, level)) = stack.pop() {
        let Ok(own) = fs::symlink_metadata(&path) else { continue }; // Gone meanwhile.
        if entries.len() >= MAX_ENTRIES {
            let text = format!("there are more than {MAX_ENTRIES} entries: list with a smaller depth");
            return Err(failed(Code::ResourceExhausted, text));
        }
        entries.push(entry::of(&path, &own, &names));
        if own.is_dir() && level < depth {
            // One folder that cannot be read does not hide the others.
            stack.extend(children(&path).unwrap_or_default().into_iter().map(|p| (p, level + 1)));
        }
    }
    Ok(entries)
}

fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all: Vec<PathBuf> = fs::read_dir(path)?.flatten().map(|e| e.path()).collect();
    all.sort_unstable_by(|a, b| b.cmp(a));
    Ok(all)
}

pub fn make_dir(path: &Path, user: &User) -> Result<EntryInfo, ConnectError> {
    match fs::metadata(path) {
        Ok(m) if m.is_dir() => {
            return Err(failed(Code::AlreadyExists, format!("directory already exists: {}", path.display())));
        }
        Ok(_) => {
            let text = format!("path already exists but it is not a directory: {}", path.display());
            return Err(failed(Code::InvalidArgument, text));
        }
        Err(_) => {}
    }
    ensure_dirs(path, user.uid, user.gid).map_err(|e| io_error("make", path, &e))?;
    stat(path)
}

pub fn rename(from: &Path, to: &Path, user: &User) -> Result<EntryInfo, ConnectError> {
    if fs::symlink_metadata(from).is_err() {
        return Err(failed(Code::NotFound, format!("source file not found: {}", from.display())));
    }
    if let Some(parent) = to.parent() {
        ensure_dirs(parent, user.uid, user.gid).map_err(|e| io_error("make", parent, &e))?;
    }
    match fs::rename(from, to) {
        // Another file system, such as a tmpfs: mv(1) copies with all attributes and removes then.
        Err(e) if e.kind() == io::ErrorKind::CrossesDevices => {
            let out = std::process::Command::new("mv").arg("-T").arg("--").arg(from).arg(to).output();
            match out {
                Ok(o) if o.status.success() => {}
                Ok(o) => {
                    let text = String::from_utf8_lossy(&o.stderr).trim().to_owned();
                    return Err(failed(Code::Internal, text));
                }
                Err(_) => return Err(io_error("move", from, &e)),
            }
        }
        r => r.map_err(|e| io_error("move", from, &e))?,
    }
    stat(to)
}

/// Removes all of it; what is not there is removed already.
pub fn remove(path: &Path) -> Result<(), ConnectError> {
    let done = match fs::symlink_metadata(path) {
        Ok(m) if m.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match done {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path, &e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> User {
        User {
            name: "u".into(),
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            home: "/".into(),
            shell: "/bin/sh".into(),
            groups: vec![],
        }
    }

    #[test]
    fn a_tree_is_made_listed_moved_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |p: &str| dir.path().join(p);
        make_dir(&at("a/b/c"), &user()).unwrap();
        assert_eq!(make_dir(&at("a"), &user()).unwrap_err().code, Code::AlreadyExists);
        fs::write(at("f"), b"").unwrap();
        assert_eq!(make_dir(&at("f"), &user()).unwrap_err().code, Code::InvalidArgument);
        let names =
            |depth| -> Vec<String> { list(dir.path(), depth).unwrap().into_iter().map(|e| e.name).collect() };
        assert_eq!(names(1), ["a", "f"]);
        assert_eq!(names(9), ["a", "b", "c", "f"]);
        assert_eq!(list(&at("f"), 1).unwrap_err().code, Code::InvalidArgument);
        assert_eq!(list(&at("g"), 1).unwrap_err().code, Code::NotFound);
        assert_eq!(rename(&at("f"), &at("x/y/z"), &user()).unwrap().name, "z");
        assert_eq!(rename(&at("f"), &at("g"), &user()).unwrap_err().code, Code::NotFound);
        remove(&at("a")).unwrap();
        remove(&at("a")).unwrap();
        assert_eq!(names(9), ["x", "y", "z"]);
    }
}
