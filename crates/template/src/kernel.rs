//! The guest's kernel: any directory `{kernels}/{version}` with a `vmlinuz` and `modules/`; when
//! there is none, Debian's cloud kernel package is downloaded and unpacked there, never installed.

use std::fs;
use std::path::{Path, PathBuf};

use nidus_vmm::guest::{Kernel, MODULES, VOLUME_MODULES};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::BuildError;
use crate::command::run;

/// Meta package whose dependency is the newest cloud kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// Returns the newest kernel below `kernels`, fetching Debian's if there is none.
///
/// # Errors
/// When the package cannot be had (no Debian, no network) or not be unpacked.
pub async fn ensure(
    kernels: &Path,
    cancel: &CancellationToken,
    line: impl FnMut(&str),
) -> Result<Kernel, BuildError> {
    if let Some(kernel) = Kernel::list(kernels).pop() {
        return Ok(kernel);
    }
    fs::create_dir_all(kernels).map_err(|e| BuildError::io("make", kernels, e))?;
    let work = tempdir_in(kernels)?;
    let result = fetch(kernels, &work, cancel, line).await;
    let _ = fs::remove_dir_all(&work);
    result
}

fn tempdir_in(dir: &Path) -> Result<PathBuf, BuildError> {
    let work = dir.join(format!(".fetch-{}", std::process::id()));
    let _ = fs::remove_dir_all(&work);
    fs::create_dir(&work).map_err(|e| BuildError::io("make", &work, e))?;
    Ok(work)
}

async fn fetch(
    kernels: &Path,
    work: &Path,
    cancel: &CancellationToken,
    mut line: impl FnMut(&str),
) -> Result<Kernel, BuildError> {
    let depends =
        Command::new("apt-cache").args(["depends", "--important", META_PACKAGE]).output().await.map_err(
            |source| BuildError::Io { action: "ask apt-cache for the kernel package".into(), source },
        )?;
    let text = String::from_utf8_lossy(&depends.stdout);
    let package = text
        .lines()
        .filter_map(|l| l.trim().strip_prefix("Depends: "))
        .find(|p| p.starts_with("linux-image-"))
        .ok_or_else(|| BuildError::NoKernel { package: META_PACKAGE, dir: kernels.to_owned() })?
        .to_owned();
    line(&format!("downloading {package}"));
    let mut download = Command::new("apt-get");
    download.args(["-qq", "-o", "APT::Sandbox::User=root", "download", &package]).current_dir(work);
    run(download, "apt", cancel, &mut line).await?;
    let deb = find(work, |p| p.extension().is_some_and(|e| e == "deb"))
        .ok_or_else(|| BuildError::NoKernel { package: META_PACKAGE, dir: kernels.to_owned() })?;
    let tree = work.join("tree");
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("-x").arg(&deb).arg(&tree);
    run(unpack, "dpkg", cancel, &mut line).await?;
    let image = find(&tree.join("boot"), |p| file_name(p).starts_with("vmlinuz-"))
        .ok_or_else(|| BuildError::NoKernel { package: META_PACKAGE, dir: kernels.to_owned() })?;
    let version = file_name(&image).trim_start_matches("vmlinuz-").to_owned();
    let ready = work.join("ready");
    let modules = ready.join("modules");
    fs::create_dir_all(&modules).map_err(|e| BuildError::io("make", &modules, e))?;
    let to = ready.join("vmlinuz");
    fs::rename(&image, &to).map_err(|e| BuildError::io("move the kernel to", &to, e))?;
    for name in MODULES.iter().chain(VOLUME_MODULES) {
        let (plain, packed) = (format!("{name}.ko"), format!("{name}.ko.xz"));
        let Some(file) = find(&tree.join("lib"), |p| file_name(p) == plain || file_name(p) == packed)
            .or_else(|| find(&tree.join("usr/lib"), |p| file_name(p) == plain || file_name(p) == packed))
        else {
            continue; // Built into this kernel.
        };
        if file_name(&file) == packed {
            let mut xz = Command::new("xz");
            xz.arg("-dk").arg(&file);
            run(xz, "xz-utils", cancel, &mut line).await?;
        }
        let source = file.with_file_name(&plain);
        let to = modules.join(&plain);
        fs::copy(&source, &to).map_err(|e| BuildError::io("copy a module to", &to, e))?;
    }
    let dir = kernels.join(&version);
    fs::rename(&ready, &dir).map_err(|e| BuildError::io("move the kernel to", &dir, e))?;
    line(&format!("kernel {version} unpacked"));
    Ok(Kernel { version, dir })
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|n| n.to_str()).unwrap_or_default()
}

fn find(dir: &Path, wanted: impl Fn(&Path) -> bool + Copy) -> Option<PathBuf> {
    for entry in fs::read_dir(dir).ok()?.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            if let Some(found) = find(&path, wanted) {
                return Some(found);
            }
        } else if wanted(&path) {
            return Some(path);
        }
    }
    None
}
