//! Images in registries: from a name to checked files.

use std::fmt;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::auth::{self, Challenge};
use crate::layer::{self, Contents};
use crate::manifest::{ACCEPT, ConfigDocument, Descriptor, Manifest};
use crate::transport::{Endpoint, Transport};
use crate::{Credentials, Digest, ImageConfig, Limits, OciError, Reference, RegistrySettings, Tree};

/// Most bytes of index, manifest or configuration: what registries accept.
const MAX_DOCUMENT: usize = 4 << 20;
/// Beginning of an answer that is shown when it is an error.
const SHOWN: usize = 300;
/// The architecture of guests, in images' terms.
const PLATFORM: (&str, &str) = ("linux", if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" });

/// Registries, as this host may use them.
#[derive(Clone)]
pub struct Registry {
    transport: Transport,
}

/// An image that was found: its manifest and configuration are here, its layers are not.
#[derive(Clone)]
pub struct Image {
    /// As it was asked for.
    pub reference: Reference,
    /// Digest of its manifest, which says what is in it.
    pub digest: Digest,
    /// What it says of programs that run in it.
    pub config: ImageConfig,
    diff_ids: Vec<Digest>,
    layers: Vec<Descriptor>,
    session: Session,
}

/// Names no right to read it.
impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Image({} {})", self.reference, self.digest)
    }
}

/// An image whose layers were fetched and applied.
#[derive(Debug)]
pub struct FetchedImage {
    /// Its files.
    pub tree: Tree,
    pub(crate) contents: Contents,
}

/// A repository and the right to read it.
#[derive(Clone)]
struct Session {
    endpoint: Endpoint,
    base: Url,
    repository: String,
    authorization: Option<String>,
}

impl Registry {
    /// With these settings.
    ///
    /// # Errors
    /// When no TLS client can be made.
    pub fn new(settings: RegistrySettings) -> Result<Self, OciError> {
        Ok(Self { transport: Transport::new(settings)? })
    }

    /// Finds an image: manifest (of this machine's architecture, if there are several) and configuration.
    ///
    /// # Errors
    /// When the registry may not be asked, cannot be reached, refuses, does not have it or answers wrongly.
    pub async fn find(&self, reference: &Reference, credentials: &Credentials) -> Result<Image, OciError> {
        let (session, first) = self.session(reference, credentials).await?;
        let (mut digest, mut manifest) = session.manifest(reference, &reference.version(), first).await?;
        if let Some(list) = &manifest.manifests {
            let mine = list.iter().find(|d| {
                d.platform.as_ref().is_some_and(|p| (p.os.as_str(), p.architecture.as_str()) == PLATFORM)
            });
            let Some(mine) = mine else {
                let mut found: Vec<String> = list
                    .iter()
                    .filter_map(|d| d.platform.as_ref())
                    .map(|p| format!("{}/{}", p.os, p.architecture))
                    .collect();
                found.dedup();
                found.truncate(10);
                return Err(OciError::NoPlatform {
                    image: reference.to_string(),
                    wanted: format!("{}/{}", PLATFORM.0, PLATFORM.1),
                    found: if found.is_empty() { "none".into() } else { found.join(", ") },
                });
            };
            (digest, manifest) = session.manifest(reference, &mine.digest()?.to_string(), None).await?;
        }
        let malformed = |reason: &str| OciError::malformed(format!("the manifest of {reference}"), reason);
        if manifest.schema_version != 2 || manifest.manifests.is_some() {
            return Err(malformed("it is not of schema version 2, or an index in an index"));
        }
        let config = manifest.config.as_ref().ok_or_else(|| malformed("it has no configuration"))?;
        if manifest.layers.iter().any(|l| !l.urls.is_empty() || l.media_type.contains("foreign")) {
            return Err(malformed("it has layers that lie elsewhere (foreign layers)"));
        }
        let text = session.document(config).await?;
        let config: ConfigDocument = serde_json::from_slice(&text)
            .map_err(|e| OciError::malformed(format!("the configuration of {reference}"), e))?;
        let (os, architecture) = (config.os.as_str(), config.architecture.as_str());
        if !os.is_empty() && (os, architecture) != PLATFORM {
            return Err(OciError::NoPlatform {
                image: reference.to_string(),
                wanted: format!("{}/{}", PLATFORM.0, PLATFORM.1),
                found: format!("{os}/{architecture}"),
            });
        }
        let diff_ids = config.rootfs.diff_ids.iter().map(|d| d.parse());
        let diff_ids: Vec<Digest> = diff_ids.collect::<Result<_, _>>().map_err(malformed)?;
        if diff_ids.len() != manifest.layers.len() {
            return Err(malformed("it has more layers than its configuration, or fewer"));
        }
        let (reference, layers) = (reference.clone(), manifest.layers);
        Ok(Image { reference, digest, config: config.config, diff_ids, layers, session })
    }

    /// The right to read a repository, and the answer to the question for the manifest if it was given without.
    async fn session(
        &self,
        reference: &Reference,
        credentials: &Credentials,
    ) -> Result<(Session, Option<reqwest::Response>), OciError> {
        let (endpoint, base) = self.transport.registry(&reference.host)?;
        let mut session =
            Session { endpoint, base, repository: reference.repository.clone(), authorization: None };
        let login = credentials.login(&self.transport).await?;
        // As clients do: ask without, and be told what is wanted.
        let url = session.url(&["manifests", &reference.version()])?;
        let response = session.ask(url).await?;
        if response.status() != http::StatusCode::UNAUTHORIZED {
            return Ok((session, Some(response)));
        }
        let wanted = response.headers().get_all("www-authenticate").iter();
        let wanted = wanted.filter_map(|h| h.to_str().ok()).find_map(Challenge::parse);
        session.authorization = match (wanted, &login) {
            (Some(Challenge::Bearer { realm, service }), login) => {
                let token = auth::token(
                    &self.transport,
                    &realm,
                    service.as_deref(),
                    &reference.repository,
                    login.as_ref(),
                );
                Some(format!("Bearer {}", token.await?))
            }
            (Some(Challenge::Basic), Some((name, password))) => {
                use base64::Engine;
                let pair = format!("{name}:{password}");
                Some(format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair)))
            }
            _ => return Err(session.refused(reference, 401)),
        };
        Ok((session, None))
    }
}

impl Session {
    fn url(&self, rest: &[&str]) -> Result<Url, OciError> {
        let mut path = self.repository.clone();
        for part in rest {
            path.push('/');
            path.push_str(part);
        }
        self.base.join(&path).map_err(|e| OciError::malformed("an address in the registry", e))
    }

    fn refused(&self, what: impl ToString, status: u16) -> OciError {
        OciError::Unauthorized { host: self.endpoint.host.clone(), what: what.to_string(), status }
    }

    async fn ask(&self, url: Url) -> Result<reqwest::Response, OciError> {
        let mut request = self.endpoint.get(url).header("accept", ACCEPT);
        if let Some(value) = &self.authorization {
            request = request.header("authorization", value);
        }
        self.endpoint.send(request).await
    }

    async fn get(&self, url: Url, what: &str) -> Result<reqwest::Response, OciError> {
        self.good(self.ask(url).await?, what).await
    }

    /// An answer that is none is an error.
    async fn good(&self, response: reqwest::Response, what: &str) -> Result<reqwest::Response, OciError> {
        match response.status().as_u16() {
            200 => Ok(response),
            status @ (401 | 403) => Err(self.refused(what, status)),
            404 => Err(OciError::NotFound(what.to_owned())),
            status => {
                let text = self.endpoint.body(response, what, MAX_DOCUMENT).await.unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let text = text.chars().filter(|c| !c.is_control()).take(SHOWN).collect();
                let (host, what) = (self.endpoint.host.clone(), what.to_owned());
                Err(OciError::Answer { host, what, status, text })
            }
        }
    }

    /// A manifest or index, and its digest. Asked for by digest, it has that one.
    /// `answered` is the registry's answer if it was asked already.
    async fn manifest(
        &self,
        reference: &Reference,
        version: &str,
        answered: Option<reqwest::Response>,
    ) -> Result<(Digest, Manifest), OciError> {
        let what = reference.to_string();
        let response = match answered {
            Some(response) => self.good(response, &what).await?,
            None => self.get(self.url(&["manifests", version])?, &what).await?,
        };
        let text = self.endpoint.body(response, &format!("the manifest of {what}"), MAX_DOCUMENT).await?;
        let digest = Digest::of(&text);
        check(&format!("the manifest of {what}"), version.parse().ok(), digest)?;
        let manifest = serde_json::from_slice(&text)
            .map_err(|e| OciError::malformed(format!("the manifest of {what}"), e))?;
        Ok((digest, manifest))
    }

    /// A small blob.
    async fn document(&self, of: &Descriptor) -> Result<Vec<u8>, OciError> {
        let digest = of.digest()?;
        let what = format!("the configuration {digest}");
        let response = self.get(self.url(&["blobs", &digest.to_string()])?, &what).await?;
        let text = self.endpoint.body(response, &what, MAX_DOCUMENT).await?;
        check(&what, Some(digest), Digest::of(&text))?;
        Ok(text)
    }

    /// A blob into a new file.
    async fn blob(&self, of: &Descriptor, number: usize, to: &Path) -> Result<(), OciError> {
        let digest = of.digest()?;
        let what = format!("layer {number} ({digest})");
        let mut response = self.get(self.url(&["blobs", &digest.to_string()])?, &what).await?;
        let mut file = tokio::fs::File::create_new(to).await.map_err(|e| OciError::io("make", to, e))?;
        let (mut hasher, mut left) = (Sha256::new(), of.size);
        while let Some(piece) = response.chunk().await.map_err(|e| self.endpoint.failed(&e))? {
            left = left.checked_sub(piece.len() as u64).ok_or_else(|| {
                OciError::malformed(&what, format!("it has more than the {} bytes of the manifest", of.size))
            })?;
            hasher.update(&piece);
            file.write_all(&piece).await.map_err(|e| OciError::io("write", to, e))?;
        }
        file.flush().await.map_err(|e| OciError::io("write", to, e))?;
        check(&what, Some(digest), Digest::from_hasher(hasher))
    }
}

fn check(what: &str, expected: Option<Digest>, found: Digest) -> Result<(), OciError> {
    match expected {
        Some(expected) if expected != found => Err(OciError::Digest {
            what: what.to_owned(),
            expected: expected.to_string(),
            found: found.to_string(),
        }),
        _ => Ok(()),
    }
}

impl Image {
    /// Bytes of its layers as they are fetched.
    pub fn fetch_bytes(&self) -> u64 {
        self.layers.iter().map(|l| l.size).fold(0, u64::saturating_add)
    }

    /// Fetches the layers into the new directory `work`, checks them and applies them, one after
    /// another; `line` hears of each. On any way out the caller removes the directory.
    ///
    /// # Errors
    /// When a layer cannot be fetched, is not what its digest says, is hostile or too much.
    pub async fn fetch(
        &self,
        work: &Path,
        limits: Limits,
        cancel: &CancellationToken,
        mut line: impl FnMut(String),
    ) -> Result<FetchedImage, OciError> {
        if self.layers.len() > limits.layers {
            return Err(OciError::TooLarge(format!("it has more than {} layers", limits.layers)));
        }
        if self.fetch_bytes() > limits.bytes {
            return Err(OciError::TooLarge(format!(
                "its layers have {} MiB, and {} are the most for this disk",
                self.fetch_bytes() >> 20,
                limits.bytes >> 20
            )));
        }
        tokio::fs::create_dir(work).await.map_err(|e| OciError::io("make", work, e))?;
        let mut fetched =
            FetchedImage { tree: Tree::default(), contents: Contents::create(work.join("contents"))? };
        for (n, (layer, diff_id)) in self.layers.iter().zip(&self.diff_ids).enumerate() {
            let number = n + 1;
            let mib = layer.size.div_ceil(1 << 20);
            line(format!("layer {number} of {}: {mib} MiB ({})", self.layers.len(), layer.digest));
            let path: PathBuf = work.join(format!("layer-{number}"));
            tokio::select! {
                () = cancel.cancelled() => return Err(OciError::Cancelled),
                done = self.session.blob(layer, number, &path) => done?,
            }
            let (limits, cancel) = (limits, cancel.clone());
            let apply = move || {
                let found =
                    layer::apply(&mut fetched.tree, &mut fetched.contents, number, &path, &limits, &cancel)?;
                std::fs::remove_file(&path).map_err(|e| OciError::io("remove", &path, e))?;
                Ok::<_, OciError>((fetched, found))
            };
            let done = tokio::task::spawn_blocking(apply).await;
            let done = done.map_err(|e| OciError::Io {
                action: format!("apply layer {number}"),
                source: std::io::Error::other(e),
            })?;
            let (next, found) = done?;
            fetched = next;
            check(&format!("layer {number}, unpacked,"), Some(*diff_id), found)?;
        }
        Ok(fetched)
    }
}

impl FetchedImage {
    /// Puts a file with these bytes at `path`, where links lead in the image.
    ///
    /// # Errors
    /// When the path cannot be, as in [`Tree::put`].
    pub fn put_bytes(&mut self, path: &Path, bytes: &[u8], meta: crate::Meta) -> Result<(), OciError> {
        let node = self.contents.add_bytes(bytes)?;
        self.put(path, node, meta)
    }

    /// Puts a copy of a file of this host at `path`.
    ///
    /// # Errors
    /// As [`FetchedImage::put_bytes`].
    pub fn put_file(&mut self, path: &Path, from: &Path, meta: crate::Meta) -> Result<(), OciError> {
        let node = self.contents.add_file(from)?;
        self.put(path, node, meta)
    }

    /// Puts anything at `path`; a link that is there is replaced, not followed.
    ///
    /// # Errors
    /// As [`Tree::put`].
    pub fn put(&mut self, path: &Path, node: crate::Node, meta: crate::Meta) -> Result<(), OciError> {
        // After all layers.
        self.tree.put(usize::MAX, path, node, meta).map_err(|source| OciError::Entry { layer: 0, source })
    }

    /// The bytes of the file that `path` leads to, if it is one of at most `limit` bytes.
    ///
    /// # Errors
    /// When its content cannot be read.
    pub fn read(&mut self, path: &Path, limit: u64) -> Result<Option<Vec<u8>>, OciError> {
        let Ok(path) = self.tree.resolve(path) else { return Ok(None) };
        match self.tree.get(&path) {
            Some((crate::Node::File { content, len }, _)) if *len <= limit => {
                let content = *content;
                self.contents.read(content).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Writes it into the new directory `root`. Blocks.
    ///
    /// # Errors
    /// When a file cannot be written, or `cancel` says so.
    pub fn write(&self, root: &Path, cancel: &CancellationToken) -> Result<crate::Written, OciError> {
        self.tree.write(&self.contents, root, cancel)
    }
}
