//! The tap device, by the TUN driver's ioctl (Documentation/networking/tuntap.rst).

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::NetworkError;

/// Makes the tap `name` in the calling thread's namespace. It lives as long as the file.
pub fn create(name: &str) -> Result<OwnedFd, NetworkError> {
    Ok(attach(name)?.into())
}

/// Makes the tap `name` in the calling thread's namespace, for the user `owner` to open by name. It
/// lives as long as the namespace.
pub fn create_for(name: &str, owner: u32) -> Result<(), NetworkError> {
    let file = attach(name)?;
    for (request, value, action) in
        [(TUNSETOWNER, owner, "give away the tap"), (TUNSETPERSIST, 1, "keep the tap")]
    {
        // SAFETY: both take a number by value (linux/if_tun.h).
        if unsafe { libc::ioctl(file.as_raw_fd(), request as _, libc::c_ulong::from(value)) } < 0 {
            return Err(NetworkError::last(format!("{action} {name}")));
        }
    }
    Ok(())
}

/// Removes the tap `name` that [`create_for`] made from the calling thread's namespace.
///
/// # Errors
/// When a program has it open.
pub fn remove(name: &str) -> Result<(), NetworkError> {
    let file = attach(name)?;
    // SAFETY: takes a number by value (linux/if_tun.h).
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETPERSIST as _, 0 as libc::c_ulong) } < 0 {
        return Err(NetworkError::last(format!("give up the tap {name}")));
    }
    Ok(())
}

/// linux/if_tun.h: _IOW('T', 203 and 204, int).
const TUNSETPERSIST: u32 = 0x4004_54cb;
const TUNSETOWNER: u32 = 0x4004_54cc;

fn attach(name: &str) -> Result<File, NetworkError> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|e| NetworkError::io("open /dev/net/tun (is the tun module there? modprobe tun)", e))?;
    // SAFETY: an all-zero ifreq is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) } < 0 {
        return Err(NetworkError::last(format!("make the tap {name}")));
    }
    Ok(file)
}
