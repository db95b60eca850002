//! Who serves a device: the identifier that the kernel keeps with it names the installation and the
//! process, so that a later process of the same installation knows what a dead one left.

use std::fs;

/// A process of an installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Owner {
    /// Chosen by the caller, the same in every process of the installation.
    instance: String,
    pid: u32,
    /// When the process started, in clock ticks since boot: a number used again is another process.
    start: u64,
}

impl Owner {
    /// This process.
    pub(super) fn this(instance: &str) -> Self {
        let pid = std::process::id();
        Self { instance: instance.to_owned(), pid, start: start_time(pid).unwrap_or(0) }
    }

    /// As the kernel keeps it.
    pub(super) fn identifier(&self) -> String {
        format!("nidus/{}/{}/{}", self.instance, self.pid, self.start)
    }

    /// Reads an identifier; `None` if it is not one of ours.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("nidus/")?;
        let (rest, start) = rest.rsplit_once('/')?;
        let (instance, pid) = rest.rsplit_once('/')?;
        Some(Self { instance: instance.to_owned(), pid: pid.parse().ok()?, start: start.parse().ok()? })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn is_of(&self, instance: &str) -> bool {
        self.instance == instance
    }

    /// Whether the process is still there.
    pub(super) fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.start)
    }
}

/// Field 22 of /proc/PID/stat (proc(5)). A process that has ended but was not waited for yet is gone:
/// its sockets are closed.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may contain anything.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_known_by_its_identifier() {
        let own = Owner::this("a/b");
        assert!(own.start > 0 && own.is_alive() && own.is_of("a/b"));
        assert_eq!(Owner::parse(&own.identifier()), Some(own.clone()));
        assert!(!Owner { start: own.start + 1, ..own }.is_alive());
        for other in ["", "nbd-client", "nidus/x", "nidus/x/y/1", "other/x/1/2"] {
            assert_eq!(Owner::parse(other), None, "{other}");
        }
    }
}
