//! A path within a volume.

use crate::VolumeError;

/// Bytes of a path, names in it, and bytes of a name.
const MAX_PATH: usize = 4096;
const MAX_NAMES: usize = 128;
const MAX_NAME: usize = 255;

/// A path from the volume's root, without `.`, `..` and doubled slashes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumePath(Vec<String>);

impl VolumePath {
    /// From what a client wrote; what would lead above the root leads to the root, as in a shell.
    ///
    /// # Errors
    /// When it is empty, too long, or has a NUL in it.
    pub fn parse(text: &str) -> Result<Self, VolumeError> {
        if text.is_empty() {
            return Err(VolumeError::Path("it is empty"));
        }
        if text.len() > MAX_PATH {
            return Err(VolumeError::Path("it has more than 4096 bytes"));
        }
        if text.contains('\0') {
            return Err(VolumeError::Path("it has a NUL in it"));
        }
        let mut names: Vec<String> = Vec::new();
        for name in text.split('/') {
            match name {
                "" | "." => {}
                ".." => drop(names.pop()),
                name if name.len() > MAX_NAME => {
                    return Err(VolumeError::Path("a name in it has more than 255 bytes"));
                }
                name => names.push(name.to_owned()),
            }
        }
        if names.len() > MAX_NAMES {
            return Err(VolumeError::Path("it has more than 128 names"));
        }
        Ok(Self(names))
    }

    /// From the root, with a slash in front.
    pub fn text(&self) -> String {
        format!("/{}", self.0.join("/"))
    }

    /// For the calls of the system: from the root, without a slash in front.
    pub(crate) fn relative(&self) -> String {
        if self.0.is_empty() { ".".to_owned() } else { self.0.join("/") }
    }

    /// Whether it is the root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// Its last name; that of the root is `/`.
    pub fn name(&self) -> &str {
        self.0.last().map_or("/", String::as_str)
    }

    /// Where it is in; none of the root.
    pub fn parent(&self) -> Option<Self> {
        let (_, front) = self.0.split_last()?;
        Some(Self(front.to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_are_made_plain() {
        let of = |t: &str| VolumePath::parse(t).map(|p| p.text());
        for (text, plain) in [
            ("a", "/a"),
            ("/", "/"),
            ("//a/./b/", "/a/b"),
            ("/a/../../../etc/passwd", "/etc/passwd"),
            ("..", "/"),
            ("/a/..b", "/a/..b"),
        ] {
            assert_eq!(of(text).unwrap(), plain, "{text}");
        }
        for bad in ["", "a\0b", &"x".repeat(256), &"x/".repeat(129), &"/".repeat(4097)] {
            assert!(matches!(of(bad), Err(VolumeError::Path(_))));
        }
        let p = VolumePath::parse("/a/b").unwrap();
        assert_eq!((p.name(), p.parent().unwrap().text().as_str()), ("b", "/a"));
        assert!(VolumePath::parse("/").unwrap().parent().is_none());
    }

    proptest! {
        #[test]
        fn no_path_leads_above_the_root(text in "[a./\\\\]{1,40}") {
            let p = VolumePath::parse(&text).unwrap();
            prop_assert!(!p.relative().split('/').any(|n| n == ".."));
            prop_assert!(!p.relative().starts_with('/'));
            prop_assert_eq!(VolumePath::parse(&p.text()).unwrap(), p);
        }
    }
}
