//! A Debian root file system made from packages, written as an ext4 image without mounting.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use nidus_network::HYPERLOOP_IP;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::BuildError;
use crate::command::run;

/// What every base template has.
const PACKAGES: &str = "ca-certificates,curl,git,iproute2,less,nano,openssh-client,procps,python-is-python3,\
python3,python3-pip,python3-venv,sudo,tar,tzdata,unzip,wget,xz-utils,zip";

/// Where envd lies in the guest; guest-init starts it from there.
pub const ENVD_PATH: &str = "usr/bin/envd";

/// Resolvers of guests.
pub const RESOLV_CONF: &str = "nameserver 8.8.8.8\nnameserver 1.1.1.1\n";
/// Mounts of guests.
pub const FSTAB: &str = "/dev/vda / ext4 defaults,noatime 0 1\n";

/// The guest's unprivileged user.
pub const USER: (&str, u32) = ("user", 1000);

/// Files of a new user's home that come from /etc/skel.
pub const SKELETON: [&str; 3] = [".bashrc", ".profile", ".bash_logout"];

/// The user's lines in the files of accounts, with this id.
pub fn accounts(id: u32) -> [(&'static str, String); 3] {
    let name = USER.0;
    [
        ("etc/passwd", format!("{name}:x:{id}:{id}::/home/{name}:/bin/bash\n")),
        ("etc/group", format!("{name}:x:{id}:\n")),
        ("etc/shadow", format!("{name}:*:19000:0:99999:7:::\n")),
    ]
}

/// What lets the user be root.
pub fn sudoers() -> String {
    format!("{} ALL=(ALL) NOPASSWD: ALL\n", USER.0)
}

/// Names that guests know. The last line is what envd would write at every start, if it was not there.
pub fn hosts() -> String {
    format!("127.0.0.1 localhost nidus\n::1 localhost ip6-localhost\n{HYPERLOOP_IP} events.e2b.local\n")
}

/// Makes the tree of packages under `root` with mmdebstrap: what every base has, and `packages`.
pub async fn debian(
    suite: &str,
    packages: &[String],
    root: &Path,
    cancel: &CancellationToken,
    line: impl FnMut(&str),
) -> Result<(), BuildError> {
    if suite.is_empty() || !suite.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        return Err(BuildError::BadRequest(format!("'{suite}' is not the name of a Debian suite")));
    }
    // https://www.debian.org/doc/debian-policy/ch-controlfields.html#source: nothing that mmdebstrap reads otherwise.
    let named = |p: &String| {
        p.len() >= 2
            && p.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && p.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
    };
    if let Some(bad) = packages.iter().find(|p| !named(p)) {
        return Err(BuildError::BadRequest(format!("'{bad}' is not the name of a Debian package")));
    }
    let include: Vec<&str> = PACKAGES.split(',').chain(packages.iter().map(String::as_str)).collect();
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--mode=root", "--variant=minbase", "--format=directory"])
        .arg(format!("--include={}", include.join(",")))
        // Documentation is most of the files of a small system, and nobody reads it there.
        .args(["--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*"])
        .args([
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        ])
        .arg(suite)
        .arg(root);
    run(command, "mmdebstrap", cancel, line).await
}

/// Adds envd, the user and the settings that a sandbox expects.
pub fn customise(root: &Path, envd: &Path) -> Result<(), BuildError> {
    let target = root.join(ENVD_PATH);
    fs::copy(envd, &target).map_err(|e| BuildError::io("copy envd to", &target, e))?;
    mode(&target, 0o755)?;
    let (name, id) = USER;
    for (path, line) in accounts(id) {
        append(root, path, &line)?;
    }
    write(root, "etc/sudoers.d/nidus", &sudoers())?;
    mode(&root.join("etc/sudoers.d/nidus"), 0o440)?;
    let home = root.join("home").join(name);
    fs::create_dir_all(&home).map_err(|e| BuildError::io("make", &home, e))?;
    for file in SKELETON {
        let from = root.join("etc/skel").join(file);
        if from.is_file() {
            let to = home.join(file);
            fs::copy(&from, &to).map_err(|e| BuildError::io("copy to", &to, e))?;
            chown(&to, Some(id), Some(id)).map_err(|e| BuildError::io("change the owner of", &to, e))?;
        }
    }
    chown(&home, Some(id), Some(id)).map_err(|e| BuildError::io("change the owner of", &home, e))?;
    mode(&home, 0o755)?;
    write(root, "etc/hostname", "nidus\n")?;
    write(root, "etc/hosts", &hosts())?;
    // A link into /run would dangle in a guest without a resolver daemon.
    let _ = fs::remove_file(root.join("etc/resolv.conf"));
    write(root, "etc/resolv.conf", RESOLV_CONF)?;
    write(root, "etc/fstab", FSTAB)?;
    // The whole system is the user's to change: pip may install beside the packages.
    for dir in list(&root.join("usr/lib")) {
        let marker = dir.join("EXTERNALLY-MANAGED");
        if marker.is_file() {
            fs::remove_file(&marker).map_err(|e| BuildError::io("remove", &marker, e))?;
        }
    }
    // Each clone gets its own identity at boot or never: none comes with the image.
    let id_file = root.join("etc/machine-id");
    fs::write(&id_file, "").map_err(|e| BuildError::io("empty", &id_file, e))?;
    let link = root.join("var/lib/dbus/machine-id");
    if link.parent().is_some_and(Path::is_dir) && fs::symlink_metadata(&link).is_err() {
        symlink("/etc/machine-id", &link).map_err(|e| BuildError::io("link", &link, e))?;
    }
    Ok(())
}

/// Writes the tree as ext4 into the new file `image` of `disk_mb` MiB (sparse).
pub async fn write_ext4(
    root: &Path,
    image: &Path,
    disk_mb: u32,
    cancel: &CancellationToken,
    line: impl FnMut(&str),
) -> Result<(), BuildError> {
    let file = fs::File::create_new(image).map_err(|e| BuildError::io("make", image, e))?;
    file.set_len(u64::from(disk_mb) << 20).map_err(|e| BuildError::io("size", image, e))?;
    let mut command = Command::new("mke2fs");
    command
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-J", "size=16"])
        // Fixed: the same tree gives the same image but for times.
        .args(["-E", "root_owner=0:0,nodiscard", "-L", "nidus"])
        .arg("-d")
        .arg(root)
        .arg(image);
    run(command, "e2fsprogs", cancel, line).await
}

fn list(dir: &Path) -> Vec<std::path::PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect()
}

fn write(root: &Path, name: &str, text: &str) -> Result<(), BuildError> {
    let path = root.join(name);
    fs::write(&path, text).map_err(|e| BuildError::io("write", &path, e))
}

fn append(root: &Path, name: &str, text: &str) -> Result<(), BuildError> {
    let path = root.join(name);
    fs::File::options()
        .append(true)
        .open(&path)
        .and_then(|mut f| f.write_all(text.as_bytes()))
        .map_err(|e| BuildError::io("append to", &path, e))
}

fn mode(path: &Path, mode: u32) -> Result<(), BuildError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|e| BuildError::io("set the mode of", path, e))
}
