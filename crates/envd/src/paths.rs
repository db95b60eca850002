//! Paths as clients give them, and directories made for a user.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Component, Path, PathBuf};

use crate::users::User;

/// A path that means nothing.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// `~name`.
    #[error("cannot expand '{0}': only '~' and '~/…' are known, not another user's home")]
    OtherHome(String),
    /// No path has a zero byte.
    #[error("the path has a zero byte")]
    Nul,
}

/// The absolute path that `path` means for `user`: `~` is the home, relative paths start there.
/// An empty path is `default`, or the home.
pub fn resolve(path: &str, user: &User, default: Option<&str>) -> Result<PathBuf, PathError> {
    let path = if path.is_empty() { default.unwrap_or_default() } else { path };
    if path.contains('\0') {
        return Err(PathError::Nul);
    }
    let home = Path::new(&user.home);
    if let Some(rest) = path.strip_prefix('~') {
        if !rest.is_empty() && !rest.starts_with('/') {
            return Err(PathError::OtherHome(path.to_owned()));
        }
        return Ok(clean(&home.join(rest.trim_start_matches('/'))));
    }
    // An absolute path is the kernel's to resolve: `..` behind a symbolic link is not lexical.
    if path.starts_with('/') {
        return Ok(PathBuf::from(path));
    }
    Ok(clean(&Path::new("/").join(home).join(path)))
}

/// Without `.` and `..`, by the letters alone.
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            _ => {}
        }
    }
    out
}

/// Last part of a path, as E2B names an entry; `/` for the root.
pub fn base(path: &Path) -> String {
    path.file_name().map_or_else(|| "/".to_owned(), |n| n.to_string_lossy().into_owned())
}

/// Makes `path` and the directories above it; the new ones belong to the user.
pub fn ensure_dirs(path: &Path, uid: u32, gid: u32) -> io::Result<()> {
    let missing: Vec<&Path> = path.ancestors().take_while(|p| !p.is_dir()).collect();
    for dir in missing.into_iter().rev() {
        if dir.as_os_str().is_empty() {
            continue;
        }
        match fs::DirBuilder::new().mode(0o755).create(dir) {
            Ok(()) => {}
            // Another request was faster; it may not have changed the owner yet.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(io::Error::new(
                    io::ErrorKind::NotADirectory,
                    format!("path is a file: {}", dir.display()),
                ));
            }
            Err(e) => {
                return Err(io::Error::new(
                    e.kind(),
                    format!("cannot make directory {}: {e}", dir.display()),
                ));
            }
        }
        chown(dir, Some(uid), Some(gid))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> User {
        User {
            name: "user".into(),
            uid: 1000,
            gid: 1000,
            home: "/home/user".into(),
            shell: "/bin/sh".into(),
            groups: vec![1000],
        }
    }

    #[test]
    fn paths_start_at_home() {
        let at = |p| resolve(p, &user(), None).unwrap();
        assert_eq!(at("a b/ü"), Path::new("/home/user/a b/ü"));
        assert_eq!(at("../x/./y"), Path::new("/home/x/y"));
        assert_eq!(at("~"), Path::new("/home/user"));
        assert_eq!(at("~/a"), Path::new("/home/user/a"));
        assert_eq!(at("/tmp/../etc"), Path::new("/tmp/../etc"));
        assert_eq!(at(""), Path::new("/home/user"));
        assert_eq!(resolve("", &user(), Some("/work")).unwrap(), Path::new("/work"));
        assert!(matches!(resolve("~root/x", &user(), None), Err(PathError::OtherHome(_))));
        assert!(matches!(resolve("/a\0", &user(), None), Err(PathError::Nul)));
    }

    #[test]
    fn directories_are_made_and_files_in_the_way_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let deep = dir.path().join("a/b/c");
        ensure_dirs(&deep, uid, gid).unwrap();
        ensure_dirs(&deep, uid, gid).unwrap();
        assert!(deep.is_dir());
        fs::write(dir.path().join("f"), b"").unwrap();
        let error = ensure_dirs(&dir.path().join("f/g"), uid, gid).unwrap_err();
        assert!(error.to_string().contains("/f"), "{error}");
    }
}
