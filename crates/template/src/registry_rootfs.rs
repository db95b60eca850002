//! The root file system of an image from a registry.
//!
//! All changes are made in the tree in memory, where a link of the image leads nowhere but into the image.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nidus_oci::{Device, FetchedImage, Image, Limits, Meta, Node, OciError};
use nidus_storage::{Artifact, StagedBuild};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::build::{Level, Log, blocking};
use crate::command::run;
use crate::rootfs::{self, ENVD_PATH};
use crate::{BuildError, BuildRequest, Builder};

/// The guest's unprivileged user, and the id that it has if the image does not use it.
const USER: &str = rootfs::USER.0;
const USER_ID: u32 = rootfs::USER.1;
/// Largest account file that is read.
const MAX_ACCOUNTS: u64 = 1 << 20;
/// Device nodes of an image that are made; more is no system.
const MAX_DEVICES: usize = 4096;

impl Builder {
    pub(crate) async fn make_registry_rootfs(
        &self,
        work: &Path,
        request: &BuildRequest,
        image: &Image,
        staged: &StagedBuild,
        log: &Log,
        cancel: &CancellationToken,
    ) -> Result<(), BuildError> {
        log.info(format!("pulling {} ({} MiB)", image.reference, image.fetch_bytes().div_ceil(1 << 20)));
        let dir = work.join("image");
        let limits = Limits::for_disk(request.disk_mb);
        let mut fetched = image.fetch(&dir, limits, cancel, |line| log.info(line)).await?;
        let (root, envd, stop) = (work.join("rootfs"), self.config.envd.clone(), cancel.clone());
        let (tree, disk) = (root.clone(), request.disk_mb);
        let written = blocking(move || {
            customise(&mut fetched, &envd)?;
            let written = fetched.write(&tree, &stop)?;
            std::fs::remove_dir_all(&dir).map_err(|e| BuildError::io("remove", &dir, e))?;
            Ok(written)
        })
        .await?;
        if written.lost_xattrs > 0 {
            log.at(Level::Warn, format!("{} extended attributes were lost", written.lost_xattrs));
        }
        // The journal, tables and what files lose in blocks.
        if written.bytes + (64 << 20) > u64::from(disk) << 20 {
            return Err(BuildError::BadRequest(format!(
                "the image has {} MiB of files, which do not fit on a disk of {disk} MiB",
                written.bytes >> 20
            )));
        }
        log.info(format!("writing an ext4 image of {disk} MiB: {} files", written.entries));
        let tool = |l: &str| log.at(Level::Debug, l);
        let to = staged.path(Artifact::Rootfs);
        rootfs::write_ext4(&root, &to, disk, cancel, tool).await?;
        make_devices(&to, &written.devices, work, log, cancel).await?;
        blocking(move || std::fs::remove_dir_all(&root).map_err(|e| BuildError::io("remove", &root, e))).await
    }
}

/// Adds envd, the user and the settings that a sandbox expects.
fn customise(image: &mut FetchedImage, envd: &Path) -> Result<(), BuildError> {
    for (dir, mode) in [
        ("dev", 0o755),
        ("proc", 0o555),
        ("sys", 0o555),
        ("run", 0o755),
        ("tmp", 0o1777),
        ("etc", 0o755),
        ("home", 0o755),
    ] {
        let dir = Path::new(dir);
        match image.tree.resolve(dir).ok().and_then(|d| image.tree.get(&d).map(|(n, _)| n.clone())) {
            Some(Node::Directory) => {}
            _ => image.put(dir, Node::Directory, Meta::root(mode))?,
        }
    }
    image.put_file(Path::new(ENVD_PATH), envd, Meta::root(0o755))?;
    let user = add_user(image)?;
    let sudoers = rootfs::sudoers();
    image.put_bytes(Path::new("etc/sudoers.d/nidus"), sudoers.as_bytes(), Meta::root(0o440))?;
    let owner = Meta { uid: user, gid: user, ..Meta::root(0o755) };
    let home = Path::new("home").join(USER);
    image.put(&home, Node::Directory, owner)?;
    for file in rootfs::SKELETON {
        if image.tree.get(&home.join(file)).is_none()
            && let Some(text) = image.read(&Path::new("etc/skel").join(file), MAX_ACCOUNTS)?
        {
            let meta = Meta { uid: user, gid: user, ..Meta::root(0o644) };
            image.put_bytes(&home.join(file), &text, meta)?;
        }
    }
    let hosts = rootfs::hosts();
    for (path, text) in [
        ("etc/hostname", "nidus\n"),
        ("etc/hosts", hosts.as_str()),
        ("etc/resolv.conf", rootfs::RESOLV_CONF),
        ("etc/fstab", rootfs::FSTAB),
        // Each clone gets its own identity at boot or never: none comes with the image.
        ("etc/machine-id", ""),
    ] {
        image.put_bytes(Path::new(path), text.as_bytes(), Meta::root(0o644))?;
    }
    // The whole system is the user's to change: pip may install beside the packages.
    for name in image.tree.list(Path::new("usr/lib")) {
        if name.to_string_lossy().starts_with("python3") {
            image.tree.remove(&Path::new("usr/lib").join(name).join("EXTERNALLY-MANAGED"));
        }
    }
    Ok(())
}

/// The user's id: one of that name may be there already.
fn add_user(image: &mut FetchedImage) -> Result<u32, BuildError> {
    let mut files = BTreeMap::new();
    for path in ["etc/passwd", "etc/group", "etc/shadow"] {
        let text = image.read(Path::new(path), MAX_ACCOUNTS)?;
        let default = if path == "etc/shadow" { "root:*:19000:0:99999:7:::\n" } else { "" };
        files.insert(path, text.map_or(default.to_owned(), |t| String::from_utf8_lossy(&t).into_owned()));
    }
    let field = |line: &str, n: usize| line.split(':').nth(n).map(str::to_owned);
    let named = |text: &str, name: &str| {
        text.lines().find(|l| field(l, 0).as_deref() == Some(name)).map(str::to_owned)
    };
    if let Some(line) = named(&files["etc/passwd"], USER) {
        let id = field(&line, 2).and_then(|id| id.parse().ok());
        return id
            .ok_or_else(|| BuildError::BadRequest(format!("the image's /etc/passwd: '{line}' has no id")));
    }
    let used = |id: u32| {
        [&files["etc/passwd"], &files["etc/group"]]
            .iter()
            .any(|text| text.lines().any(|l| field(l, 2) == Some(id.to_string())))
    };
    let id = (USER_ID..60_000).find(|id| !used(*id)).unwrap_or(USER_ID);
    if named(&files["etc/passwd"], "root").is_none() {
        files.entry("etc/passwd").and_modify(|t| t.insert_str(0, "root:x:0:0:root:/root:/bin/bash\n"));
        files.entry("etc/group").and_modify(|t| t.insert_str(0, "root:x:0:\n"));
    }
    for (path, line) in rootfs::accounts(id) {
        let mut text = files.remove(path).unwrap_or_default();
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str(&line);
        let mode = if path == "etc/shadow" { 0o640 } else { 0o644 };
        let old = image.tree.resolve(Path::new(path)).ok();
        let meta = old.and_then(|p| image.tree.get(&p).map(|(_, m)| m.clone()));
        image.put_bytes(Path::new(path), text.as_bytes(), meta.unwrap_or_else(|| Meta::root(mode)))?;
    }
    Ok(id)
}

/// Device nodes are made in the image of the file system alone, by debugfs: none is ever made on this host.
async fn make_devices(
    image: &Path,
    devices: &[Device],
    work: &Path,
    log: &Log,
    cancel: &CancellationToken,
) -> Result<(), BuildError> {
    if devices.len() > MAX_DEVICES {
        let text = format!("it has {} device nodes", devices.len());
        return Err(OciError::TooLarge(text).into());
    }
    // debugfs splits its commands at blanks and knows no way to write a quote.
    let plain = |p: &Path| {
        p.to_str()
            .is_some_and(|t| t.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'\\' | b'#')))
    };
    let (good, bad): (Vec<&Device>, Vec<&Device>) = devices.iter().partition(|d| plain(&d.path));
    if let Some(d) = bad.first() {
        log.at(Level::Warn, format!("{} device nodes are left out for their names: {:?}", bad.len(), d.path));
    }
    if good.is_empty() {
        return Ok(());
    }
    let mut commands = String::new();
    for d in good {
        let (dir, name) = (d.path.parent().unwrap_or(Path::new("/")), d.path.file_name().unwrap_or_default());
        let (path, kind) = (d.path.display(), if d.block { 'b' } else { 'c' });
        let mode = d.mode & 0o7777 | if d.block { 0o60000 } else { 0o20000 };
        commands += &format!(
            "cd {}\nmknod {} {kind} {} {}\nset_inode_field {path} mode 0{mode:o}\n\
             set_inode_field {path} uid {}\nset_inode_field {path} gid {}\n",
            dir.display(),
            name.display(),
            d.major,
            d.minor,
            d.uid,
            d.gid
        );
    }
    let script: PathBuf = work.join("devices");
    std::fs::write(&script, commands).map_err(|e| BuildError::io("write", &script, e))?;
    let image = image.canonicalize().map_err(|e| BuildError::io("find", image, e))?;
    let mut command = Command::new("debugfs");
    command.args(["-w", "-f", "devices"]).arg(&image).current_dir(work);
    run(command, "e2fsprogs", cancel, |l| log.at(Level::Debug, l)).await?;
    std::fs::remove_file(&script).map_err(|e| BuildError::io("remove", &script, e))
}
