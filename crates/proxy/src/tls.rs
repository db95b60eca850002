//! The proxy's certificate, and TLS to guests.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::RwLock;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use tokio_util::sync::CancellationToken;

/// How often the files are looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the certificate {} with the key {}: {why}", chain.display(), key.display())]
pub struct CertificateError {
    chain: PathBuf,
    key: PathBuf,
    why: String,
}

/// A certificate of files that may be replaced while it is in use.
pub struct Certificate {
    chain: PathBuf,
    key: PathBuf,
    current: RwLock<(Arc<ServerConfig>, Option<SystemTime>)>,
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("chain", &self.chain)
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The later of both files' times.
fn changed(chain: &Path, key: &Path) -> Option<SystemTime> {
    let time = |path| std::fs::metadata(path).and_then(|m| m.modified()).ok();
    time(chain).max(time(key))
}

fn load(chain: &Path, key: &Path) -> Result<Arc<ServerConfig>, CertificateError> {
    let wrong = |why: String| CertificateError { chain: chain.to_owned(), key: key.to_owned(), why };
    let certificates = CertificateDer::pem_file_iter(chain).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certificates = certificates.map_err(|e| wrong(e.to_string()))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|e| wrong(e.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .and_then(|b| b.with_no_client_auth().with_single_cert(certificates, private))
        .map_err(|e| wrong(e.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

impl Certificate {
    /// Reads a PEM chain and its key.
    ///
    /// # Errors
    /// When they cannot be read, or do not belong together.
    pub fn open(chain: PathBuf, key: PathBuf) -> Result<Arc<Self>, CertificateError> {
        let time = changed(&chain, &key);
        let current = RwLock::new((load(&chain, &key)?, time));
        Ok(Arc::new(Self { chain, key, current }))
    }

    /// What new connections get.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.current.read().0.clone()
    }

    /// Reads the files again if they were changed. What cannot be used changes nothing.
    ///
    /// # Errors
    /// When the new files cannot be used; tried again when they change once more.
    pub fn refresh(&self) -> Result<bool, CertificateError> {
        let time = changed(&self.chain, &self.key);
        if self.current.read().1 == time {
            return Ok(false);
        }
        // Noted first: a pair that is wrong is told of once.
        self.current.write().1 = time;
        let config = load(&self.chain, &self.key)?;
        self.current.write().0 = config;
        Ok(true)
    }

    /// Follows the files until `stop`.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        while stop.run_until_cancelled(tokio::time::sleep(LOOK_AGAIN)).await.is_some() {
            let this = self.clone();
            match tokio::task::spawn_blocking(move || this.refresh()).await {
                Ok(Ok(true)) => tracing::info!("the proxy's certificate was replaced"),
                Ok(Ok(false)) | Err(_) => {}
                Ok(Err(e)) => tracing::warn!("the old certificate stays in use: {e}"),
            }
        }
    }
}

/// TLS to a guest: nobody knows its certificate, and where it is is known.
pub fn to_guests() -> io::Result<Arc<ClientConfig>> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider())))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
