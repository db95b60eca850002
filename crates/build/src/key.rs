//! Keys of layers: a digest over all that a layer was made of.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;
use sha2::{Digest, Sha256};

/// Another number here makes all layers anew.
const VERSION: u32 = 1;

/// Key of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerKey([u8; 32]);

impl LayerKey {
    /// Of these parts: equal parts of equal kinds give equal keys.
    pub(crate) fn of(kind: &str, parts: &impl Serialize) -> Self {
        // Strings, numbers and lists of them: nothing that JSON could not have.
        let text = serde_json::to_vec(&(VERSION, kind, parts)).unwrap_or_default();
        Self(Sha256::digest(text).into())
    }
}

impl fmt::Display for LayerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl FromStr for LayerKey {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text.len() != 64 || !text.is_ascii() {
            return Err(());
        }
        let mut key = [0; 32];
        for (n, byte) in key.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * n..2 * n + 2], 16).map_err(drop)?;
        }
        Ok(Self(key))
    }
}

impl Serialize for LayerKey {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}
