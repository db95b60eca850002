//! What QEMU and KVM can do here, found out by running them.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::Accel;
use crate::{Result, VmmError};

/// Lowest QEMU: since 8.2 a memory file can be opened read-only and yet be mapped as writable,
/// private RAM (`readonly=on,rom=off`), and states can be read from and written to files
/// without a helper process (`file:`), which `-sandbox spawn=deny` would refuse.
pub const MINIMUM: (u32, u32) = (8, 2);
const MINIMUM_TEXT: &str = "8.2";

/// Resolves the program and asks for its version.
pub async fn find(program: &Path) -> Result<(PathBuf, String)> {
    let missing = || VmmError::NotInstalled {
        program: program.display().to_string(),
        package: "qemu-system-x86",
        variable: "NIDUS_QEMU",
    };
    let path = resolve(program).ok_or_else(missing)?;
    let out = Command::new(&path)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .await
        .map_err(|e| VmmError::io(format!("run {} --version", path.display()), e))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let version = parse_version(&text).ok_or_else(|| {
        VmmError::io(
            format!("read the version of {}", path.display()),
            std::io::Error::new(std::io::ErrorKind::InvalidData, text.trim().to_owned()),
        )
    })?;
    let mut parts = version.split('.').filter_map(|p| p.parse::<u32>().ok());
    let found = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if found < MINIMUM {
        return Err(VmmError::TooOld {
            program: path.display().to_string(),
            found: version,
            needed: MINIMUM_TEXT,
            why: "older ones would need write access to the template's memory (Debian 12: install qemu-system-x86 from backports)",
        });
    }
    Ok((path, version))
}

fn resolve(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|d| d.join(program)).find(|p| p.is_file())
}

/// `QEMU emulator version 10.0.2 (Debian ...)` -> `10.0.2`.
fn parse_version(text: &str) -> Option<String> {
    let rest = text.split("version ").nth(1)?;
    let v: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    (!v.is_empty()).then_some(v)
}

/// Result of [`kvm`]: which accelerator to use, and why.
#[derive(Debug, Clone)]
pub struct AccelChoice {
    /// The accelerator.
    pub accel: Accel,
    /// One sentence for people.
    pub reason: String,
}

/// Boots the guest's kernel under KVM with nothing but a console, for at most `limit`. An
/// accelerator that cannot run this kernel (a paravirtual one, for example) is found out by
/// that and by nothing less: its device opens all the same.
pub async fn kvm(program: &Path, kernel: &Path, initrd: &Path, limit: Duration) -> AccelChoice {
    let tcg = |reason: String| AccelChoice { accel: Accel::Tcg, reason };
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return tcg("there is no usable /dev/kvm; software emulation is used".into());
    }
    let Some(program) = resolve(program) else {
        return tcg("QEMU was not found".into());
    };
    let mut command = Command::new(program);
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "192"])
        .args(["-machine", "microvm,acpi=on,rtc=on,isa-serial=on", "-accel", "kvm", "-cpu", "host"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        // guest-init says that it runs and ends the VM.
        .args(["-append", "console=ttyS0 quiet panic=-1 nidus.probe=1", "-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let child = match command.spawn() {
        Ok(c) => c,
        Err(e) => return tcg(format!("QEMU could not be started with KVM: {e}")),
    };
    match tokio::time::timeout(limit, child.wait_with_output()).await {
        Ok(Ok(out)) if String::from_utf8_lossy(&out.stdout).contains("nidus: probe ok") => {
            AccelChoice { accel: Accel::Kvm, reason: "KVM booted the guest's kernel".into() }
        }
        Ok(_) => tcg("/dev/kvm opens but did not boot the guest's kernel; software emulation is used".into()),
        Err(_) => tcg(format!(
            "/dev/kvm opens but the guest's kernel did not start within {} s (a paravirtual KVM?); software emulation is used",
            limit.as_secs()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(
            parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2)").as_deref(),
            Some("10.0.2")
        );
        assert_eq!(parse_version("something else"), None);
    }

    #[tokio::test]
    async fn a_missing_qemu_names_the_package_and_the_variable() {
        let e = find(Path::new("/nonexistent/qemu")).await.unwrap_err().to_string();
        assert!(e.contains("qemu-system-x86") && e.contains("NIDUS_QEMU"), "{e}");
    }
}
