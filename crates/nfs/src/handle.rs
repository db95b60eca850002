//! File handles: the kernel's own, with a MAC so that a guest cannot make one up.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use ring::hmac;
use subtle::ConstantTimeEq;
use uuid::Uuid;

use crate::status::{Result, Status};

/// Bytes of a handle (`NFS3_FHSIZE`).
pub(crate) const MAX_HANDLE: usize = 64;
const VERSION: u8 = 1;
/// The version, and the kernel's type of handle.
const FRONT: usize = 5;
const MAC: usize = 16;
const MAX_KERNEL_HANDLE: usize = MAX_HANDLE - FRONT - MAC;

/// Signs handles. Handles of one key are none of another's.
#[derive(Clone)]
pub struct HandleKey(hmac::Key);

impl std::fmt::Debug for HandleKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HandleKey")
    }
}

impl HandleKey {
    /// For a node, from 32 random bytes that it keeps: handles stay good when it starts anew.
    pub fn new(bytes: &[u8; 32]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, bytes))
    }

    /// The key of one volume.
    pub fn of_volume(&self, id: Uuid) -> Self {
        let derived = hmac::sign(&self.0, id.as_bytes());
        Self(hmac::Key::new(hmac::HMAC_SHA256, derived.as_ref()))
    }

    fn mac(&self, bytes: &[u8]) -> [u8; MAC] {
        let tag = hmac::sign(&self.0, bytes);
        let mut mac = [0; MAC];
        mac.copy_from_slice(&tag.as_ref()[..MAC]);
        mac
    }

    /// A number by which a guest tells this volume from others.
    pub(crate) fn file_system(&self) -> u64 {
        let mac = self.mac(b"file system");
        u64::from_be_bytes([mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], mac[6], mac[7]])
    }
}

/// `struct file_handle` (linux/fcntl.h) with room for what fits into one of NFS's.
#[repr(C)]
struct KernelHandle {
    bytes: u32,
    kind: i32,
    handle: [u8; MAX_KERNEL_HANDLE],
}

/// Names the file that `fd` stands for.
pub(crate) fn encode(key: &HandleKey, fd: impl AsFd) -> Result<Vec<u8>> {
    let mut h = KernelHandle { bytes: MAX_KERNEL_HANDLE as u32, kind: 0, handle: [0; MAX_KERNEL_HANDLE] };
    let mut mount = 0i32;
    // SAFETY: the name is a C string, and the kernel writes at most as many bytes as `bytes` says there is room for.
    let r = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            &raw mut h,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    if r != 0 {
        return Err(io::Error::last_os_error().into());
    }
    let mut out = Vec::with_capacity(MAX_HANDLE);
    out.push(VERSION);
    out.extend_from_slice(&h.kind.to_be_bytes());
    out.extend_from_slice(h.handle.get(..h.bytes as usize).ok_or(Status::ServerFault)?);
    let mac = key.mac(&out);
    out.extend_from_slice(&mac);
    Ok(out)
}

/// Opens the file that a handle names (`O_PATH`), in the file system that `root` is of. Only root can.
pub(crate) fn open(key: &HandleKey, root: impl AsFd, handle: &[u8]) -> Result<OwnedFd> {
    let (front, mac) = handle.split_last_chunk::<MAC>().ok_or(Status::BadHandle)?;
    if !bool::from(key.mac(front).ct_eq(mac)) {
        // Another volume's, or made up.
        return Err(Status::Stale);
    }
    let (version, rest) = front.split_first().ok_or(Status::BadHandle)?;
    let (kind, bytes) = rest.split_first_chunk::<4>().ok_or(Status::BadHandle)?;
    if *version != VERSION || bytes.len() > MAX_KERNEL_HANDLE {
        return Err(Status::BadHandle);
    }
    let mut h = KernelHandle {
        bytes: bytes.len() as u32,
        kind: i32::from_be_bytes(*kind),
        handle: [0; MAX_KERNEL_HANDLE],
    };
    h.handle[..bytes.len()].copy_from_slice(bytes);
    let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: the kernel reads the handle, whose length it says itself.
    let fd =
        unsafe { libc::syscall(libc::SYS_open_by_handle_at, root.as_fd().as_raw_fd(), &raw const h, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: the kernel has just opened it for us alone; descriptors are small numbers.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_handle_leads_to_its_file_and_a_changed_one_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "x").unwrap();
        let (root, file) = (File::open(dir.path()).unwrap(), File::open(&path).unwrap());
        let node = HandleKey::new(&[7; 32]);
        let (key, other) = (node.of_volume(Uuid::from_u128(1)), node.of_volume(Uuid::from_u128(2)));
        let handle = encode(&key, &file).unwrap();
        assert!(handle.len() <= MAX_HANDLE);
        let found = open(&key, &root, &handle).unwrap();
        assert_eq!(rustix::fs::fstat(&found).unwrap().st_ino, rustix::fs::fstat(&file).unwrap().st_ino);
        assert_eq!(open(&other, &root, &handle).unwrap_err(), Status::Stale);
        for at in 0..handle.len() {
            let mut changed = handle.clone();
            changed[at] ^= 1;
            assert_eq!(open(&key, &root, &changed).unwrap_err(), Status::Stale, "byte {at}");
        }
        for n in 0..handle.len() {
            assert!(open(&key, &root, &handle[..n]).is_err());
        }
        drop(file);
        std::fs::remove_file(&path).unwrap();
        drop(found);
        assert_eq!(open(&key, &root, &handle).unwrap_err(), Status::Stale);
    }
}
