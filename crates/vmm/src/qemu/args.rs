//! QEMU's command line. Every flag that makes a device or changes the machine decides whether
//! a snapshot can be loaded: boot and resume share them all.

use std::ffi::OsString;
use std::os::fd::RawFd;

use crate::Boot;

/// Accelerator in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// Software emulation; works everywhere.
    Tcg,
    /// Hardware or paravirtual KVM that was seen to boot the guest's kernel.
    Kvm,
}

impl Accel {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcg => "tcg",
            Self::Kvm => "kvm",
        }
    }
}

/// Numbers of the inherited files.
#[derive(Debug, Clone, Copy)]
pub struct Fds {
    /// memfile
    pub memory: RawFd,
    /// NBD socket
    pub disk: RawFd,
    /// tap
    pub tap: RawFd,
    /// monitor socket
    pub qmp: RawFd,
    /// serial socket, when the console is kept
    pub serial: Option<RawFd>,
    /// /dev/kvm, if that is the accelerator
    pub kvm: Option<RawFd>,
}

/// What differs between VMs.
#[derive(Debug)]
pub struct Machine<'a> {
    /// Shown in process lists.
    pub name: &'a str,
    /// Virtual processors.
    pub vcpus: u32,
    /// MiB.
    pub memory_mb: u32,
    /// The memfile is mapped shared (cold boot) instead of private and read-only.
    pub shared: bool,
    /// Guest MAC address.
    pub mac: &'a str,
    /// Cold boot; else the process waits for a state (`-incoming defer`).
    pub boot: Option<&'a Boot>,
}

/// The arguments after the program's name.
pub fn arguments(m: &Machine<'_>, fds: Fds) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::with_capacity(48);
    let mut add = |flag: &str, value: String| {
        args.push(flag.into());
        if !value.is_empty() {
            args.push(value.into());
        }
    };
    add("-name", format!("guest=nidus-{}", m.name));
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        add(flag, String::new());
    }
    add("-display", "none".into());
    add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
    add(
        "-machine",
        "microvm,acpi=on,rtc=on,isa-serial=on,memory-backend=ram,dump-guest-core=off,mem-merge=off".into(),
    );
    match fds.kvm {
        // A bounded translation cache: the default grows to a share of the host's memory.
        None => {
            add("-accel", "tcg,thread=multi,tb-size=64".into());
            add("-cpu", "max".into());
        }
        // An open file: the process's own user may have no right to the device.
        Some(fd) => {
            add("-add-fd", format!("fd={fd},set=1"));
            add("-accel", "kvm,device=/dev/fdset/1".into());
            add("-cpu", "host".into());
        }
    }
    add("-smp", m.vcpus.to_string());
    add("-m", m.memory_mb.to_string());
    let bytes = u64::from(m.memory_mb) << 20;
    let access = if m.shared { "share=on" } else { "share=off,readonly=on,rom=off" };
    add(
        "-object",
        format!(
            "memory-backend-file,id=ram,size={bytes},mem-path=/proc/self/fd/{},prealloc=off,merge=off,dump=off,{access}",
            fds.memory
        ),
    );
    add("-object", "rng-random,id=rng,filename=/dev/urandom".into());
    add(
        "-blockdev",
        format!(
            r#"{{"node-name":"disk","driver":"nbd","server":{{"type":"fd","str":"{}"}},"export":"root","discard":"unmap","detect-zeroes":"off"}}"#,
            fds.disk
        ),
    );
    // A full disk of the host is an error for the guest; by default QEMU would stop the guest for it.
    add("-device", "virtio-blk-device,drive=disk,werror=report,rerror=report".into());
    add("-netdev", format!("tap,id=net,fd={}", fds.tap));
    add("-device", format!("virtio-net-device,netdev=net,mac={}", m.mac));
    add("-device", "virtio-rng-device,rng=rng".into());
    add("-chardev", format!("socket,id=qmp,fd={}", fds.qmp));
    add("-mon", "chardev=qmp,mode=control".into());
    match fds.serial {
        Some(fd) => add("-chardev", format!("socket,id=serial,fd={fd}")),
        // A hostile guest may write without end; what nobody reads goes nowhere.
        None => add("-chardev", "null,id=serial".into()),
    }
    add("-serial", "chardev:serial".into());
    match m.boot {
        Some(boot) => {
            add("-kernel", boot.kernel.display().to_string());
            add("-initrd", boot.initrd.display().to_string());
            add("-append", boot.cmdline.clone());
        }
        None => add("-incoming", "defer".into()),
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(shared: bool) -> String {
        let m = Machine { name: "x", vcpus: 1, memory_mb: 256, shared, mac: "02:FC:00:00:00:05", boot: None };
        let fds = Fds { memory: 3, disk: 4, tap: 5, qmp: 6, serial: None, kvm: None };
        let args = arguments(&m, fds);
        args.iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_resumed_vm_cannot_write_its_templates_memory() {
        assert!(text(false).contains("share=off,readonly=on,rom=off"));
        assert!(text(true).contains("share=on"));
        assert!(text(false).ends_with("-incoming defer"));
    }

    #[test]
    fn seccomp_is_on_and_the_only_network_is_the_tap() {
        let t = text(false);
        assert!(t.contains("-sandbox on,") && t.contains("spawn=deny"));
        assert_eq!(t.matches("-netdev").count(), 1);
        assert!(t.contains("tap,id=net,fd=5"));
    }
}
