//! Host names as clients and policies write them.

use std::fmt;

use crate::PolicyError;

/// RFC 1035, 2.3.4, without the root's dot.
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

/// A host name as it is compared: lower case, without a last dot; `None` for what is none. An IP address in
/// its usual form is none either.
pub fn host_name(text: &str) -> Option<String> {
    let text = text.strip_suffix('.').unwrap_or(text);
    let label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    if text.len() > MAX_NAME || !text.split('.').all(label) {
        return None;
    }
    // Resolvers read `1.2`, `127.1` or `0x7f.1` as addresses: what ends in a number is no name.
    let last = text.rsplit('.').next()?;
    let number = last.bytes().all(|b| b.is_ascii_digit()) || last.to_ascii_lowercase().starts_with("0x");
    (!number).then(|| text.to_ascii_lowercase())
}

/// Which names an entry of a policy means.
#[derive(Clone, PartialEq, Eq)]
pub enum Domain {
    /// Every one.
    Any,
    /// That one.
    Exact(String),
    /// All below it; with the dot in front.
    Below(String),
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Exact(name) => f.write_str(name),
            Self::Below(suffix) => write!(f, "*{suffix}"),
        }
    }
}

impl Domain {
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let wrong = || PolicyError::Domain(text.chars().take(100).collect());
        if text == "*" {
            return Ok(Self::Any);
        }
        match text.strip_prefix("*.") {
            Some(base) => Ok(Self::Below(format!(".{}", host_name(base).ok_or_else(wrong)?))),
            None => Ok(Self::Exact(host_name(text).ok_or_else(wrong)?)),
        }
    }

    /// `host` as from [`host_name`].
    pub fn matches(&self, host: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(name) => name == host,
            Self::Below(suffix) => host.len() > suffix.len() && host.ends_with(suffix.as_str()),
        }
    }

    /// The name, where it is one.
    pub fn exact(&self) -> Option<&str> {
        match self {
            Self::Exact(name) => Some(name),
            _ => None,
        }
    }

    /// Greater where it means fewer names.
    pub fn precision(&self) -> (u8, usize) {
        match self {
            Self::Any => (0, 0),
            Self::Below(suffix) => (1, suffix.len()),
            Self::Exact(name) => (2, name.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_compared_in_one_form() {
        assert_eq!(host_name("API.Example.COM.").as_deref(), Some("api.example.com"));
        assert_eq!(host_name("localhost").as_deref(), Some("localhost"));
        for wrong in [
            "",
            ".",
            "a..b",
            "1.2.3.4",
            "127.1",
            "1",
            "a.0x7f",
            "b\u{fc}cher.de",
            "a b",
            "a/b",
            "[::1]",
            "a:80",
        ] {
            assert_eq!(host_name(wrong), None, "{wrong}");
        }
        assert_eq!(host_name(&"a".repeat(64)), None);
    }

    #[test]
    fn a_wildcard_means_what_is_below() {
        let below = Domain::parse("*.Example.com").unwrap();
        assert!(below.matches("a.example.com") && below.matches("b.a.example.com"));
        assert!(
            !below.matches("example.com")
                && !below.matches("badexample.com")
                && !below.matches(".example.com")
        );
        assert!(Domain::parse("*").unwrap().matches("anything"));
        for wrong in ["*.", "a.*.com", "*a.com", "**", "", "http://x", "1.2.3.4"] {
            assert!(Domain::parse(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_written(text in ".{0,80}") {
            if let Some(name) = host_name(&text) {
                prop_assert_eq!(host_name(&name), Some(name.clone()));
            }
        }
    }
}
