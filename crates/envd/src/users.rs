//! Users and groups out of /etc/passwd and /etc/group. The binary is static, so the C library's
//! look-ups (which load modules at run time) are not to be had.

use std::collections::HashMap;
use std::fs;
use std::io;

/// One line of /etc/passwd, with the groups of /etc/group that list the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub home: String,
    pub shell: String,
    /// Supplementary groups, the primary one included.
    pub groups: Vec<u32>,
}

/// A user that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// Not in /etc/passwd.
    #[error("unknown user '{0}'")]
    Unknown(String),
    /// The file cannot be read.
    #[error("cannot read /etc/passwd: {0}")]
    Read(io::Error),
}

/// The user of this name.
pub fn by_name(name: &str) -> Result<User, UserError> {
    let passwd = fs::read_to_string("/etc/passwd").map_err(UserError::Read)?;
    // A guest without /etc/group has no supplementary groups.
    let group = fs::read_to_string("/etc/group").unwrap_or_default();
    find(&passwd, &group, name).ok_or_else(|| UserError::Unknown(name.to_owned()))
}

fn find(passwd: &str, group: &str, name: &str) -> Option<User> {
    let fields = passwd.lines().map(|l| l.split(':').collect::<Vec<_>>()).find(|f| f[0] == name)?;
    let [_, _, uid, gid, _, home, rest @ ..] = fields.as_slice() else { return None };
    let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
    let shell = rest.first().copied().filter(|s| !s.is_empty()).unwrap_or("/bin/sh");
    let mut groups = vec![gid];
    for line in group.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        let [_, _, id, members] = fields.as_slice() else { continue };
        let Ok(id) = id.parse() else { continue };
        if members.split(',').any(|m| m == name) && !groups.contains(&id) {
            groups.push(id);
        }
    }
    let home = if home.is_empty() { "/" } else { home };
    Some(User { name: name.to_owned(), uid, gid, home: home.to_owned(), shell: shell.to_owned(), groups })
}

/// Names of user and group ids, read once for many look-ups.
#[derive(Debug, Default)]
pub struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    /// Reads both files; one that cannot be read has no names.
    pub fn read() -> Self {
        let parse = |path: &str| {
            let mut names = HashMap::new();
            for line in fs::read_to_string(path).unwrap_or_default().lines() {
                let mut fields = line.split(':');
                if let (Some(name), Some(id)) = (fields.next(), fields.nth(1).and_then(|id| id.parse().ok()))
                {
                    // The first of several names of one id counts.
                    names.entry(id).or_insert_with(|| name.to_owned());
                }
            }
            names
        };
        Self { users: parse("/etc/passwd"), groups: parse("/etc/group") }
    }

    /// The user's name, or its number.
    pub fn user(&self, uid: u32) -> String {
        self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    /// The group's name, or its number.
    pub fn group(&self, gid: u32) -> String {
        self.groups.get(&gid).cloned().unwrap_or_else(|| gid.to_string())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nbad line\nuser:x:1000:1000:,,,:/home/user:\nx:x:a:1::/:";
    const GROUP: &str = "root:x:0:\nuser:x:1000:\nsudo:x:27:other,user\ndocker:x:99:user\nodd:x:5:xuser";

    #[test]
    fn finds_users_with_their_groups() {
        let user = find(PASSWD, GROUP, "user").unwrap();
        assert_eq!((user.uid, user.gid, user.home.as_str()), (1000, 1000, "/home/user"));
        assert_eq!(user.shell, "/bin/sh");
        assert_eq!(user.groups, [1000, 27, 99]);
        assert_eq!(find(PASSWD, GROUP, "root").unwrap().shell, "/bin/bash");
        assert_eq!(find(PASSWD, GROUP, "x"), None);
        assert_eq!(find(PASSWD, GROUP, "bad line"), None);
    }

    #[test]
    fn the_unknown_are_named() {
        let error = by_name("no-such-user-of-ours").unwrap_err();
        assert_eq!(error.to_string(), "unknown user 'no-such-user-of-ours'");
    }

    proptest! {
        #[test]
        fn no_file_breaks_the_parser(passwd in "[a-z0-9:,\n]{0,80}", group in "[a-z0-9:,\n]{0,80}") {
            let _ = find(&passwd, &group, "a");
        }
    }
}
