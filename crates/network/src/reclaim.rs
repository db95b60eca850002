//! What an earlier daemon left when it was killed.

use std::path::Path;

use crate::namespace::{self, NETNS_DIR};
use crate::slot::NetworkConfig;
use crate::{NetworkError, firewall, link};

/// Removes namespaces and pairs of this daemon's index range and its table on the host. Returns
/// how many slots there were. Safe to repeat; call it under the daemon's lock.
pub fn reclaim(config: &NetworkConfig) -> Result<usize, NetworkError> {
    let ours = |name: &str, prefix: &str| {
        let index = name.strip_prefix(prefix).and_then(|n| n.parse::<u32>().ok());
        index.is_some_and(|i| config.indices().contains(&i))
    };
    let mut count = 0;
    for entry in std::fs::read_dir(NETNS_DIR).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.to_str().is_some_and(|n| ours(n, &config.namespace_prefix)) {
            namespace::remove(&Path::new(NETNS_DIR).join(&name));
            count += 1;
        }
    }
    // A pair goes with its namespace, but the kernel takes its time; a new one wants the name now.
    for name in link::names(&config.veth_prefix)? {
        if ours(&name, &config.veth_prefix) {
            link::remove_veth(&name)?;
        }
    }
    firewall::remove_table(&config.table)?;
    Ok(count)
}
