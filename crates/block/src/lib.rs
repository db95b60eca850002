//! Block devices of sandboxes: header (build map), copy-on-write overlay, NBD server
