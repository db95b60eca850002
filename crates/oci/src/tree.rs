//! A tree of files in memory: names and what they stand for, with contents kept elsewhere under numbers.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Links followed on the way to one entry; as many as the kernel follows.
const MAX_LINKS: usize = 40;
/// Directories below one another. Deeper than any system has them, and few enough for recursion.
const MAX_DEPTH: usize = 256;
/// Bytes of a name and of a path or link (Linux: `NAME_MAX`, `PATH_MAX`).
const MAX_NAME: usize = 255;
const MAX_PATH: usize = 4096;

/// Why an entry was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TreeError {
    /// It leads out.
    #[error("the entry {0:?} leads out of the image")]
    Escapes(PathBuf),
    /// No usable name.
    #[error("the entry {0:?} has no usable name: {1}")]
    BadName(PathBuf, &'static str),
    /// Something that is no directory is used as one.
    #[error("the entry {0:?} lies below something that is no directory")]
    NotADirectory(PathBuf),
    /// Links that lead in a circle, or too many.
    #[error("the entry {0:?} lies behind more than {MAX_LINKS} links")]
    Loop(PathBuf),
    /// Too many directories below one another.
    #[error("the entry {0:?} lies more than {MAX_DEPTH} directories deep")]
    TooDeep(PathBuf),
    /// A hard link to nothing, or to a directory.
    #[error("{link:?} is a hard link to {target:?}, which is {reason}")]
    HardLink {
        /// The link.
        link: PathBuf,
        /// What it names.
        target: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// An entry of a kind that is not supported.
    #[error("the entry {0:?} is {1}, which is not supported")]
    Unsupported(PathBuf, &'static str),
    /// A part of the entry is larger than it may be.
    #[error("the entry {0:?} has {1}")]
    TooLarge(PathBuf, String),
}

/// Owner, mode and the like.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    /// Extended attributes by name.
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
}

impl Meta {
    /// Of root, with this mode.
    pub fn root(mode: u32) -> Self {
        Self { mode, ..Self::default() }
    }
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// Directory.
    Directory,
    /// File with the content of this number and so many bytes.
    File {
        /// Number of the content.
        content: u64,
        /// Bytes.
        len: u64,
    },
    /// Symbolic link to a path of the image.
    Symlink(PathBuf),
    /// Character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Named pipe.
    Fifo,
}

/// Index of an inode.
pub(crate) type Id = usize;

const ROOT: Id = 0;

#[derive(Debug)]
pub(crate) struct Inode {
    pub node: Node,
    pub meta: Meta,
    /// Of a directory.
    pub children: BTreeMap<OsString, Id>,
    /// Layer that made or touched it, from 1.
    layer: usize,
    /// Names that it has; without one it is gone.
    pub links: usize,
}

/// The files of an image. Names of one inode are hard links of one another.
#[derive(Debug)]
pub struct Tree {
    inodes: Vec<Inode>,
}

impl Default for Tree {
    fn default() -> Self {
        Self { inodes: vec![Inode::new(Node::Directory, Meta::root(0o755), 0)] }
    }
}

impl Inode {
    fn new(node: Node, meta: Meta, layer: usize) -> Self {
        Self { node, meta, children: BTreeMap::new(), layer, links: 1 }
    }

    fn is_dir(&self) -> bool {
        self.node == Node::Directory
    }
}

/// The parts of an entry's path: what is before the first and doubled slashes and dots do not count, and
/// nothing may point upwards.
fn parts(path: &Path) -> Result<Vec<OsString>, TreeError> {
    let refuse = |why| TreeError::BadName(path.to_owned(), why);
    if path.as_os_str().len() > MAX_PATH {
        return Err(refuse("it is too long"));
    }
    if path.as_os_str().as_bytes().contains(&0) {
        return Err(refuse("it has a zero byte"));
    }
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) if name.len() > MAX_NAME => {
                return Err(refuse("a part of it is too long"));
            }
            Component::Normal(name) => parts.push(name.to_owned()),
            Component::ParentDir => return Err(TreeError::Escapes(path.to_owned())),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if parts.len() > MAX_DEPTH {
        return Err(TreeError::TooDeep(path.to_owned()));
    }
    Ok(parts)
}

impl Tree {
    /// Number of inodes ever made, removed ones included.
    pub fn inodes(&self) -> usize {
        self.inodes.len()
    }

    pub(crate) fn inode(&self, id: Id) -> &Inode {
        &self.inodes[id]
    }

    /// The root directory.
    pub(crate) fn root(&self) -> Id {
        ROOT
    }

    /// Walks from `dir` down `names`. Links are followed as the guest would: from the root of the image, whose
    /// parent is itself. What is missing is made when `make` names the layer that does.
    fn walk(
        &mut self,
        whole: &Path,
        names: &[OsString],
        make: Option<usize>,
    ) -> Result<Option<Id>, TreeError> {
        // Directories from the root to the present one.
        let mut stack = vec![ROOT];
        let mut todo: Vec<OsString> = names.iter().rev().cloned().collect();
        let mut links = 0;
        while let Some(name) = todo.pop() {
            let here = stack.last().copied().unwrap_or(ROOT);
            if name == ".." {
                if stack.len() > 1 {
                    stack.pop();
                }
                continue;
            }
            if stack.len() > MAX_DEPTH {
                return Err(TreeError::TooDeep(whole.to_owned()));
            }
            match self.inodes[here].children.get(&name).copied() {
                Some(id) => match &self.inodes[id].node {
                    Node::Directory => stack.push(id),
                    Node::Symlink(target) => {
                        links += 1;
                        if links > MAX_LINKS {
                            return Err(TreeError::Loop(whole.to_owned()));
                        }
                        let target = target.clone();
                        if target.has_root() {
                            stack.truncate(1);
                        }
                        let steps: Vec<OsString> = target
                            .components()
                            .filter_map(|c| match c {
                                Component::Normal(n) => Some(n.to_owned()),
                                Component::ParentDir => Some("..".into()),
                                _ => None,
                            })
                            .collect();
                        todo.extend(steps.into_iter().rev());
                    }
                    _ => return Err(TreeError::NotADirectory(whole.to_owned())),
                },
                None => match make {
                    None => return Ok(None),
                    Some(layer) => {
                        let id = self.add(Inode::new(Node::Directory, Meta::root(0o755), layer));
                        self.inodes[here].children.insert(name, id);
                        stack.push(id);
                    }
                },
            }
        }
        Ok(stack.last().copied())
    }

    fn add(&mut self, inode: Inode) -> Id {
        self.inodes.push(inode);
        self.inodes.len() - 1
    }

    /// Puts `node` at `path`, in place of what is there; a directory that is there stays with what is in it, and
    /// gets the new owner and mode. Directories above it are made.
    ///
    /// # Errors
    /// When the path leads out, through something that is no directory, or round in circles.
    pub fn put(&mut self, layer: usize, path: &Path, node: Node, meta: Meta) -> Result<(), TreeError> {
        let names = parts(path)?;
        if let Node::Symlink(target) = &node
            && (target.as_os_str().is_empty()
                || target.as_os_str().len() >= MAX_PATH
                || target.as_os_str().as_bytes().contains(&0))
        {
            return Err(TreeError::BadName(path.to_owned(), "its target is empty, too long or no text"));
        }
        let Some((last, above)) = names.split_last() else {
            if node == Node::Directory {
                self.inodes[ROOT].meta = meta;
                return Ok(());
            }
            return Err(TreeError::BadName(path.to_owned(), "it stands for the root directory"));
        };
        let dir = self.walk(path, above, Some(layer))?.unwrap_or(ROOT);
        if let Some(old) = self.inodes[dir].children.get(last).copied() {
            if node == Node::Directory && self.inodes[old].is_dir() {
                self.inodes[old].meta = meta;
                self.inodes[old].layer = layer;
                return Ok(());
            }
            self.unlink(dir, last);
        }
        let id = self.add(Inode::new(node, meta, layer));
        self.inodes[dir].children.insert(last.clone(), id);
        Ok(())
    }

    /// Makes `path` one more name of what `target` names.
    ///
    /// # Errors
    /// As [`Tree::put`]; when the target is not there or is a directory.
    pub fn hard_link(&mut self, layer: usize, path: &Path, target: &Path) -> Result<(), TreeError> {
        let refuse =
            |reason| TreeError::HardLink { link: path.to_owned(), target: target.to_owned(), reason };
        let to = parts(target)?;
        let Some((last, above)) = to.split_last() else { return Err(refuse("a directory")) };
        let found = self.walk(target, above, None)?;
        let found = found.and_then(|dir| self.inodes[dir].children.get(last).copied());
        let id = found.ok_or_else(|| refuse("not there"))?;
        if self.inodes[id].is_dir() {
            return Err(refuse("a directory"));
        }
        let names = parts(path)?;
        let Some((last, above)) = names.split_last() else {
            return Err(TreeError::BadName(path.to_owned(), "it stands for the root directory"));
        };
        let dir = self.walk(path, above, Some(layer))?.unwrap_or(ROOT);
        if self.inodes[dir].children.get(last) == Some(&id) {
            return Ok(());
        }
        // First: the target may be what is replaced.
        self.inodes[id].links += 1;
        self.unlink(dir, last);
        self.inodes[dir].children.insert(last.clone(), id);
        Ok(())
    }

    /// Removes what layers below `layer` have at `path`: a whiteout. What `layer` itself has put there stays.
    ///
    /// # Errors
    /// As [`Tree::put`].
    pub fn white_out(&mut self, layer: usize, path: &Path) -> Result<(), TreeError> {
        let names = parts(path)?;
        let Some((last, above)) = names.split_last() else {
            return Err(TreeError::BadName(path.to_owned(), "it stands for the root directory"));
        };
        let Some(dir) = self.walk(path, above, None)? else { return Ok(()) };
        if let Some(id) = self.inodes[dir].children.get(last).copied() {
            self.remove_older(layer, dir, last, id);
        }
        Ok(())
    }

    /// Removes all that layers below `layer` have in the directory `path`: an opaque whiteout.
    ///
    /// # Errors
    /// As [`Tree::put`].
    pub fn make_opaque(&mut self, layer: usize, path: &Path) -> Result<(), TreeError> {
        let names = parts(path)?;
        if let Some(dir) = self.walk(path, &names, None)? {
            self.empty_older(layer, dir);
        }
        Ok(())
    }

    fn empty_older(&mut self, layer: usize, dir: Id) {
        let children: Vec<_> = self.inodes[dir].children.iter().map(|(n, id)| (n.clone(), *id)).collect();
        for (name, id) in children {
            self.remove_older(layer, dir, &name, id);
        }
    }

    fn remove_older(&mut self, layer: usize, dir: Id, name: &OsStr, id: Id) {
        if self.inodes[id].layer < layer {
            self.unlink(dir, name);
        } else if self.inodes[id].is_dir() {
            self.empty_older(layer, id);
        }
    }

    /// Takes a name away, and with a directory's what is below it.
    fn unlink(&mut self, dir: Id, name: &OsStr) {
        let Some(first) = self.inodes[dir].children.remove(name) else { return };
        let mut todo = vec![first];
        while let Some(id) = todo.pop() {
            let inode = &mut self.inodes[id];
            inode.links -= 1;
            if inode.links == 0 {
                todo.extend(std::mem::take(&mut inode.children).into_values());
            }
        }
    }

    /// What is at `path`, links followed on the way but not at its end.
    pub fn get(&mut self, path: &Path) -> Option<(&Node, &Meta)> {
        let names = parts(path).ok()?;
        let id = match names.split_last() {
            None => ROOT,
            Some((last, above)) => {
                let dir = self.walk(path, above, None).ok()??;
                *self.inodes[dir].children.get(last)?
            }
        };
        let inode = &self.inodes[id];
        Some((&inode.node, &inode.meta))
    }

    /// Where `path` leads if links are followed to its end, as a path without any. Nothing need be there.
    ///
    /// # Errors
    /// When it leads round in circles or through something that is no directory.
    pub fn resolve(&mut self, path: &Path) -> Result<PathBuf, TreeError> {
        let mut at = PathBuf::from("/").join(path);
        for _ in 0..MAX_LINKS {
            match self.get(&at) {
                Some((Node::Symlink(target), _)) => {
                    let above = at.parent().unwrap_or(Path::new("/")).to_owned();
                    at = normal(&above.join(target.clone()));
                }
                _ => return Ok(at),
            }
        }
        Err(TreeError::Loop(path.to_owned()))
    }

    /// The names in the directory `path`.
    pub fn list(&mut self, path: &Path) -> Vec<OsString> {
        let Ok(names) = parts(path) else { return Vec::new() };
        match self.walk(path, &names, None) {
            Ok(Some(dir)) => self.inodes[dir].children.keys().cloned().collect(),
            _ => Vec::new(),
        }
    }

    /// Takes a name away with all that is below it.
    pub fn remove(&mut self, path: &Path) {
        let Ok(names) = parts(path) else { return };
        let Some((last, above)) = names.split_last() else { return };
        if let Ok(Some(dir)) = self.walk(path, above, None) {
            self.unlink(dir, last);
        }
    }
}

/// Without `.` and `..`; what would lead above the root stays there.
fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => drop(out.pop()),
            _ => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(content: u64) -> Node {
        Node::File { content, len: 1 }
    }

    fn put(tree: &mut Tree, layer: usize, path: &str, node: Node) {
        tree.put(layer, Path::new(path), node, Meta::root(0o644)).unwrap();
    }

    fn has(tree: &mut Tree, path: &str) -> Option<Node> {
        tree.get(Path::new(path)).map(|(n, _)| n.clone())
    }

    #[test]
    fn what_leads_out_is_refused_and_links_stay_inside() {
        let mut tree = Tree::default();
        let meta = || Meta::root(0o644);
        for path in ["../x", "a/../../x", "a/..", "/../etc/passwd"] {
            let e = tree.put(1, Path::new(path), file(1), meta());
            assert!(matches!(e, Err(TreeError::Escapes(_))), "{path}");
        }
        put(&mut tree, 1, "/etc/passwd", file(1));
        put(&mut tree, 1, "up", Node::Symlink("../../../../etc".into()));
        put(&mut tree, 1, "up/shadow", file(2));
        assert_eq!(has(&mut tree, "etc/shadow"), Some(file(2)));
        put(&mut tree, 1, "abs", Node::Symlink("/etc".into()));
        put(&mut tree, 2, "abs/passwd", file(3));
        assert_eq!(has(&mut tree, "etc/passwd"), Some(file(3)));
        put(&mut tree, 1, "l1", Node::Symlink("l2".into()));
        put(&mut tree, 1, "l2", Node::Symlink("/l1".into()));
        assert!(matches!(tree.put(2, Path::new("l1/x"), file(1), meta()), Err(TreeError::Loop(_))));
        assert!(tree.resolve(Path::new("l1")).is_err());
        let e = tree.put(2, Path::new("etc/passwd/x"), file(1), meta());
        assert!(matches!(e, Err(TreeError::NotADirectory(_))));
        let deep = "d/".repeat(300);
        assert!(matches!(tree.put(2, Path::new(&deep), file(1), meta()), Err(TreeError::TooDeep(_))));
        // A directory that holds a link to itself is no way to go deeper than that either.
        put(&mut tree, 1, "d/self", Node::Symlink("..".into()));
        let round = format!("{}x", "d/self/".repeat(30));
        assert!(tree.put(2, Path::new(&round), file(9), meta()).is_ok());
        assert_eq!(has(&mut tree, "x"), Some(file(9)));
    }

    #[test]
    fn hard_links_share_and_outlive_what_they_name() {
        let mut tree = Tree::default();
        put(&mut tree, 1, "a", file(1));
        tree.hard_link(1, Path::new("b"), Path::new("/a")).unwrap();
        tree.hard_link(1, Path::new("b"), Path::new("a")).unwrap();
        tree.remove(Path::new("a"));
        assert_eq!(has(&mut tree, "b"), Some(file(1)));
        let refused = |tree: &mut Tree, to: &str| {
            tree.hard_link(1, Path::new("c"), Path::new(to)).unwrap_err().to_string()
        };
        put(&mut tree, 1, "d", Node::Directory);
        assert!(refused(&mut tree, "a").contains("not there"));
        assert!(refused(&mut tree, "d").contains("a directory"));
        assert!(refused(&mut tree, "../a").contains("leads out"));
        assert!(refused(&mut tree, "/").contains("a directory"));
        tree.hard_link(1, Path::new("b"), Path::new("b")).unwrap();
        assert_eq!(has(&mut tree, "b"), Some(file(1)));
    }

    #[test]
    fn whiteouts_remove_what_is_below_and_nothing_else() {
        let mut tree = Tree::default();
        put(&mut tree, 1, "d/old", file(1));
        put(&mut tree, 1, "d/sub/old", file(1));
        put(&mut tree, 1, "gone", file(1));
        put(&mut tree, 2, "d/new", file(2));
        put(&mut tree, 2, "d/sub", Node::Directory);
        put(&mut tree, 2, "d/sub/new", file(2));
        tree.make_opaque(2, Path::new("d")).unwrap();
        tree.white_out(2, Path::new("gone")).unwrap();
        tree.white_out(2, Path::new("d/new")).unwrap();
        tree.white_out(2, Path::new("never/was")).unwrap();
        assert_eq!(tree.list(Path::new("d")), ["new", "sub"]);
        assert_eq!(tree.list(Path::new("d/sub")), ["new"]);
        assert_eq!(has(&mut tree, "gone"), None);
    }

    #[test]
    fn a_directory_replaces_a_link_and_keeps_what_a_directory_has() {
        let mut tree = Tree::default();
        put(&mut tree, 1, "usr/lib/x", file(1));
        put(&mut tree, 1, "lib", Node::Symlink("usr/lib".into()));
        put(&mut tree, 2, "lib/y", file(2));
        assert_eq!(tree.list(Path::new("usr/lib")), ["x", "y"]);
        put(&mut tree, 3, "usr/lib", Node::Directory);
        assert_eq!(tree.list(Path::new("lib")), ["x", "y"]);
        put(&mut tree, 3, "lib", Node::Directory);
        assert_eq!(tree.list(Path::new("lib")), [] as [&str; 0]);
        assert_eq!(tree.list(Path::new("usr/lib")), ["x", "y"]);
        assert_eq!(tree.resolve(Path::new("lib/z")).unwrap(), Path::new("/lib/z"));
    }

    proptest! {
        /// Layers without links are what a map of paths would be.
        #[test]
        fn layers_are_as_a_map_of_paths(
            layers in prop::collection::vec(
                prop::collection::vec((0u8..4, "[ab](/[ab]){0,3}"), 0..12), 1..5)
        ) {
            let mut tree = Tree::default();
            // Every path with the layer that touched it last, and its content if it is a file.
            let mut model: BTreeMap<String, (usize, Option<u64>)> = BTreeMap::new();
            let mut number = 0;
            for (n, layer) in layers.iter().enumerate() {
                let layer_no = n + 1;
                for (what, path) in layer {
                    let above: Vec<String> = path.match_indices('/').map(|(at, _)| path[..at].to_owned()).collect();
                    let blocked = above.iter().any(|a| matches!(model.get(a), Some((_, Some(_)))));
                    let below = format!("{path}/");
                    match what {
                        0 | 1 => {
                            number += 1;
                            let node = if *what == 0 { file(number) } else { Node::Directory };
                            let done = tree.put(layer_no, Path::new(path), node, Meta::root(0o644));
                            prop_assert_eq!(done.is_err(), blocked);
                            if blocked { continue; }
                            for a in above {
                                model.entry(a).or_insert((layer_no, None));
                            }
                            if *what == 0 {
                                model.retain(|p, _| !p.starts_with(&below));
                                model.insert(path.clone(), (layer_no, Some(number)));
                            } else {
                                model.insert(path.clone(), (layer_no, None));
                            }
                        }
                        _ if blocked => {
                            prop_assert!(tree.white_out(layer_no, Path::new(path)).is_err());
                        }
                        2 => {
                            tree.white_out(layer_no, Path::new(path)).unwrap();
                            prune(&mut model, layer_no, path);
                        }
                        _ => {
                            let is_file = matches!(model.get(path), Some((_, Some(_))));
                            prop_assert_eq!(tree.make_opaque(layer_no, Path::new(path)).is_err(), is_file);
                            if is_file { continue; }
                            let children: Vec<String> = model.keys()
                                .filter(|p| p.strip_prefix(&below).is_some_and(|r| !r.contains('/')))
                                .cloned().collect();
                            for child in children { prune(&mut model, layer_no, &child); }
                        }
                    }
                }
            }
            let mut found = BTreeMap::new();
            let mut todo = vec![String::new()];
            while let Some(dir) = todo.pop() {
                for name in tree.list(Path::new(&dir)) {
                    let path = if dir.is_empty() { name.to_string_lossy().into_owned() }
                        else { format!("{dir}/{}", name.to_string_lossy()) };
                    match has(&mut tree, &path).unwrap() {
                        Node::File { content, .. } => { found.insert(path, Some(content)); }
                        _ => { found.insert(path.clone(), None); todo.push(path); }
                    }
                }
            }
            let model: BTreeMap<_, _> = model.into_iter().map(|(p, (_, c))| (p, c)).collect();
            prop_assert_eq!(found, model);
        }
    }

    /// A whiteout in the model.
    fn prune(model: &mut BTreeMap<String, (usize, Option<u64>)>, layer: usize, path: &str) {
        let Some((touched, _)) = model.get(path).copied() else { return };
        let below = format!("{path}/");
        if touched < layer {
            model.retain(|p, _| p != path && !p.starts_with(&below));
            return;
        }
        let children: Vec<String> = model
            .keys()
            .filter(|p| p.strip_prefix(&below).is_some_and(|r| !r.contains('/')))
            .cloned()
            .collect();
        for child in children {
            prune(model, layer, &child);
        }
    }
}
