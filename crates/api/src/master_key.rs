//! The installation's own key: it seals secrets at rest, and signs the tokens of volumes.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hmac;

/// 32 random bytes in a file that its owner alone can read. Without it, what was sealed stays so.
#[derive(Clone)]
pub struct MasterKey(Arc<Keys>);

struct Keys {
    seal: LessSafeKey,
    sign: hmac::Key,
}

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MasterKey")
    }
}

/// Why the key cannot be had or used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file.
    #[error("Cannot {action} the installation's key {path}: {source}")]
    File {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// No random bytes.
    #[error("no random bytes: {0}")]
    Random(String),
    /// Sealed with another key, or changed since.
    #[error("it was sealed with another key than the installation's, or has changed since")]
    Broken,
}

const LEN: usize = 32;

impl MasterKey {
    /// Reads the file, or makes it.
    ///
    /// # Errors
    /// When it cannot be read or written, or is not one of ours.
    pub fn open(path: &Path) -> Result<Self, KeyError> {
        let failed = |action| move |source| KeyError::File { action, path: path.to_owned(), source };
        match std::fs::read(path) {
            Ok(bytes) => {
                let wrong = || io::Error::new(io::ErrorKind::InvalidData, format!("it has not {LEN} bytes"));
                let bytes: [u8; LEN] = bytes.try_into().map_err(|_| failed("read")(wrong()))?;
                Self::new(&bytes)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let mut bytes = [0u8; LEN];
                getrandom::fill(&mut bytes).map_err(|e| KeyError::Random(e.to_string()))?;
                // Whole or not at all, and never over one that another process has just made.
                let draft = path.with_extension(format!("{}.tmp", uuid::Uuid::new_v4().simple()));
                let write = || {
                    let mut file =
                        std::fs::File::options().write(true).create_new(true).mode(0o600).open(&draft)?;
                    file.write_all(&bytes)?;
                    file.sync_all()?;
                    match std::fs::hard_link(&draft, path) {
                        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                        done => done,
                    }
                };
                let written = write();
                let _ = std::fs::remove_file(&draft);
                written.map_err(failed("write"))?;
                Self::open(path)
            }
            Err(e) => Err(failed("read")(e)),
        }
    }

    fn new(bytes: &[u8; LEN]) -> Result<Self, KeyError> {
        let root = hmac::Key::new(hmac::HMAC_SHA256, bytes);
        // A key of its own for each use.
        let seal = hmac::sign(&root, b"nidus seal 1");
        let seal = UnboundKey::new(&CHACHA20_POLY1305, seal.as_ref()).map_err(|_| KeyError::Broken)?;
        let sign = hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&root, b"nidus sign 1").as_ref());
        Ok(Self(Arc::new(Keys { seal: LessSafeKey::new(seal), sign })))
    }

    /// Seals `value` for `owner`: a nonce, the text, a tag.
    pub(crate) fn seal(&self, owner: &str, value: &[u8]) -> Result<Vec<u8>, KeyError> {
        let mut nonce = [0u8; NONCE_LEN];
        getrandom::fill(&mut nonce).map_err(|e| KeyError::Random(e.to_string()))?;
        let mut text = value.to_vec();
        let key = &self.0.seal;
        key.seal_in_place_append_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(owner.as_bytes()),
            &mut text,
        )
        .map_err(|_| KeyError::Broken)?;
        Ok([nonce.as_slice(), &text].concat())
    }

    /// What [`Self::seal`] has sealed for this owner.
    pub(crate) fn open_sealed(&self, owner: &str, sealed: &[u8]) -> Result<Vec<u8>, KeyError> {
        let (nonce, text) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(KeyError::Broken)?;
        let mut text = text.to_vec();
        let key = &self.0.seal;
        let open =
            key.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(owner.as_bytes()), &mut text);
        Ok(open.map_err(|_| KeyError::Broken)?.to_vec())
    }

    /// The token that goes with this text.
    pub(crate) fn token(&self, of: &str) -> String {
        let tag = hmac::sign(&self.0.sign, of.as_bytes());
        tag.as_ref().iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Whether a token goes with this text, in constant time.
    pub(crate) fn is_token(&self, of: &str, token: &str) -> bool {
        use subtle::ConstantTimeEq;
        self.token(of).as_bytes().ct_eq(token.as_bytes()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_for_its_owner_and_with_its_key_only() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let key = MasterKey::open(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let sealed = key.seal("team", b"value").unwrap();
        assert!(!sealed.windows(5).any(|w| w == b"value"));
        assert_ne!(sealed, key.seal("team", b"value").unwrap());
        let again = MasterKey::open(&path).unwrap();
        assert_eq!(again.open_sealed("team", &sealed).unwrap(), b"value");
        assert!(matches!(key.open_sealed("other", &sealed), Err(KeyError::Broken)));
        for at in [0, NONCE_LEN, sealed.len() - 1] {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(matches!(key.open_sealed("team", &changed), Err(KeyError::Broken)));
        }
        assert!(key.open_sealed("team", &sealed[..5]).is_err());
        let other = MasterKey::open(&dir.path().join("other")).unwrap();
        assert!(other.open_sealed("team", &sealed).is_err());
        assert!(key.is_token("v1", &key.token("v1")) && !key.is_token("v2", &key.token("v1")));
        assert!(!key.is_token("v1", &other.token("v1")) && !key.is_token("v1", ""));
    }

    #[test]
    fn a_file_that_is_not_a_key_is_said_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, b"short").unwrap();
        assert!(MasterKey::open(&path).unwrap_err().to_string().contains("has not 32 bytes"));
    }
}
