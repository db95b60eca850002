//! Whether Firecracker and KVM run the guest's kernel here, found out by running it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::Command;

use super::api::{BootSource, FullConfig, MachineConfig};
use super::{KERNEL_ARGUMENTS, Program};

/// What guest-init says on the console.
const SIGN: &str = "nidus: probe ok";
/// Most of the output that is looked at.
const OUTPUT_LIMIT: u64 = 1 << 20;

/// Whether it works, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The guest's kernel and first program ran.
    pub works: bool,
    /// One sentence for people.
    pub reason: String,
}

/// Boots `kernel` (ELF) with `initrd` (guest-init with the kernel's modules) and nothing else, for at
/// most `limit`. A KVM that cannot run this kernel (a paravirtual one, for example) is found out by
/// that and by nothing less: its device opens all the same.
pub async fn kvm(program: &Program, kernel: &Path, initrd: &Path, limit: Duration) -> Verdict {
    let no = |reason: String| Verdict { works: false, reason };
    if let Err(e) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return no(format!("/dev/kvm cannot be opened: {e}"));
    }
    let dir = match tempfile::Builder::new().prefix("nidus-probe-").tempdir() {
        Ok(dir) => dir,
        Err(e) => return no(format!("no temporary directory can be made: {e}")),
    };
    let config = FullConfig {
        boot_source: Some(BootSource {
            kernel_image_path: kernel.display().to_string(),
            initrd_path: Some(initrd.display().to_string()),
            boot_args: Some(format!("console=ttyS0 quiet {KERNEL_ARGUMENTS} nidus.probe=1")),
        }),
        machine_config: Some(MachineConfig {
            vcpu_count: 1,
            mem_size_mib: 192,
            smt: None,
            track_dirty_pages: None,
            huge_pages: None,
            cpu_template: None,
        }),
        ..FullConfig::default()
    };
    let file = dir.path().join("config.json");
    let written = serde_json::to_vec(&config).map_err(std::io::Error::from);
    if let Err(e) = written.and_then(|text| std::fs::write(&file, text)) {
        return no(format!("{} cannot be written: {e}", file.display()));
    }
    let mut command = Command::new(&program.path);
    command
        .args(["--no-api", "--level", "Error", "--config-file"])
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let mut child = match command.spawn() {
        Ok(c) => c,
        Err(e) => return no(format!("{} cannot be started: {e}", program.path.display())),
    };
    let result = match child.stdout.take() {
        Some(out) => tokio::time::timeout(limit, look_for_sign(out)).await,
        None => Ok(Err(String::new())),
    };
    // The guest's power-off does not end Firecracker.
    let _ = child.kill().await;
    match result {
        Ok(Ok(())) => Verdict {
            works: true,
            reason: format!("Firecracker {} booted the guest's kernel", program.version),
        },
        Ok(Err(last)) => {
            let said = if last.is_empty() { String::new() } else { format!(" ({last})") };
            no(format!("/dev/kvm opens, but Firecracker did not boot the guest's kernel with it{said}"))
        }
        Err(_) => no(format!(
            "/dev/kvm opens, but the guest's kernel did not start within {} s (a paravirtual KVM?)",
            limit.as_secs()
        )),
    }
}

/// Reads until the sign; without it, the last line is the error.
async fn look_for_sign(out: impl AsyncRead + Unpin) -> Result<(), String> {
    let mut out = BufReader::new(out.take(OUTPUT_LIMIT));
    let mut last = String::new();
    let mut line = Vec::new();
    while let Ok(1..) = out.read_until(b'\n', &mut line).await {
        let text = String::from_utf8_lossy(&line);
        if text.contains(SIGN) {
            return Ok(());
        }
        if !text.trim().is_empty() {
            last = text.trim().chars().take(300).collect();
        }
        line.clear();
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_sign_or_the_last_line_is_found() {
        let booted = &b"[ 0.1] Linux\r\n[ 0.9] nidus: probe ok\r\nmore"[..];
        assert_eq!(look_for_sign(booted).await, Ok(()));
        let failed = &b"first\nKVM says no\n\n"[..];
        assert_eq!(look_for_sign(failed).await, Err("KVM says no".into()));
    }
}
