//! The machine's image: made once from Debian's packages, kept by a key of what it is made of.

mod build;
mod modules;
mod tool;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

/// Images that no run has used for so long are removed when a new one is made.
const KEEP: Duration = Duration::from_secs(14 * 24 * 3600);

/// A complete image.
#[derive(Debug)]
pub struct Image {
    /// Holds `root.ext4`, `vmlinuz`, `modules/` and `emulator/`.
    pub dir: PathBuf,
}

impl Image {
    /// The root disk.
    pub fn disk(&self) -> PathBuf {
        self.dir.join("root.ext4")
    }

    /// The kernel.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// A command that starts the image's own QEMU: its libraries are another release's than the host's, so
    /// its own loader starts it.
    pub fn emulator(&self) -> Command {
        let root = self.dir.join("emulator/usr");
        let libraries = root.join("lib/x86_64-linux-gnu");
        let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&libraries).arg(root.join("bin/qemu-system-x86_64"));
        for firmware in ["share/qemu", "share/seabios"] {
            command.arg("-L").arg(root.join(firmware));
        }
        command
    }

    /// The modules that make the root disk readable, in the order of loading.
    pub fn modules(&self) -> Result<Vec<PathBuf>> {
        let dir = self.dir.join("modules");
        let order = dir.join("order");
        let text = fs::read_to_string(&order).with_context(|| format!("read {}", order.display()))?;
        Ok(text.lines().map(|name| dir.join(name)).collect())
    }
}

/// Returns the image for this version of the test bed, made now if it is not there.
pub fn ensure(cache: &Path) -> Result<Image> {
    let key = key();
    let image = Image { dir: cache.join(format!("image-{key}")) };
    if used(&image) {
        return Ok(image);
    }
    fs::create_dir_all(cache).with_context(|| format!("make {}", cache.display()))?;
    let _lock = lock(&cache.join("lock"))?;
    // Another process may have made it while this one waited.
    if used(&image) {
        return Ok(image);
    }
    clear(cache);
    let work = cache.join(format!(".building-{key}"));
    eprintln!("testbed: making the machine's image in {} (once)", cache.display());
    let result = build::build(&work).and_then(|()| {
        fs::rename(&work, &image.dir).with_context(|| format!("move the image to {}", image.dir.display()))
    });
    if result.is_err() {
        let _ = fs::remove_dir_all(&work);
    }
    result.map(|()| image)
}

/// What the image depends on, in short.
fn key() -> String {
    let mut hash = Sha256::new();
    build::recipe().iter().for_each(|part| {
        hash.update(part.as_bytes());
        hash.update([0]);
    });
    hash.finalize().iter().take(6).map(|b| format!("{b:02x}")).collect()
}

/// Whether the image is there; if so, notes that it is in use.
fn used(image: &Image) -> bool {
    let Ok(file) = File::open(image.disk()) else { return false };
    // Only for `clear`: a cache that cannot be written still serves.
    let _ = file.set_modified(SystemTime::now());
    true
}

fn lock(path: &Path) -> Result<Flock<File>> {
    let file = File::options().create(true).append(true).open(path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("lock {}", path.display()))
}

/// Removes what a killed build left, and images that nobody uses any more. The lock is held.
fn clear(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let disk = Image { dir: entry.path() }.disk();
        let modified = fs::metadata(disk).and_then(|m| m.modified());
        let old = modified.is_ok_and(|m| m.elapsed().is_ok_and(|age| age > KEEP));
        if name.starts_with(".building-") || (name.starts_with("image-") && old) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_names_the_recipe() {
        assert_eq!(key(), key());
        assert_eq!(key().len(), 12);
    }

    #[test]
    fn leftovers_and_old_images_go_and_used_ones_stay() {
        let cache = tempfile::tempdir().unwrap();
        let image = |name: &str| {
            let image = Image { dir: cache.path().join(name) };
            fs::create_dir(&image.dir).unwrap();
            fs::write(image.disk(), b"").unwrap();
            image
        };
        let (fresh, old) = (image("image-a"), image("image-b"));
        let long_ago = SystemTime::now() - 2 * KEEP;
        File::open(old.disk()).unwrap().set_modified(long_ago).unwrap();
        File::open(fresh.disk()).unwrap().set_modified(long_ago).unwrap();
        fs::create_dir(cache.path().join(".building-a")).unwrap();
        assert!(used(&fresh));
        clear(cache.path());
        assert!(used(&fresh) && !old.dir.exists() && !cache.path().join(".building-a").exists());
    }
}
