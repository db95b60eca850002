//! The modules that the machine's kernel needs before it can read its root disk.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Those, by name; what they depend on comes along. ext4 asks for a checksum by the name of its
/// algorithm, which no dependency says.
pub const EARLY: &[&str] = &["virtio_pci", "virtio_blk", "virtio_console", "crc32c_generic", "ext4"];

/// The files of [`EARLY`] and their dependencies, in an order in which they can be loaded. `dir` is
/// `lib/modules/VERSION`.
pub fn early(dir: &Path) -> Result<Vec<PathBuf>> {
    let index = dir.join("modules.dep");
    let text = fs::read_to_string(&index).with_context(|| format!("read {}", index.display()))?;
    let builtin = fs::read_to_string(dir.join("modules.builtin")).unwrap_or_default();
    let order = resolve(&text, &builtin, EARLY)?;
    Ok(order.into_iter().map(|file| dir.join(file)).collect())
}

/// A line of modules.dep is `FILE: DEPENDENCY...`, the dependencies in reverse order of loading.
fn resolve<'a>(dep: &'a str, builtin: &str, wanted: &[&str]) -> Result<Vec<&'a str>> {
    let lines: HashMap<&str, (&str, &str)> = dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| (name(file), (file, needs)))
        .collect();
    let mut order = Vec::new();
    for module in wanted {
        if builtin.lines().any(|file| name(file) == *module) {
            continue;
        }
        let (file, needs) =
            lines.get(module).with_context(|| format!("the kernel has no module {module}"))?;
        for file in needs.split_whitespace().rev().chain([*file]) {
            if !order.contains(&file) {
                order.push(file);
            }
        }
    }
    Ok(order)
}

/// `kernel/fs/ext4/ext4.ko` -> `ext4`.
fn name(file: &str) -> &str {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.split('.').next().unwrap_or(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first_and_once() {
        let dep = "k/a.ko: k/b.ko k/c.ko\nk/b.ko: k/c.ko\nk/c.ko:\nk/d.ko: k/c.ko\n";
        assert_eq!(resolve(dep, "", &["a", "d"]).unwrap(), ["k/c.ko", "k/b.ko", "k/a.ko", "k/d.ko"]);
        assert_eq!(resolve(dep, "k/a.ko\n", &["a", "b"]).unwrap(), ["k/c.ko", "k/b.ko"]);
        assert!(resolve(dep, "", &["e"]).unwrap_err().to_string().contains("no module e"));
    }
}
