//! What of the host these tests need: a kernel, a loop device, names for things.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nidus_vmm::guest::{Kernel, MODULES};

/// A user id that no other test at this time has.
pub fn new_uid() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(64_200);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The kernel of NIDUS_KERNELS or of the daemon's usual place; else a copy of this host's own in `dir`.
///
/// # Errors
/// When there is none of these.
pub fn kernel(dir: &Path) -> Result<Kernel, String> {
    let kernels = std::env::var_os("NIDUS_KERNELS").unwrap_or_else(|| "/var/lib/nidus/kernels".into());
    if let Some(kernel) = Kernel::list(Path::new(&kernels)).pop() {
        return Ok(kernel);
    }
    let version = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    let kernel = Kernel { dir: dir.join(&version), version };
    fs::create_dir_all(kernel.dir.join("modules")).unwrap();
    let image = format!("/boot/vmlinuz-{}", kernel.version);
    fs::copy(&image, kernel.image()).map_err(|e| {
        format!("there is no guest kernel in {}, nor {image}: {e}", Path::new(&kernels).display())
    })?;
    let root = PathBuf::from("/lib/modules").join(&kernel.version);
    for file in fs::read_to_string(root.join("modules.dep")).unwrap().lines() {
        let file = file.split(':').next().unwrap();
        let name = Path::new(file).file_name().unwrap().to_str().unwrap();
        if MODULES.iter().any(|m| name == format!("{m}.ko")) {
            fs::copy(root.join(file), kernel.dir.join("modules").join(name)).unwrap();
        }
    }
    Ok(kernel)
}

/// A file as a block device.
pub struct Loop {
    device: File,
    pub path: PathBuf,
}

const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LOOP_SET_FD: libc::c_ulong = 0x4c00;
const LOOP_CLR_FD: libc::c_ulong = 0x4c01;

impl Loop {
    pub fn new(file: &File) -> io::Result<Self> {
        let control = File::options().read(true).write(true).open("/dev/loop-control")?;
        loop {
            // SAFETY: takes nothing, returns a number.
            let n = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if n < 0 {
                return Err(io::Error::last_os_error());
            }
            let path = PathBuf::from(format!("/dev/loop{n}"));
            let device = File::options().read(true).write(true).open(&path)?;
            // SAFETY: takes a descriptor's number.
            if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_FD, file.as_raw_fd()) } == 0 {
                return Ok(Self { device, path });
            }
            let e = io::Error::last_os_error();
            // Somebody else was faster.
            if e.raw_os_error() != Some(libc::EBUSY) {
                return Err(e);
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // SAFETY: takes nothing.
        unsafe { libc::ioctl(self.device.as_raw_fd(), LOOP_CLR_FD) };
    }
}
