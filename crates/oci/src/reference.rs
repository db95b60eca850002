//! Names of images: `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`.

use std::fmt;
use std::str::FromStr;

use crate::{Digest, OciError};

/// Where names without a host are looked for, and how that registry is called in them.
const DOCKER: &str = "docker.io";
/// Longest name, tag excluded, and longest tag (distribution specification).
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// The name of an image in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Host, with its port if it has one: `docker.io` when none was named.
    pub host: String,
    /// Repository: `library/python`.
    pub repository: String,
    /// Tag; `latest` when neither tag nor digest was named.
    pub tag: Option<String>,
    /// Digest of manifest or index.
    pub digest: Option<Digest>,
}

impl Reference {
    /// What to ask the registry for: the digest if there is one.
    pub(crate) fn version(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = OciError;

    fn from_str(text: &str) -> Result<Self, OciError> {
        let bad = |reason| {
            let name = text.chars().filter(|c| !c.is_control()).take(200).collect();
            OciError::BadReference { name, reason }
        };
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => (rest, Some(digest.parse().map_err(bad)?)),
        };
        // A colon after the last slash is a tag's, one before it a port's.
        let after_slash = rest.rfind('/').map_or(0, |at| at + 1);
        let (name, tag) = match rest[after_slash..].find(':') {
            None => (rest, None),
            Some(at) => (&rest[..after_slash + at], Some(&rest[after_slash + at + 1..])),
        };
        let (host, path) = match name.split_once('/') {
            Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => (first, path),
            _ => (DOCKER, name),
        };
        let host = if host == "index.docker.io" { DOCKER } else { host };
        let plain_host = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':' | b'[' | b']');
        if !host.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[') || !host.bytes().all(plain_host)
        {
            return Err(bad("the registry's name is none"));
        }
        if name.len() > MAX_NAME || path.is_empty() || !path.split('/').all(is_component) {
            return Err(bad("a repository has lower-case letters and digits, with one of . _ - between"));
        }
        if tag.is_some_and(|t| !is_tag(t)) {
            return Err(bad("a tag has letters, digits, and . _ - but for its beginning"));
        }
        let repository =
            if host == DOCKER && !path.contains('/') { format!("library/{path}") } else { path.to_owned() };
        let tag = match (tag, digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, None) => Some("latest".to_owned()),
            (None, Some(_)) => None,
        };
        Ok(Self { host: host.to_owned(), repository, tag, digest })
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    plain(*first)
        && plain(*last)
        && bytes.iter().all(|b| plain(*b) || matches!(b, b'.' | b'_' | b'-'))
        && !text.contains("..")
}

fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let mut bytes = text.bytes();
    text.len() <= MAX_TAG
        && bytes.next().is_some_and(word)
        && bytes.all(|b| word(b) || matches!(b, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_names() {
        let of = |text: &str| text.parse::<Reference>().unwrap().to_string();
        assert_eq!(of("python"), "docker.io/library/python:latest");
        assert_eq!(of("python:3.12-slim"), "docker.io/library/python:3.12-slim");
        assert_eq!(of("oven/bun:1"), "docker.io/oven/bun:1");
        assert_eq!(of("index.docker.io/a/b"), "docker.io/a/b:latest");
        assert_eq!(of("localhost:5000/a/b/c"), "localhost:5000/a/b/c:latest");
        assert_eq!(of("127.0.0.1:5000/x:t"), "127.0.0.1:5000/x:t");
        assert_eq!(
            of("1234.dkr.ecr.eu-west-1.amazonaws.com/a:1"),
            "1234.dkr.ecr.eu-west-1.amazonaws.com/a:1"
        );
        let digest = Digest::of(b"x");
        assert_eq!(of(&format!("ghcr.io/a/b@{digest}")), format!("ghcr.io/a/b@{digest}"));
        assert_eq!(of(&format!("a:1@{digest}")), format!("docker.io/library/a:1@{digest}"));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for bad in [
            "",
            "UPPER",
            "a b",
            "../x",
            "a/../b",
            "a//b",
            "host.io/",
            "x:",
            "x:-t",
            "x@sha256:12",
            "ho$t.io/x",
            "http://host.io/x",
            &"a".repeat(300),
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }
}
