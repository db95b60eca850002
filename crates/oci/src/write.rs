//! Writing a tree into a directory of this host.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use tokio_util::sync::CancellationToken;

use crate::layer::Contents;
use crate::tree::{Id, Meta};
use crate::{Node, OciError, Tree};

/// A device node of an image. None is made on this host: the file system of the guest gets it later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Absolute path in the image.
    pub path: PathBuf,
    /// Whether it is a block device, else a character device.
    pub block: bool,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What was written, and what is left for the guest's file system.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// Device nodes, which were not made.
    pub devices: Vec<Device>,
    /// Attributes that this host's file system did not take.
    pub lost_xattrs: u64,
}

impl Tree {
    /// Writes the tree below the new directory `root`, with owners, modes, times and attributes; contents are
    /// moved there. Nothing is followed on the way: each directory was made here just before, and nobody else
    /// can reach it. Blocks.
    pub(crate) fn write(
        &self,
        contents: &Contents,
        root: &Path,
        cancel: &CancellationToken,
    ) -> Result<Written, OciError> {
        let mut writer =
            Writer { tree: self, contents, cancel, done: Written::default(), linked: HashMap::new() };
        // Nobody else may come in while it has setuid programs of other owners.
        DirBuilder::new().mode(0o700).create(root).map_err(|e| OciError::io("make", root, e))?;
        writer.fill(self.root(), root, Path::new("/"))?;
        writer.times(self.root(), root)?;
        Ok(writer.done)
    }
}

struct Writer<'a> {
    tree: &'a Tree,
    contents: &'a Contents,
    cancel: &'a CancellationToken,
    done: Written,
    /// Where inodes with several names are already.
    linked: HashMap<Id, PathBuf>,
}

impl Writer<'_> {
    fn fill(&mut self, dir: Id, on_host: &Path, in_image: &Path) -> Result<(), OciError> {
        for (name, id) in &self.tree.inode(dir).children {
            if self.cancel.is_cancelled() {
                return Err(OciError::Cancelled);
            }
            self.put(*id, &on_host.join(name), &in_image.join(name))?;
        }
        Ok(())
    }

    fn put(&mut self, id: Id, path: &Path, in_image: &Path) -> Result<(), OciError> {
        let inode = self.tree.inode(id);
        if let Some(first) = self.linked.get(&id) {
            fs::hard_link(first, path).map_err(|e| OciError::io("link", path, e))?;
            self.done.entries += 1;
            return Ok(());
        }
        let made = |r: io::Result<()>| r.map_err(|e| OciError::io("make", path, e));
        match &inode.node {
            Node::Directory => made(DirBuilder::new().mode(0o700).create(path))?,
            Node::Symlink(target) => made(symlink(target, path))?,
            Node::File { content, len } => {
                made(self.place(*content, path))?;
                self.done.bytes += len;
            }
            Node::Fifo => {
                made(rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0).map_err(io::Error::from))?;
            }
            Node::CharDevice { major, minor } | Node::BlockDevice { major, minor } => {
                let Meta { mode, uid, gid, .. } = inode.meta;
                let block = matches!(inode.node, Node::BlockDevice { .. });
                let (path, major, minor) = (in_image.to_owned(), *major, *minor);
                self.done.devices.push(Device { path, block, major, minor, mode, uid, gid });
                return Ok(());
            }
        }
        self.done.entries += 1;
        if inode.links > 1 {
            self.linked.insert(id, path.to_owned());
        }
        self.own(id, path)?;
        if inode.node == Node::Directory {
            self.fill(id, path, in_image)?;
        }
        self.times(id, path)
    }

    /// A content belongs to one inode: it is moved, not copied.
    fn place(&self, content: u64, path: &Path) -> io::Result<()> {
        fs::rename(self.contents.path(content), path)
    }

    /// Owner first: changing it takes setuid and capabilities away.
    fn own(&mut self, id: Id, path: &Path) -> Result<(), OciError> {
        let inode = self.tree.inode(id);
        let meta = &inode.meta;
        lchown(path, Some(meta.uid), Some(meta.gid))
            .map_err(|e| OciError::io("change the owner of", path, e))?;
        if !matches!(inode.node, Node::Symlink(_)) {
            fs::set_permissions(path, Permissions::from_mode(meta.mode))
                .map_err(|e| OciError::io("set the mode of", path, e))?;
        }
        for (name, value) in &meta.xattrs {
            if rustix::fs::lsetxattr(path, name.as_os_str(), value, XattrFlags::empty()).is_err() {
                self.done.lost_xattrs += 1;
            }
        }
        Ok(())
    }

    fn times(&self, id: Id, path: &Path) -> Result<(), OciError> {
        let time = Timespec { tv_sec: self.tree.inode(id).meta.mtime, tv_nsec: 0 };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| OciError::io("set the time of", path, e.into()))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_tree_is_written_as_it_is_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let mut contents = Contents::create(dir.path().join("contents")).unwrap();
        let mut tree = Tree::default();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let meta = |mode, uid| Meta { mode, uid, gid: 7, mtime: 1000, ..Meta::default() };
        let suid = contents.add_bytes(b"program").unwrap();
        tree.put(1, Path::new("bin/su"), suid, meta(0o4755, 5)).unwrap();
        tree.put(1, Path::new("out"), Node::Symlink(outside.clone()), meta(0o777, 5)).unwrap();
        let other = contents.add_bytes(b"inside").unwrap();
        tree.put(1, Path::new("out/x"), other, meta(0o600, 5)).unwrap();
        tree.hard_link(1, Path::new("bin/sudo"), Path::new("bin/su")).unwrap();
        tree.put(1, Path::new("dev/null"), Node::CharDevice { major: 1, minor: 3 }, meta(0o666, 0)).unwrap();
        tree.put(1, Path::new("pipe"), Node::Fifo, meta(0o640, 5)).unwrap();
        tree.put(1, Path::new("locked"), Node::Directory, meta(0o000, 5)).unwrap();
        let root = dir.path().join("root");
        let written = tree.write(&contents, &root, &CancellationToken::new()).unwrap();
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        let su = fs::metadata(root.join("bin/su")).unwrap();
        assert_eq!((su.mode() & 0o7777, su.uid(), su.gid(), su.mtime(), su.nlink()), (0o4755, 5, 7, 1000, 2));
        assert_eq!(fs::read(root.join("bin/sudo")).unwrap(), b"program");
        assert_eq!(fs::read_link(root.join("out")).unwrap(), outside);
        // Where the link leads in the image.
        let inside = root.join(outside.strip_prefix("/").unwrap()).join("x");
        assert_eq!(fs::read(inside).unwrap(), b"inside");
        assert!(!root.join("dev/null").exists());
        let [null] = written.devices.as_slice() else { panic!("{written:?}") };
        assert_eq!(
            (null.path.as_path(), null.block, null.major, null.minor, null.mode),
            (Path::new("/dev/null"), false, 1, 3, 0o666)
        );
        assert_eq!(fs::metadata(root.join("locked")).unwrap().mode() & 0o7777, 0);
        assert_eq!(fs::metadata(&root).unwrap().mode() & 0o7777, 0o700);
    }
}
