//! What the base template was made of, so that a newer envd, kernel or VMM makes it anew.

use std::fs::File;
use std::io;
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::Config;

/// The parts that are not in the configuration.
#[derive(Debug)]
pub struct MadeWith {
    /// Digest of the programs in the guest.
    pub programs: String,
    /// Version of the guest's kernel.
    pub kernel: String,
    /// The VMM that saves the snapshot.
    pub vmm: String,
}

/// A build of the base template and the digest of all that it was made of.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The build.
    pub build: String,
    /// SHA-256, in hexadecimal digits.
    pub digest: String,
}

/// How builds are stored. Another number here makes the base template anew; what else an older nidus
/// stored is refused. 2: with checksums.
const STORED_AS: u32 = 2;

const FILE: &str = "base-template.json";

impl Recipe {
    /// The digest that a build made now would have.
    pub fn of(config: &Config, with: &MadeWith) -> anyhow::Result<String> {
        let mut hash = Sha256::new();
        hash.update(&with.programs);
        let rest = (
            &config.base_image,
            config.base_cpu,
            config.base_memory_mb,
            config.disk_mb,
            config.huge_pages,
            &with.kernel,
            &with.vmm,
            STORED_AS,
        );
        hash.update(serde_json::to_vec(&rest)?);
        if let Some(image) = config.local_images.get(&config.base_image) {
            hash.update(serde_json::to_vec(&(image, nidus_template::image_identity(image)?))?);
        }
        Ok(hex(hash))
    }

    /// The one that was saved, if it can be read.
    pub fn load(data_dir: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(data_dir.join(FILE)).ok()?).ok()
    }

    /// Saves it for the next start.
    pub fn save(&self, data_dir: &Path) -> anyhow::Result<()> {
        let path = data_dir.join(FILE);
        std::fs::write(&path, serde_json::to_vec(self)?)
            .with_context(|| format!("Cannot write {}", path.display()))
    }
}

/// A digest of programs.
pub fn programs(paths: &[&Path]) -> anyhow::Result<String> {
    let mut hash = Sha256::new();
    for path in paths {
        let mut file = File::open(path).with_context(|| format!("Cannot read {}", path.display()))?;
        io::copy(&mut file, &mut HashWriter(&mut hash))
            .with_context(|| format!("Cannot read {}", path.display()))?;
    }
    Ok(hex(hash))
}

/// In hexadecimal digits.
pub fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

struct HashWriter<'a>(&'a mut Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_envd_or_size_is_another_recipe() {
        let dir = tempfile::tempdir().unwrap();
        let (envd, guest_init) = (dir.path().join("envd"), dir.path().join("init"));
        std::fs::write(&envd, "one").unwrap();
        std::fs::write(&guest_init, "init").unwrap();
        let with = || MadeWith {
            programs: programs(&[&envd, &guest_init]).unwrap(),
            kernel: "6.1".into(),
            vmm: "qemu".into(),
        };
        let config = Config::default();
        let first = Recipe::of(&config, &with()).unwrap();
        assert_eq!(first, Recipe::of(&config, &with()).unwrap());
        assert_ne!(first, Recipe::of(&Config { base_memory_mb: 1024, ..config.clone() }, &with()).unwrap());
        let image = dir.path().join("image");
        let local =
            Config { local_images: [(config.base_image.clone(), image.clone())].into(), ..config.clone() };
        assert!(Recipe::of(&local, &with()).unwrap_err().to_string().contains("image"));
        std::fs::write(&image, "a").unwrap();
        let local_first = Recipe::of(&local, &with()).unwrap();
        assert_ne!(first, local_first);
        std::fs::write(&image, "another").unwrap();
        assert_ne!(local_first, Recipe::of(&local, &with()).unwrap());
        std::fs::write(&envd, "two").unwrap();
        assert_ne!(first, Recipe::of(&config, &with()).unwrap());

        let recipe = Recipe { build: "b".into(), digest: first };
        recipe.save(dir.path()).unwrap();
        assert_eq!(Recipe::load(dir.path()), Some(recipe));
    }
}
