//! What a template is, and how one is built: rootfs, cold boot, snapshot
