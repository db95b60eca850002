//! A trait over virtual machine monitors and the QEMU driver
