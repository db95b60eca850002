//! A layer: a tar archive, perhaps compressed, of what it adds and takes away.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use tar::{Archive, EntryType, Header};
use tokio_util::sync::CancellationToken;

use crate::tree::{Meta, TreeError};
use crate::{Digest, Node, OciError, Tree};

/// Prefix of a name that says that another one is gone, and the name that says that a whole directory is.
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names of the union file system that invented whiteouts, for itself.
const AUFS: &[u8] = b".wh..wh.";
/// Longest extension header: names are up to 4 KiB, attributes up to 64 KiB each.
const MAX_EXTENSION: u64 = 1 << 20;
/// Largest window that a zstd frame may want, as a power of two: what its own program allows.
const ZSTD_WINDOW_LOG: u32 = 27;
/// Attributes of other names mean something to the host alone.
const XATTRS: [&str; 2] = ["user.", "security.capability"];
/// In records of pax archives.
const PAX_XATTR: &str = "SCHILY.xattr.";

/// What an image may have at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of all files together, those that a later layer removes included.
    pub bytes: u64,
    /// Files, directories and links, likewise.
    pub entries: usize,
    /// Layers.
    pub layers: usize,
}

impl Limits {
    /// For an image that is to fit on a disk of so many MiB.
    pub fn for_disk(disk_mb: u32) -> Self {
        let disk = u64::from(disk_mb) << 20;
        // What layers remove again needs room here alone.
        Self { bytes: disk * 2, entries: 2_000_000, layers: 256 }
    }
}

/// Contents of files, each a file with a number for its name.
#[derive(Debug)]
pub(crate) struct Contents {
    dir: PathBuf,
    next: u64,
    /// Bytes so far.
    pub bytes: u64,
}

impl Contents {
    /// In the directory `dir`, which is made.
    pub fn create(dir: PathBuf) -> Result<Self, OciError> {
        std::fs::create_dir(&dir).map_err(|e| OciError::io("make", &dir, e))?;
        Ok(Self { dir, next: 0, bytes: 0 })
    }

    pub fn path(&self, content: u64) -> PathBuf {
        self.dir.join(content.to_string())
    }

    /// Keeps what `from` has, which is `len` bytes.
    pub fn add(&mut self, from: &mut impl Read, len: u64) -> Result<u64, OciError> {
        let number = self.next;
        let path = self.path(number);
        let mut file = File::create_new(&path).map_err(|e| OciError::io("make", &path, e))?;
        let copied = io::copy(&mut from.take(len), &mut file).map_err(|e| OciError::io("write", &path, e))?;
        if copied != len {
            return Err(OciError::malformed("a layer", "it ends in the middle of a file"));
        }
        self.next += 1;
        self.bytes += len;
        Ok(number)
    }
}

/// Reads on while it hashes and counts; fails when there is more than there may be.
struct Bounded<R> {
    inner: R,
    hasher: Sha256,
    left: u64,
    cancel: CancellationToken,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        let n = self.inner.read(buf)?;
        self.left = self.left.checked_sub(n as u64).ok_or_else(|| {
            io::Error::new(io::ErrorKind::FileTooLarge, "it unpacks to more than an image may have")
        })?;
        self.hasher.update(&buf[..n]);
        Ok(n)
    }
}

/// The archive inside, told by its first bytes: registries are not to be trusted with media types.
fn unpack(mut file: File, path: &Path) -> Result<Box<dyn Read>, OciError> {
    use std::io::Seek;
    let mut magic = [0; 4];
    let n = file.read(&mut magic).map_err(|e| OciError::io("read", path, e))?;
    file.rewind().map_err(|e| OciError::io("read", path, e))?;
    let buffered = BufReader::with_capacity(1 << 17, file);
    Ok(match &magic[..n] {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(buffered)),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let mut decoder =
                zstd::Decoder::with_buffer(buffered).map_err(|e| OciError::io("unpack", path, e))?;
            decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(|e| OciError::io("unpack", path, e))?;
            Box::new(decoder)
        }
        _ => Box::new(buffered),
    })
}

/// Applies the archive in the file `path` as layer number `layer` (from 1), and returns the digest of what is
/// unpacked. Blocks.
pub(crate) fn apply(
    tree: &mut Tree,
    contents: &mut Contents,
    layer: usize,
    path: &Path,
    limits: &Limits,
    cancel: &CancellationToken,
) -> Result<Digest, OciError> {
    let file = File::open(path).map_err(|e| OciError::io("open", path, e))?;
    // Headers and padding: up to four blocks an entry.
    let left = limits.bytes.saturating_sub(contents.bytes) + (limits.entries as u64).saturating_mul(512);
    let mut reader =
        Bounded { inner: unpack(file, path)?, hasher: Sha256::new(), left, cancel: cancel.clone() };
    apply_layer(tree, contents, layer, &mut reader, limits)
        .map_err(|e| if cancel.is_cancelled() { OciError::Cancelled } else { e })?;
    // The archive's end is not the file's: the rest counts for the digest.
    io::copy(&mut reader, &mut io::sink()).map_err(|e| read_error(layer, &e))?;
    Ok(Digest::from_hasher(reader.hasher))
}

fn read_error(layer: usize, e: &io::Error) -> OciError {
    match e.kind() {
        io::ErrorKind::FileTooLarge => OciError::TooLarge(format!("layer {layer}: {e}")),
        _ => OciError::malformed(format!("layer {layer}"), e),
    }
}

/// What extension headers said of the entry that follows them.
#[derive(Default)]
struct Extended {
    path: Option<PathBuf>,
    link: Option<PathBuf>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<i64>,
    sparse: bool,
    xattrs: BTreeMap<OsString, Vec<u8>>,
}

fn path_of(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes))
}

impl Extended {
    /// A record is `LENGTH NAME=VALUE\n`, the length counting itself (POSIX, pax).
    fn read_pax(&mut self, mut data: &[u8]) -> Result<(), &'static str> {
        while !data.is_empty() {
            let space = data.iter().position(|b| *b == b' ').ok_or("a pax record without a length")?;
            let len = std::str::from_utf8(&data[..space]).ok().and_then(|t| t.parse::<usize>().ok());
            let len =
                len.filter(|n| *n > space + 1 && *n <= data.len()).ok_or("a pax record of no length")?;
            let record = &data[space + 1..len];
            let record = record.strip_suffix(b"\n").ok_or("a pax record without an end")?;
            let equals = record.iter().position(|b| *b == b'=').ok_or("a pax record without a value")?;
            self.set(&record[..equals], &record[equals + 1..])?;
            data = &data[len..];
        }
        Ok(())
    }

    fn set(&mut self, name: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let text = || std::str::from_utf8(value).map_err(|_| "a pax record that is no text");
        let number = || text()?.parse::<u64>().map_err(|_| "a pax record that is no number");
        match name {
            b"path" => self.path = Some(path_of(value.to_vec())),
            b"linkpath" => self.link = Some(path_of(value.to_vec())),
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(number()?),
            b"gid" => self.gid = Some(number()?),
            b"mtime" => {
                // Fractions do not matter here.
                let whole = text()?.split('.').next().unwrap_or_default();
                self.mtime = Some(whole.parse().map_err(|_| "a pax record that is no time")?);
            }
            _ if name.starts_with(b"GNU.sparse.") => self.sparse = true,
            _ => {
                let Ok(name) = std::str::from_utf8(name) else { return Ok(()) };
                if let Some(xattr) = name.strip_prefix(PAX_XATTR)
                    && XATTRS.iter().any(|known| xattr.starts_with(known))
                {
                    self.xattrs.insert(xattr.into(), value.to_vec());
                }
            }
        }
        Ok(())
    }
}

/// The tree of one archive that is not compressed; contents go below the new directory `work`. Blocks.
///
/// # Errors
/// On the first entry that would not stay inside, cannot be or is too much.
pub fn read_layer(archive: &mut dyn Read, work: &Path, limits: &Limits) -> Result<Tree, OciError> {
    let (mut tree, mut contents) = (Tree::default(), Contents::create(work.to_owned())?);
    apply_layer(&mut tree, &mut contents, 1, archive, limits)?;
    Ok(tree)
}

/// Applies one archive to a tree. Blocks.
///
/// # Errors
/// On the first entry that would not stay inside, cannot be or is too much; the tree is then of no use.
pub(crate) fn apply_layer(
    tree: &mut Tree,
    contents: &mut Contents,
    layer: usize,
    archive: &mut dyn Read,
    limits: &Limits,
) -> Result<(), OciError> {
    let refuse = |source| OciError::Entry { layer, source };
    let mut archive = Archive::new(archive);
    let mut extended = Extended::default();
    // Raw: extension headers are read here, with a limit.
    for entry in archive.entries().map_err(|e| read_error(layer, &e))?.raw(true) {
        let mut entry = entry.map_err(|e| read_error(layer, &e))?;
        let kind = entry.header().entry_type();
        let size = entry.header().entry_size().map_err(|e| read_error(layer, &e))?;
        if is_extension(kind) {
            if size > MAX_EXTENSION {
                let path = header_path(entry.header());
                return Err(refuse(TreeError::TooLarge(path, format!("a header of {size} bytes"))));
            }
            let mut data = Vec::with_capacity(size as usize);
            entry.read_to_end(&mut data).map_err(|e| read_error(layer, &e))?;
            let text = |mut data: Vec<u8>| {
                data.truncate(data.iter().position(|b| *b == 0).unwrap_or(data.len()));
                path_of(data)
            };
            match kind {
                EntryType::GNULongName => extended.path = Some(text(data)),
                EntryType::GNULongLink => extended.link = Some(text(data)),
                EntryType::XHeader => {
                    extended.read_pax(&data).map_err(|e| OciError::malformed(format!("layer {layer}"), e))?
                }
                // Of no entry in particular: comments.
                _ => {}
            }
            continue;
        }
        let extended = std::mem::take(&mut extended);
        let path = extended.path.clone().unwrap_or_else(|| header_path(entry.header()));
        if extended.size.is_some_and(|s| s != size) {
            // The header's size says where the next entry begins, for whoever reads it raw.
            let what = "a size that two headers give differently";
            return Err(refuse(TreeError::Unsupported(path, what)));
        }
        if tree.inodes() >= limits.entries {
            return Err(OciError::TooLarge(format!("it has more than {} entries", limits.entries)));
        }
        if contents.bytes.saturating_add(size) > limits.bytes {
            return Err(OciError::TooLarge(format!(
                "its files have more than {} MiB, at {path:?} of layer {layer}",
                limits.bytes >> 20
            )));
        }
        add(tree, contents, layer, &mut entry, path, extended)?;
    }
    Ok(())
}

fn is_extension(kind: EntryType) -> bool {
    matches!(
        kind,
        EntryType::GNULongName | EntryType::GNULongLink | EntryType::XHeader | EntryType::XGlobalHeader
    )
}

fn header_path(header: &Header) -> PathBuf {
    path_of(header.path_bytes().into_owned())
}

fn add(
    tree: &mut Tree,
    contents: &mut Contents,
    layer: usize,
    entry: &mut tar::Entry<'_, impl Read>,
    path: PathBuf,
    extended: Extended,
) -> Result<(), OciError> {
    let refuse = |source| OciError::Entry { layer, source };
    let broken = |e: io::Error| read_error(layer, &e);
    // Of `a/b/` too.
    if let Some(name) = path.file_name().map(OsStrExt::as_bytes) {
        let above = path.parent().unwrap_or(Path::new(""));
        if name == OPAQUE {
            return tree.make_opaque(layer, above).map_err(refuse);
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        if let Some(gone) = name.strip_prefix(WHITEOUT) {
            if matches!(gone, b"" | b"." | b"..") {
                return Err(refuse(TreeError::BadName(path, "it is a whiteout of nothing")));
            }
            return tree.white_out(layer, &above.join(path_of(gone.to_vec()))).map_err(refuse);
        }
    }
    let header = entry.header().clone();
    let id = |given: Option<u64>, header: io::Result<u64>| {
        let id = given.map_or(header, Ok).map_err(broken)?;
        u32::try_from(id)
            .map_err(|_| OciError::malformed(format!("layer {layer}"), "an owner that is no number"))
    };
    let meta = Meta {
        mode: header.mode().map_err(broken)? & 0o7777,
        uid: id(extended.uid, header.uid())?,
        gid: id(extended.gid, header.gid())?,
        mtime: extended.mtime.unwrap_or(header.mtime().map_err(broken)?.try_into().unwrap_or(0)),
        xattrs: extended.xattrs,
    };
    let link = || {
        let own = || header.link_name_bytes().map(|b| path_of(b.into_owned()));
        extended.link.clone().or_else(own).unwrap_or_default()
    };
    let device = || -> Result<(u32, u32), OciError> {
        let number = |n: io::Result<Option<u32>>| Ok(n.map_err(broken)?.unwrap_or(0));
        Ok((number(header.device_major())?, number(header.device_minor())?))
    };
    let node = match header.entry_type() {
        EntryType::Regular | EntryType::Continuous if extended.sparse => {
            return Err(refuse(TreeError::Unsupported(path, "a sparse file")));
        }
        // An old archive's directory is a file whose name ends so.
        EntryType::Regular if path.as_os_str().as_bytes().ends_with(b"/") => Node::Directory,
        EntryType::Regular | EntryType::Continuous => {
            let len = header.entry_size().map_err(broken)?;
            Node::File { content: contents.add(entry, len)?, len }
        }
        EntryType::Directory => Node::Directory,
        EntryType::Symlink => Node::Symlink(link()),
        EntryType::Link => return tree.hard_link(layer, &path, &link()).map_err(refuse),
        EntryType::Char => {
            let (major, minor) = device()?;
            Node::CharDevice { major, minor }
        }
        EntryType::Block => {
            let (major, minor) = device()?;
            Node::BlockDevice { major, minor }
        }
        EntryType::Fifo => Node::Fifo,
        EntryType::GNUSparse => return Err(refuse(TreeError::Unsupported(path, "a sparse file"))),
        _ => return Err(refuse(TreeError::Unsupported(path, "of an unknown kind"))),
    };
    tree.put(layer, &path, node, meta).map_err(refuse)
}

impl Contents {
    /// Keeps these bytes.
    pub fn add_bytes(&mut self, bytes: &[u8]) -> Result<Node, OciError> {
        let len = bytes.len() as u64;
        Ok(Node::File { content: self.add(&mut &*bytes, len)?, len })
    }

    /// Keeps a file of this host.
    pub fn add_file(&mut self, path: &Path) -> Result<Node, OciError> {
        let mut file = File::open(path).map_err(|e| OciError::io("open", path, e))?;
        let len = file.metadata().map_err(|e| OciError::io("look at", path, e))?.len();
        Ok(Node::File { content: self.add(&mut file, len)?, len })
    }

    /// The bytes of a small file.
    pub fn read(&self, content: u64) -> Result<Vec<u8>, OciError> {
        let path = self.path(content);
        std::fs::read(&path).map_err(|e| OciError::io("read", &path, e))
    }
}

/// Archives of tests, written by hand where `tar` would not write them.
#[cfg(test)]
pub(crate) mod testing {
    use std::io::Write;

    use super::*;

    /// An entry with the path as it is given.
    pub fn entry(out: &mut Vec<u8>, kind: EntryType, path: &str, link: &str, data: &[u8]) {
        raw(out, kind, path, link, data, data.len() as u64);
    }

    pub fn raw(out: &mut Vec<u8>, kind: EntryType, path: &str, link: &str, data: &[u8], size: u64) {
        let mut header = Header::new_ustar();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o4755);
        header.set_uid(12);
        header.set_gid(34);
        header.set_mtime(56);
        header.set_size(size);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        out.write_all(header.as_bytes()).unwrap();
        out.write_all(data).unwrap();
        out.resize(out.len().next_multiple_of(512), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::testing::{entry, raw};
    use super::*;

    const LIMITS: Limits = Limits { bytes: 1 << 20, entries: 1000, layers: 10 };

    fn try_layers(layers: &[Vec<u8>]) -> Result<(Tree, Contents, tempfile::TempDir), OciError> {
        let dir = tempfile::tempdir().unwrap();
        let (mut tree, mut contents) =
            (Tree::default(), Contents::create(dir.path().join("contents")).unwrap());
        for (n, bytes) in layers.iter().enumerate() {
            let path = dir.path().join(format!("layer-{n}"));
            std::fs::write(&path, bytes).unwrap();
            let digest = apply(&mut tree, &mut contents, n + 1, &path, &LIMITS, &CancellationToken::new())?;
            if bytes.get(257..262) == Some(b"ustar") {
                assert_eq!(digest, Digest::of(bytes));
            }
        }
        Ok((tree, contents, dir))
    }

    fn refused(layer: Vec<u8>) -> String {
        let e = try_layers(&[layer]).unwrap_err();
        let cause = std::error::Error::source(&e).map(|c| format!(": {c}")).unwrap_or_default();
        format!("{e}{cause}")
    }

    fn one(kind: EntryType, path: &str, link: &str, data: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        entry(&mut out, kind, path, link, data);
        out.extend([0; 1024]);
        out
    }

    fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
        let mut data = Vec::new();
        for (name, value) in records {
            let rest = name.len() + value.len() + 3;
            let len = (rest..).find(|n| n.to_string().len() + rest == *n).unwrap();
            data.extend(format!("{len} {name}=").as_bytes());
            data.extend(*value);
            data.push(b'\n');
        }
        data
    }

    #[test]
    fn everything_that_an_entry_says_is_kept() {
        let mut layer = Vec::new();
        let data = pax(&[
            ("path", b"usr/bin/ping"),
            ("SCHILY.xattr.security.capability", &[1, 0, 0, 2]),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("uid", b"3000000000"),
            ("mtime", b"1700000000.5"),
        ]);
        entry(&mut layer, EntryType::XHeader, "x", "", &data);
        entry(&mut layer, EntryType::Regular, "short", "", b"hello");
        let long = format!("{}/end\0", "n".repeat(200));
        entry(&mut layer, EntryType::GNULongName, "././@LongLink", "", long.as_bytes());
        entry(&mut layer, EntryType::Symlink, "short", "/etc/passwd", b"");
        entry(&mut layer, EntryType::Char, "null", "", b"");
        entry(&mut layer, EntryType::Fifo, "pipe", "", b"");
        let (mut tree, contents, _dir) = try_layers(&[layer]).unwrap();
        let (node, meta) = tree.get(Path::new("usr/bin/ping")).unwrap();
        let Node::File { content, len: 5 } = *node else { panic!("{node:?}") };
        assert_eq!((meta.mode, meta.uid, meta.gid, meta.mtime), (0o4755, 3_000_000_000, 34, 1_700_000_000));
        let names: Vec<_> = meta.xattrs.keys().collect();
        assert_eq!(names, ["security.capability"]);
        assert_eq!(contents.read(content).unwrap(), b"hello");
        let of = |tree: &mut Tree, path: &str| tree.get(Path::new(path)).map(|(n, _)| n.clone());
        let link = of(&mut tree, &long[..long.len() - 1]);
        assert_eq!(link, Some(Node::Symlink("/etc/passwd".into())));
        assert_eq!(of(&mut tree, "null"), Some(Node::CharDevice { major: 1, minor: 3 }));
        assert_eq!(of(&mut tree, "pipe"), Some(Node::Fifo));
    }

    #[test]
    fn compressed_layers_are_told_by_their_beginning() {
        let plain = one(EntryType::Regular, "f", "", b"x");
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&plain).unwrap();
        let zst = zstd::encode_all(plain.as_slice(), 1).unwrap();
        for layer in [plain.clone(), gz.finish().unwrap(), zst] {
            let (mut tree, _, _dir) = try_layers(&[layer]).unwrap();
            assert!(tree.get(Path::new("f")).is_some());
        }
    }

    #[test]
    fn hostile_entries_are_refused_by_name() {
        assert!(refused(one(EntryType::Regular, "../../etc/cron.d/x", "", b"x")).contains("leads out"));
        assert!(refused(one(EntryType::Link, "a", "../../etc/shadow", b"")).contains("leads out"));
        assert!(refused(one(EntryType::Link, "a", "/etc/shadow", b"")).contains("not there"));
        assert!(refused(one(EntryType::GNUSparse, "a", "", b"")).contains("sparse"));
        assert!(refused(one(EntryType::Regular, ".wh...", "", b"")).contains("whiteout of nothing"));
        assert!(refused(one(EntryType::new(b'Z'), "a", "", b"")).contains("unknown kind"));
        let mut long = Vec::new();
        raw(&mut long, EntryType::XHeader, "x", "", b"", 1 << 40);
        assert!(refused(long).contains("a header of"));
        let mut bomb = Vec::new();
        raw(&mut bomb, EntryType::Regular, "big", "", b"", 1 << 50);
        assert!(refused(bomb).contains("more than 1 MiB"));
        let mut cut = Vec::new();
        raw(&mut cut, EntryType::Regular, "cut", "", b"abc", 5000);
        assert!(refused(cut).contains("layer"));
        for bad in [&b"5 a=b"[..], b"x a=b\n", b"9 a", b"99999999999999999999 a=b\n", b"0 a=b\n", b"6 abcd"] {
            let text = refused(one(EntryType::XHeader, "x", "", bad));
            assert!(text.contains("pax"), "{text}");
        }
        assert!(!refused(vec![b'x'; 2048]).is_empty());
    }

    proptest::proptest! {
        /// What is nearly an archive is refused or taken, and never more than that.
        #[test]
        fn damaged_archives_are_no_trouble(
            cuts in proptest::collection::vec((0usize..6000, proptest::prelude::any::<u8>()), 0..20),
            len in 0usize..6000,
        ) {
            let mut layer = Vec::new();
            entry(&mut layer, EntryType::XHeader, "x", "", &pax(&[("path", b"a/b"), ("size", b"3")]));
            entry(&mut layer, EntryType::Regular, "short", "", b"abc");
            entry(&mut layer, EntryType::GNULongName, "l", "", b"long/name\0");
            entry(&mut layer, EntryType::Link, "short", "a/b", b"");
            entry(&mut layer, EntryType::Symlink, "s", "../..", b"");
            layer.resize(layer.len() + 1024, 0);
            for (at, byte) in cuts {
                let at = at % layer.len();
                layer[at] = byte;
            }
            layer.truncate(len.max(512));
            let dir = tempfile::tempdir().unwrap();
            let _ = read_layer(&mut layer.as_slice(), &dir.path().join("contents"), &LIMITS);
        }
    }

    #[test]
    fn what_unpacks_to_too_much_is_refused() {
        // Half a GiB of zeros behind the archive's end, in half a MiB.
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&one(EntryType::Regular, "f", "", b"x")).unwrap();
        io::copy(&mut io::repeat(0).take(512 << 20), &mut gz).unwrap();
        assert!(refused(gz.finish().unwrap()).contains("too large"));
        let mut many = Vec::new();
        for n in 0..1100 {
            entry(&mut many, EntryType::Directory, &format!("d{n}/"), "", b"");
        }
        assert!(refused(many).contains("more than 1000 entries"));
        let (_, contents, _dir) = try_layers(&[one(EntryType::Regular, "f", "", b"x")]).unwrap();
        assert_eq!(contents.next, 1);
    }
}
