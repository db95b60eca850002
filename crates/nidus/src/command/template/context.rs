//! The files of a build's context: what COPY names, without what `.dockerignore` leaves out, as an archive.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use flate2::Compression;
use flate2::write::GzEncoder;
use globset::{GlobBuilder, GlobMatcher};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

/// A directory and what is left out of it.
pub struct BuildContext {
    root: PathBuf,
    /// Each with whether it brings back what an earlier one left out.
    ignored: Vec<(GlobMatcher, bool)>,
}

/// An archive and the hash of what is in it.
pub struct Archive {
    pub file: File,
    pub hash: String,
}

/// `*` stays within a name; a pattern also covers what is below.
fn matcher(pattern: &str) -> anyhow::Result<GlobMatcher> {
    let pattern = pattern.trim_matches('/').trim_start_matches("./");
    let glob = GlobBuilder::new(pattern).literal_separator(true).build();
    Ok(glob.with_context(|| format!("'{pattern}' is no pattern"))?.compile_matcher())
}

impl BuildContext {
    /// The directory `root`, with its `.dockerignore`.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        let root =
            root.canonicalize().with_context(|| format!("There is no directory {}", root.display()))?;
        let text = std::fs::read_to_string(root.join(".dockerignore")).unwrap_or_default();
        let lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
        let rule = |line: &str| {
            let (pattern, back) = line.strip_prefix('!').map_or((line, false), |p| (p.trim(), true));
            Ok((matcher(pattern)?, back))
        };
        let ignored = lines.map(rule).collect::<anyhow::Result<_>>()?;
        Ok(Self { root, ignored })
    }

    /// The last rule that covers a path, or one above it, counts.
    fn leaves_out(&self, path: &Path) -> bool {
        let covers = |m: &GlobMatcher| path.ancestors().any(|p| p != Path::new("") && m.is_match(p));
        self.ignored.iter().rev().find(|(m, _)| covers(m)).is_some_and(|(_, back)| !back)
    }

    /// What `source` names, and all that is below.
    fn files(&self, source: &str) -> anyhow::Result<Vec<PathBuf>> {
        let trimmed = source.trim_start_matches("./").trim_end_matches('/');
        if Path::new(trimmed).components().any(|c| c == std::path::Component::ParentDir) {
            bail!("COPY {source}: it leads out of the context");
        }
        let wanted = if matches!(trimmed, "" | ".") { None } else { Some(trimmed) };
        let pattern = wanted.map(matcher).transpose()?;
        let (mut found, mut todo) = (Vec::new(), vec![PathBuf::new()]);
        while let Some(dir) = todo.pop() {
            let here = self.root.join(&dir);
            let entries =
                std::fs::read_dir(&here).with_context(|| format!("Cannot read {}", here.display()))?;
            for entry in entries {
                let entry = entry?;
                let path = dir.join(entry.file_name());
                let is_dir = entry.file_type()?.is_dir();
                let named = match (&pattern, wanted) {
                    (Some(p), Some(text)) => path.ancestors().any(|a| a == Path::new(text) || p.is_match(a)),
                    _ => true,
                };
                if named && !self.leaves_out(&path) {
                    found.push(path.clone());
                }
                if is_dir {
                    todo.push(path);
                }
            }
        }
        if found.is_empty() {
            bail!("COPY {source}: there is nothing of that name in {}", self.root.display());
        }
        found.sort();
        Ok(found)
    }

    /// The files that `source` names, always in the same bytes while they are the same.
    pub fn archive(&self, source: &str) -> anyhow::Result<Archive> {
        let file = tempfile::tempfile().context("Cannot make a file for the archive")?;
        let mut hash = Sha256::new();
        hash.update(source.as_bytes());
        let mut tar = tar::Builder::new(GzEncoder::new(file, Compression::fast()));
        for path in self.files(source)? {
            let full = self.root.join(&path);
            add(&mut tar, &mut hash, &path, &full)
                .with_context(|| format!("Cannot pack {}", full.display()))?;
        }
        let mut file = tar.into_inner()?.finish()?;
        file.rewind()?;
        Ok(Archive { file, hash: crate::recipe::hex(hash) })
    }
}

fn add(tar: &mut tar::Builder<impl Write>, hash: &mut Sha256, path: &Path, full: &Path) -> io::Result<()> {
    let meta = std::fs::symlink_metadata(full)?;
    let mut header = Header::new_gnu();
    header.set_mode(meta.permissions().mode() & 0o7777);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    hash.update(path.as_os_str().as_encoded_bytes());
    hash.update(meta.permissions().mode().to_le_bytes());
    if meta.is_symlink() {
        let target = std::fs::read_link(full)?;
        hash.update(target.as_os_str().as_encoded_bytes());
        header.set_entry_type(EntryType::Symlink);
        return tar.append_link(&mut header, path, target);
    }
    if meta.is_dir() {
        header.set_entry_type(EntryType::Directory);
        return tar.append_data(&mut header, path, io::empty());
    }
    if !meta.is_file() {
        return Err(io::Error::other("it is neither a file, a directory nor a link"));
    }
    header.set_entry_type(EntryType::Regular);
    header.set_size(meta.len());
    let file = Hashing { file: File::open(full)?.take(meta.len()), hash };
    tar.append_data(&mut header, path, file)
}

struct Hashing<'a> {
    file: io::Take<File>,
    hash: &'a mut Sha256,
}

impl Read for Hashing<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buf)?;
        self.hash.update(&buf[..n]);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ignored_is_left_out_and_the_hash_is_the_contents() {
        let dir = tempfile::tempdir().unwrap();
        for file in ["a.txt", "b.log", "sub/c.log", "sub/keep.log", "node_modules/x/y.js", "src/m.py"] {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, file).unwrap();
        }
        std::fs::write(dir.path().join(".dockerignore"), "# no\n**/*.log\nnode_modules\n!sub/keep.log\n")
            .unwrap();
        let context = BuildContext::open(dir.path()).unwrap();
        let names = |source: &str| {
            let found = context.files(source).unwrap().into_iter();
            found.map(|p| p.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names("."), [".dockerignore", "a.txt", "src", "src/m.py", "sub", "sub/keep.log"]);
        assert_eq!(names("src/"), ["src", "src/m.py"]);
        assert_eq!(names("*.txt"), ["a.txt"]);
        assert!(context.files("b.log").is_err() && context.files("../x").is_err());
        let hash = |source: &str| context.archive(source).unwrap().hash;
        let first = hash("src");
        assert_eq!(first, hash("src"));
        std::fs::write(dir.path().join("src/m.py"), "changed").unwrap();
        assert_ne!(first, hash("src"));
    }
}
