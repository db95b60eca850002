//! The node's own certificate authority: by it the gateway ends the TLS of hosts that a rule sets headers for.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

const CERTIFICATE_FILE: &str = "egress-ca.pem";
const KEY_FILE: &str = "egress-ca.key";
/// Names whose certificates are kept.
const MAX_LEAVES: usize = 1024;

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file of it.
    #[error("cannot {doing} {}: {source}", path.display())]
    File {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A certificate could not be made.
    #[error("cannot make the certificate for {name}: {source}")]
    Make {
        /// For whom.
        name: String,
        /// Why not.
        source: rcgen::Error,
    },
    /// TLS does not take it.
    #[error("cannot use the certificate for {name}: {source}")]
    Use {
        /// For whom.
        name: String,
        /// Why not.
        source: rustls::Error,
    },
}

/// Certificates for the hosts that rules name.
pub struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    /// One key for all leaves: they live on this node alone, as the authority's own does.
    leaf_key: KeyPair,
    provider: Arc<CryptoProvider>,
    leaves: Mutex<HashMap<String, Arc<ServerConfig>>>,
}

fn params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "Nidus egress gateway of this node");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    // Guests' clocks are set at every resume; what ends sooner would break snapshots that trust it.
    params.not_before = date_time_ymd(2024, 1, 1);
    params.not_after = date_time_ymd(2124, 1, 1);
    params
}

/// Written beside and moved into place: a file with the name is whole.
fn write(path: &Path, text: &str) -> Result<(), CaError> {
    let wrap = |source| CaError::File { doing: "write", path: path.to_owned(), source };
    let folder = path.parent().unwrap_or(Path::new("."));
    // Temporary files are made for their owner alone.
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(wrap)?;
    file.write_all(text.as_bytes()).and_then(|()| file.as_file().sync_all()).map_err(wrap)?;
    file.persist(path).map_err(|e| wrap(e.error))?;
    Ok(())
}

fn read(path: &Path) -> Result<Option<String>, CaError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CaError::File { doing: "read", path: path.to_owned(), source }),
    }
}

impl Ca {
    /// The authority whose key is in `folder`; made there when there is none.
    ///
    /// # Errors
    /// When the files cannot be used.
    pub fn open(folder: &Path, provider: Arc<CryptoProvider>) -> Result<Self, CaError> {
        let make = |source| CaError::Make { name: "the node's authority".to_owned(), source };
        let (key_path, pem_path) = (folder.join(KEY_FILE), folder.join(CERTIFICATE_FILE));
        let (key, pem) = match (read(&key_path)?, read(&pem_path)?) {
            (Some(key), Some(pem)) => (KeyPair::from_pem(&key).map_err(make)?, pem),
            _ => {
                let key = KeyPair::generate().map_err(make)?;
                let pem = params().self_signed(&key).map_err(make)?.pem();
                write(&key_path, &key.serialize_pem())?;
                write(&pem_path, &pem)?;
                (key, pem)
            }
        };
        let certificate =
            rustls::pki_types::pem::PemObject::from_pem_slice(pem.as_bytes()).map_err(|_| {
                let source =
                    std::io::Error::new(std::io::ErrorKind::InvalidData, "no PEM certificate is in it");
                CaError::File { doing: "read", path: pem_path, source }
            })?;
        let leaf_key = KeyPair::generate().map_err(make)?;
        let issuer = Issuer::new(params(), key);
        Ok(Self { pem, issuer, certificate, leaf_key, provider, leaves: Mutex::default() })
    }

    /// Its certificate, for guests to trust.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// How a host's TLS is ended.
    ///
    /// # Errors
    /// When no certificate can have the name.
    pub fn server(&self, name: &str) -> Result<Arc<ServerConfig>, CaError> {
        if let Some(made) = self.leaves.lock().get(name) {
            return Ok(made.clone());
        }
        let make = |source| CaError::Make { name: name.to_owned(), source };
        let mut leaf = CertificateParams::new(vec![name.to_owned()]).map_err(make)?;
        leaf.distinguished_name = DistinguishedName::new();
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        leaf.use_authority_key_identifier_extension = true;
        leaf.not_before = date_time_ymd(2024, 1, 1);
        leaf.not_after = date_time_ymd(2124, 1, 1);
        let certificate = leaf.signed_by(&self.leaf_key, &self.issuer).map_err(make)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.leaf_key.serialize_der()));
        let wrap = |source| CaError::Use { name: name.to_owned(), source };
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(wrap)?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone(), self.certificate.clone()], key)
            .map_err(wrap)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let config = Arc::new(config);
        let mut leaves = self.leaves.lock();
        if leaves.len() >= MAX_LEAVES {
            leaves.clear();
        }
        leaves.insert(name.to_owned(), config.clone());
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn it_is_made_once_and_its_key_is_the_nodes_alone() {
        let folder = tempfile::tempdir().unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let first = Ca::open(folder.path(), provider.clone()).unwrap().pem().to_owned();
        let again = Ca::open(folder.path(), provider).unwrap();
        assert_eq!(again.pem(), first);
        let mode = std::fs::metadata(folder.path().join(KEY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0);
        assert!(Arc::ptr_eq(&again.server("a.example").unwrap(), &again.server("a.example").unwrap()));
    }
}
