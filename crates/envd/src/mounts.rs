//! Network volumes: what `POST /init` says is to be mounted is, and what else it said before is not.

use std::fs::{self, DirBuilder};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path};

use nidus_envd_protocol::VolumeMount;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use parking_lot::Mutex;

const MOUNTS: &str = "/proc/self/mounts";
const FILE_SYSTEM: &str = "nfs";
/// Where NFS is, and the protocol by which it is mounted: no port mapper is asked.
const PORT: u16 = 2049;

/// Why a volume is not mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("the volume's target '{0}' is not an IP address, a colon and a path")]
    Target(String),
    #[error(
        "a volume cannot be mounted at '{0}': that is not an absolute path without '..', or it is the root"
    )]
    Path(String),
    #[error("cannot make the directory {path} for a volume: {source}")]
    Directory { path: String, source: io::Error },
    #[error(
        "cannot mount a volume at {0}: this guest's kernel has no NFS. Templates that were built before volumes could be \
         mounted have such a one; build it again"
    )]
    NoNfs(String),
    #[error("cannot mount a volume at {path}: {source}")]
    Mount { path: String, source: nix::Error },
    #[error("cannot unmount the volume at {path}: {source}")]
    Unmount { path: String, source: nix::Error },
}

impl MountError {
    /// Whether the request is wrong, and not the machine.
    pub fn is_bad_request(&self) -> bool {
        matches!(self, Self::Target(_) | Self::Path(_))
    }
}

/// What this daemon has mounted. It is in memory as the mounts are, and goes with them through a snapshot.
#[derive(Debug, Default)]
pub struct Mounts(Mutex<Vec<VolumeMount>>);

fn check(m: &VolumeMount) -> Result<IpAddr, MountError> {
    let path = Path::new(&m.path);
    let plain = path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !plain || path.parent().is_none() || m.path.contains('\0') {
        return Err(MountError::Path(m.path.clone()));
    }
    let wrong = || MountError::Target(m.nfs_target.clone());
    let (host, export) = m.nfs_target.split_once(":/").ok_or_else(wrong)?;
    // A comma would begin another option.
    if export.contains([',', '\0', ' ']) {
        return Err(wrong());
    }
    host.parse().map_err(|_| wrong())
}

/// Of nfs(5). The volumes of a sandbox may be another's too, and are changed from outside: what is known of a file is
/// asked for again after a second, and that a name is not there always. Locks are the guest's own. Without an
/// answer its programs wait: a volume is on the node that runs them.
fn options(host: IpAddr) -> String {
    format!(
        "vers=3,proto=tcp,addr={host},port={PORT},mountvers=3,mountproto=tcp,mountaddr={host},mountport={PORT},\
         nolock,noacl,hard,actimeo=1,lookupcache=positive"
    )
}

/// Sources and places of all that is mounted over NFS.
fn mounted(table: &str) -> Vec<(&str, String)> {
    let fields = table.lines().map(|l| l.split(' ').collect::<Vec<_>>());
    let nfs = fields.filter(|f| f.get(2).is_some_and(|kind| kind.starts_with(FILE_SYSTEM)));
    nfs.filter_map(|f| Some((*f.first()?, unescaped(f.get(1)?)))).collect()
}

/// Blanks and backslashes are octal numbers there (getmntent(3)).
fn unescaped(text: &str) -> String {
    let mut out = text.to_owned();
    for (octal, plain) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        out = out.replace(octal, plain);
    }
    out
}

impl Mounts {
    /// Mounts what is wanted, and ends what else was. Blocks for as long as the host takes to answer.
    ///
    /// # Errors
    /// When one cannot be mounted; those before it are.
    pub fn set(&self, wanted: &[VolumeMount]) -> Result<(), MountError> {
        let hosts = wanted.iter().map(check).collect::<Result<Vec<_>, _>>()?;
        let mut ours = self.0.lock();
        let table = fs::read_to_string(MOUNTS).unwrap_or_default();
        let now = mounted(&table);
        let is_there = |m: &VolumeMount| now.iter().any(|(s, p)| *s == m.nfs_target && *p == m.path);
        for old in ours.iter().rev() {
            let stays = wanted.iter().any(|w| w.nfs_target == old.nfs_target && w.path == old.path);
            if !stays && is_there(old) {
                // Who still has a file of it open keeps that. The host may not have it any more: nothing is waited for.
                umount2(old.path.as_str(), MntFlags::MNT_DETACH)
                    .map_err(|source| MountError::Unmount { path: old.path.clone(), source })?;
            }
        }
        ours.retain(|m| wanted.iter().any(|w| w.nfs_target == m.nfs_target && w.path == m.path));
        for (m, host) in wanted.iter().zip(hosts) {
            if !is_there(m) {
                mount_one(m, host)?;
            }
            if !ours.iter().any(|o| o.nfs_target == m.nfs_target && o.path == m.path) {
                ours.push(m.clone());
            }
        }
        Ok(())
    }
}

fn mount_one(m: &VolumeMount, host: IpAddr) -> Result<(), MountError> {
    let path = m.path.as_str();
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(|source| MountError::Directory { path: path.to_owned(), source })?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let options = options(host);
    match mount(Some(m.nfs_target.as_str()), path, Some(FILE_SYSTEM), flags, Some(options.as_str())) {
        Err(nix::Error::ENODEV) => Err(MountError::NoNfs(path.to_owned())),
        done => done.map_err(|source| MountError::Mount { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(target: &str, path: &str) -> VolumeMount {
        VolumeMount { nfs_target: target.to_owned(), path: path.to_owned() }
    }

    #[test]
    fn what_is_to_be_mounted_is_checked() {
        assert!(check(&wanted("192.0.2.1:/a-b", "/mnt/x y")).is_ok());
        for bad in ["", "/", "x", "/a/../b", "../x", "/a\0b"] {
            assert!(matches!(check(&wanted("192.0.2.1:/a", bad)), Err(MountError::Path(_))), "{bad}");
        }
        for bad in ["", "host:/a", "192.0.2.1", "192.0.2.1:a", "192.0.2.1:/a,vers=4", ":/a"] {
            assert!(matches!(check(&wanted(bad, "/mnt")), Err(MountError::Target(_))), "{bad}");
        }
    }

    #[test]
    fn the_table_of_mounts_is_read() {
        let table = "/dev/vda / ext4 rw 0 0\n192.0.2.1:/a /mnt/x\\040y nfs rw,vers=3 0 0\n";
        assert_eq!(mounted(table), [("192.0.2.1:/a", "/mnt/x y".to_owned())]);
    }
}
