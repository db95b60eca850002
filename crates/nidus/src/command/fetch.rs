//! `nidus fetch`: what a host without a network needs for its first template.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::output::Output;

/// Options of `nidus fetch`.
#[derive(Debug, Args)]
pub struct Fetch {
    /// Directory to make: kernels/ for the other host's data directory, rootfs.ext4 for NIDUS_LOCAL_IMAGES
    dir: PathBuf,
    /// Suite of Debian whose packages the image is made of
    #[arg(long, default_value = "bookworm")]
    suite: String,
}

pub async fn run(fetch: Fetch, config: &Config, out: Output) -> anyhow::Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("nidus fetch needs root to unpack packages with their owners: run it with sudo");
    }
    let envd = config.program(config.envd.as_ref(), "envd")?;
    std::fs::create_dir(&fetch.dir).with_context(|| format!("Cannot make {}", fetch.dir.display()))?;
    let dir = fetch.dir.canonicalize().with_context(|| format!("Cannot find {}", fetch.dir.display()))?;
    let result = fill(&dir, &fetch.suite, &envd).await;
    if result.is_err() {
        // Half of it would be taken for the whole.
        let _ = std::fs::remove_dir_all(&dir);
    }
    let kernel = result?;
    if out.json {
        out.value(
            &serde_json::json!({ "directory": dir, "kernel": kernel, "image": dir.join("rootfs.ext4") }),
        )?;
    } else {
        println!("{}: kernel {kernel} and an image of debian:{}", dir.display(), fetch.suite);
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the kernel's version.
async fn fill(dir: &Path, suite: &str, envd: &Path) -> anyhow::Result<String> {
    let stop = CancellationToken::new();
    let interrupted = stop.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            interrupted.cancel();
        }
    });
    let say = |line: &str| eprintln!("nidus: {}", line.trim_start_matches("I: "));
    let kernel = nidus_template::ensure_kernel(&dir.join("kernels"), &stop, say).await?;
    let progress = |line: &str| {
        if line.starts_with("I: ") {
            say(line);
        }
    };
    let (image, work) = (dir.join("rootfs.ext4"), dir.join("work"));
    nidus_template::make_image(suite, envd, &image, &work, &stop, progress).await?;
    Ok(kernel.version)
}
