//! Network slots: namespaces, veth, tap, nftables, and the pool that makes them ahead of need
