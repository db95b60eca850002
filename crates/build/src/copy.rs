//! COPY in the guest.

use std::io::Read;
use std::path::Path;

use crate::PipelineError;
use crate::guest::Guest;

/// What is copied.
pub(crate) struct Copy<'a> {
    pub source: &'a str,
    pub target: &'a str,
    pub owner: &'a str,
    pub mode: Option<u32>,
    /// Where relative targets lie.
    pub directory: &'a str,
    /// The archive, on this host.
    pub archive: &'a Path,
}

/// What tar is told to do with an archive that begins so.
fn unpack(archive: &Path) -> std::io::Result<&'static str> {
    let mut magic = [0; 2];
    let n = std::fs::File::open(archive)?.read(&mut magic)?;
    Ok(if magic[..n] == [0x1f, 0x8b] { "-xzf" } else { "-xf" })
}

/// Directories can be entered by those who may read them.
fn directory_mode(mode: u32) -> u32 {
    mode | ((mode & 0o444) >> 2)
}

pub(crate) async fn copy(guest: &Guest<'_>, what: &str, c: &Copy<'_>) -> Result<(), PipelineError> {
    let archive = c.archive.to_owned();
    let read = |e| PipelineError::io(format!("read {}", c.archive.display()), e);
    let unpack = tokio::task::spawn_blocking(move || unpack(&archive)).await;
    let unpack = unpack.unwrap_or_else(|e| Err(std::io::Error::other(e))).map_err(read)?;
    let (file, dir) = match c.mode {
        None => (String::new(), String::new()),
        Some(mode) => (format!("{mode:04o}"), format!("{:04o}", directory_mode(mode))),
    };
    let words = [c.source, c.target, c.owner, &file, &dir, unpack, c.directory];
    guest.script_with_input(what, include_str!("copy.sh"), &words, c.archive).await
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::path::PathBuf;
    use std::process::{Command, Stdio};

    use super::*;

    /// Runs the script on this host, into a directory of its own.
    fn run(source: &str, target: &str, mode: &str) -> (bool, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let context = dir.path().join("context");
        for file in ["app/main.py", "app/lib/x.py", "app/.hidden", "one.txt", "two.txt"] {
            let path = context.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, file).unwrap();
        }
        std::os::unix::fs::symlink("one.txt", context.join("link")).unwrap();
        let archive = dir.path().join("archive");
        let tar = Command::new("tar").arg("-czf").arg(&archive).arg("-C").arg(&context).arg(".").status();
        assert!(tar.unwrap().success());
        let owner = Command::new("id").arg("-un").output().unwrap();
        let owner = String::from_utf8(owner.stdout).unwrap();
        let out = dir.path().join("out");
        std::fs::create_dir(&out).unwrap();
        let done = Command::new("bash")
            .args(["-c", include_str!("copy.sh"), "nidus", source, target, owner.trim(), mode, mode])
            .args([unpack(&archive).unwrap(), out.to_str().unwrap()])
            .stdin(std::fs::File::open(&archive).unwrap())
            .stderr(Stdio::null())
            .status();
        (done.unwrap().success(), dir)
    }

    fn files(dir: &tempfile::TempDir) -> Vec<String> {
        let root = dir.path().join("out");
        let (mut found, mut todo): (Vec<String>, Vec<PathBuf>) = (Vec::new(), vec![root.clone()]);
        while let Some(dir) = todo.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    todo.push(path);
                } else {
                    found.push(path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned());
                }
            }
        }
        found.sort();
        found
    }

    #[test]
    fn files_go_where_docker_puts_them() {
        for (source, target, expected) in [
            ("app", "x", &["x/.hidden", "x/lib/x.py", "x/main.py"][..]),
            ("./app/", "x/", &["x/.hidden", "x/lib/x.py", "x/main.py"]),
            ("one.txt", "a/b", &["a/b"]),
            ("one.txt", "a/b/", &["a/b/one.txt"]),
            ("one.txt", ".", &["one.txt"]),
            ("*.txt", "a", &["a/one.txt", "a/two.txt"]),
            ("app/**/*.py", "a", &["a/main.py", "a/x.py"]),
            ("link", "a/", &["a/link"]),
        ] {
            let (ok, dir) = run(source, target, "");
            assert!(ok, "{source}");
            assert_eq!(files(&dir), expected, "{source} {target}");
        }
        let (ok, dir) = run(".", "all", "");
        assert!(ok && files(&dir).len() == 6);
        assert!(!run("nothing", "x", "").0);
        assert!(!run("no*", "x", "").0);
    }

    #[test]
    fn modes_are_set_and_links_stay_links() {
        let (ok, dir) = run("app", "x", "0700");
        assert!(ok);
        let mode = |p: &str| std::fs::metadata(dir.path().join("out").join(p)).unwrap().permissions().mode();
        assert_eq!((mode("x/main.py") & 0o7777, mode("x/lib") & 0o7777), (0o700, 0o700));
        assert_eq!(directory_mode(0o644), 0o755);
        let (_, dir) = run("link", "l", "");
        let link = std::fs::symlink_metadata(dir.path().join("out/l")).unwrap();
        assert!(link.file_type().is_symlink() && link.uid() == std::fs::metadata(dir.path()).unwrap().uid());
    }
}
