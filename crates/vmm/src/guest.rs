//! The guest's kernel and initramfs: taken out of a Debian kernel package, never installed here.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::{KernelFormat, Result, VmmError, kernel_image};

/// Names of a kernel's image in its directory: bzImage, ELF.
const IMAGES: [&str; 2] = ["vmlinuz", "vmlinux.bin"];

/// Modules that guest-init loads, in this order; those built into the kernel have no file.
pub const MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio-rng",
];

/// Modules by which guests mount volumes, in this order. Their dependencies differ between kernels, and
/// a guest without them boots all the same.
pub const VOLUME_MODULES: &[&str] =
    &["sunrpc", "grace", "lockd", "netfs", "fscache", "nfs_acl", "nfs_localio", "nfs", "nfsv3"];

/// An unpacked kernel: `{dir}/vmlinuz` or `{dir}/vmlinux.bin` (ELF) and `{dir}/modules/*.ko`, named
/// by its version.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Version as the kernel calls itself, such as `6.1.0-56-cloud-amd64`.
    pub version: String,
    /// Directory that holds it.
    pub dir: PathBuf,
}

impl Kernel {
    /// The bzImage; the ELF kernel where there is no other (QEMU boots that too).
    pub fn image(&self) -> PathBuf {
        let here = |name: &&&str| self.dir.join(name).is_file();
        self.dir.join(IMAGES.iter().find(here).unwrap_or(&IMAGES[0]))
    }

    /// The ELF kernel, which is taken out of the bzImage at the first call and kept beside it.
    /// Blocks for the time of a decompression then.
    ///
    /// # Errors
    /// [`VmmError::KernelImage`] when there is none in the bzImage; when it cannot be written.
    pub fn elf(&self) -> Result<PathBuf> {
        let elf = self.dir.join(IMAGES[1]);
        if !elf.is_file() {
            kernel_image::extract(&self.image(), &elf)?;
        }
        Ok(elf)
    }

    /// The image in the form that a driver wants.
    ///
    /// # Errors
    /// As [`Kernel::elf`].
    pub fn image_for(&self, format: KernelFormat) -> Result<PathBuf> {
        match format {
            KernelFormat::BzImage => Ok(self.image()),
            KernelFormat::Elf => self.elf(),
        }
    }

    /// Kernels below `dir`, newest version last.
    pub fn list(dir: &Path) -> Vec<Self> {
        let mut kernels: Vec<Self> = fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|e| IMAGES.iter().any(|name| e.path().join(name).is_file()))
            .filter_map(|e| Some(Self { version: e.file_name().into_string().ok()?, dir: e.path() }))
            .collect();
        kernels.sort_by_key(|k| version_key(&k.version));
        kernels
    }

    /// Writes the initramfs (newc cpio, uncompressed: the kernel unpacks it at once) with
    /// guest-init as /init, this kernel's modules and their order; a dash is in front of those that may fail.
    ///
    /// # Errors
    /// When guest-init or a module cannot be read, or `target` not be written.
    pub fn write_initramfs(&self, guest_init: &Path, target: &Path) -> Result<()> {
        let wrap = |e: io::Error| VmmError::io(format!("write the initramfs {}", target.display()), e);
        let mut archive = Archive::default();
        for dir in ["dev", "proc", "sys", "lib", "lib/modules", "newroot"] {
            archive.add(dir, 0o040_755, &[]).map_err(wrap)?;
        }
        let init = read(guest_init)?;
        archive.add("init", 0o100_755, &init).map_err(wrap)?;
        let mut order = String::new();
        let needed = MODULES.iter().map(|name| (name, ""));
        for (name, mark) in needed.chain(VOLUME_MODULES.iter().map(|name| (name, "-"))) {
            let file = self.dir.join("modules").join(format!("{name}.ko"));
            if file.is_file() {
                let inside = format!("lib/modules/{name}.ko");
                archive.add(&inside, 0o100_644, &read(&file)?).map_err(wrap)?;
                order.push_str(&format!("{mark}/{inside}\n"));
            }
        }
        archive.add("modules.order", 0o100_644, order.as_bytes()).map_err(wrap)?;
        let bytes = archive.finish().map_err(wrap)?;
        let mut file = fs::File::create(target).map_err(wrap)?;
        file.write_all(&bytes).map_err(wrap)?;
        file.sync_all().map_err(wrap)
    }
}

/// An initramfs in the making: a newc cpio archive in memory.
#[derive(Debug, Default)]
pub struct Archive {
    out: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// Adds a file or directory. `name` is relative to the root, its directory was added before;
    /// `mode` has the kind of file as in stat(2).
    ///
    /// # Errors
    /// When `data` is longer than the format can say (4 GiB).
    pub fn add(&mut self, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        self.inode += 1;
        let builder = cpio::newc::Builder::new(name).ino(self.inode).mode(mode).nlink(1);
        let mut w = builder.write(std::mem::take(&mut self.out), len);
        w.write_all(data)?;
        self.out = w.finish()?;
        Ok(())
    }

    /// The archive's bytes.
    ///
    /// # Errors
    /// None that is known: the archive is in memory.
    pub fn finish(self) -> io::Result<Vec<u8>> {
        cpio::newc::trailer(self.out)
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| VmmError::io(format!("read {}", path.display()), e))
}

/// Numbers in a version compare as numbers.
pub(crate) fn version_key(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|p| p.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_initramfs_holds_init_modules_and_their_order() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("modules")).unwrap();
        fs::write(dir.path().join("modules/virtio_blk.ko"), b"module").unwrap();
        fs::write(dir.path().join("modules/nfs.ko"), b"module").unwrap();
        fs::write(dir.path().join("init"), b"program").unwrap();
        let kernel = Kernel { version: "1".into(), dir: dir.path().into() };
        let target = dir.path().join("initrd");
        kernel.write_initramfs(&dir.path().join("init"), &target).unwrap();
        let mut rest = io::Cursor::new(fs::read(&target).unwrap());
        let mut files = Vec::new();
        loop {
            let mut r = cpio::newc::Reader::new(rest).unwrap();
            let name = r.entry().name().to_owned();
            if r.entry().is_trailer() {
                break;
            }
            let mut data = Vec::new();
            io::Read::read_to_end(&mut r, &mut data).unwrap();
            files.push((name, r.entry().mode(), data));
            rest = r.finish().unwrap();
        }
        let get = |n: &str| files.iter().find(|f| f.0 == n).unwrap();
        assert_eq!(get("init").2, b"program");
        assert_eq!(get("init").1, 0o100_755);
        assert_eq!(get("modules.order").2, b"/lib/modules/virtio_blk.ko\n-/lib/modules/nfs.ko\n");
    }

    #[test]
    fn versions_compare_as_numbers() {
        assert!(version_key("6.1.0-9-cloud-amd64") < version_key("6.1.0-56-cloud-amd64"));
    }
}
