//! From a URL and options to an object store.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use object_store::{
    BackoffConfig, ClientOptions, HeaderValue, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    gcp::GoogleCloudStorageBuilder,
    local::LocalFileSystem,
    path::Path as ObjectPath,
    prefix::PrefixStore,
};
use url::Url;

use super::RemoteError;
use crate::StorageError;

/// How to reach an object store, beside its URL. What is not given is taken from the environment
/// variables of the provider's own tools (`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`,
/// `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_ALLOW_HTTP`; `GOOGLE_SERVICE_ACCOUNT`,
/// `GOOGLE_APPLICATION_CREDENTIALS`), or from the machine's role.
#[derive(Clone, Default)]
pub struct RemoteOptions {
    /// The server, if it is not Amazon's: `http://127.0.0.1:9000`.
    pub endpoint: Option<String>,
    /// The region; `us-east-1` where nothing says otherwise.
    pub region: Option<String>,
    /// The id of the access key.
    pub access_key: Option<String>,
    /// The secret access key.
    pub secret_key: Option<String>,
    /// Whether the bucket is part of the host name instead of the path.
    pub virtual_hosted: Option<bool>,
    /// Whether plain HTTP is allowed. An endpoint with `http://` implies it.
    pub allow_http: Option<bool>,
    /// A service account's key file, for `gs://`.
    pub service_account: Option<PathBuf>,
}

/// Shows what is set, never a key.
impl fmt::Debug for RemoteOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteOptions")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("access_key", &self.access_key.as_ref().map(|_| "set"))
            .field("secret_key", &self.secret_key.as_ref().map(|_| "set"))
            .field("virtual_hosted", &self.virtual_hosted)
            .field("allow_http", &self.allow_http)
            .field("service_account", &self.service_account)
            .finish()
    }
}

/// How long a connection may take to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long a server may say nothing.
const SILENCE_LIMIT: Duration = Duration::from_secs(20);

/// What a URL led to.
pub(super) struct Connected {
    pub store: Arc<dyn ObjectStore>,
    /// The URL without anything secret, for messages.
    pub name: String,
    /// The directory of a `file:` URL.
    pub directory: Option<PathBuf>,
}

/// Makes the client of a URL's store. No request is made.
pub(super) fn connect(text: &str, options: &RemoteOptions) -> Result<Connected, RemoteError> {
    let refuse = |reason: String| RemoteError::Url { url: redacted(text), reason };
    let url = Url::parse(text).map_err(|e| {
        refuse(format!("{e}; file:///directory, s3://bucket/prefix or gs://bucket/prefix is expected"))
    })?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refuse("keys do not belong into a URL".into()));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(refuse("it has a query or a fragment, which mean nothing here".into()));
    }
    if url.scheme() == "file" {
        let path = url.to_file_path().map_err(|()| refuse("file:///directory is expected".into()))?;
        return directory(&path, text).map_err(|e| match e {
            DirectoryError::Client(e) => refuse(e.to_string()),
            DirectoryError::Disk(e) => e.into(),
        });
    }
    let bucket = match url.host_str() {
        Some(bucket) if !bucket.is_empty() && url.port().is_none() => bucket,
        _ => return Err(refuse(format!("{}://bucket/prefix is expected", url.scheme()))),
    };
    let prefix = ObjectPath::from_url_path(url.path()).map_err(|e| refuse(e.to_string()))?;
    // The provider of the process's TLS; whoever set one before is right.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let store: Arc<dyn ObjectStore> = match url.scheme() {
        "s3" => Arc::new(PrefixStore::new(s3(bucket, options).map_err(|e| refuse(e.to_string()))?, prefix)),
        "gs" => Arc::new(PrefixStore::new(gcs(bucket, options).map_err(|e| refuse(e.to_string()))?, prefix)),
        other => {
            return Err(refuse(format!("file, s3 and gs are known, {other:?} is not")));
        }
    };
    Ok(Connected { store, name: text.trim_end_matches('/').to_owned(), directory: None })
}

/// The URL up to where it might hold a key.
fn redacted(text: &str) -> String {
    match (text.split_once("://"), text.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://...@{host}"),
        _ => text.to_owned(),
    }
}

enum DirectoryError {
    Client(object_store::Error),
    Disk(StorageError),
}

fn directory(path: &Path, text: &str) -> Result<Connected, DirectoryError> {
    std::fs::create_dir_all(path)
        .map_err(|e| DirectoryError::Disk(StorageError::io("create the directory", path, e)))?;
    let store = LocalFileSystem::new_with_prefix(path)
        .map_err(DirectoryError::Client)?
        .with_automatic_cleanup(true)
        .with_fsync(true);
    let name = text.trim_end_matches('/').to_owned();
    Ok(Connected { store: Arc::new(store), name, directory: Some(path.to_owned()) })
}

fn s3(bucket: &str, options: &RemoteOptions) -> object_store::Result<object_store::aws::AmazonS3> {
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_retry(retries())
        .with_client_options(limits());
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    // Whoever names such an endpoint means it.
    let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint);
    if endpoint.is_some_and(|e| e.starts_with("http://")) {
        builder = builder.with_allow_http(true);
    }
    if let Some(region) = &options.region {
        builder = builder.with_region(region);
    }
    if let Some(key) = &options.access_key {
        builder = builder.with_access_key_id(key);
    }
    if let Some(secret) = &options.secret_key {
        builder = builder.with_secret_access_key(secret);
    }
    if let Some(virtual_hosted) = options.virtual_hosted {
        builder = builder.with_virtual_hosted_style_request(virtual_hosted);
    }
    if let Some(allow) = options.allow_http {
        builder = builder.with_allow_http(allow);
    }
    builder.build()
}

fn gcs(bucket: &str, options: &RemoteOptions) -> object_store::Result<object_store::gcp::GoogleCloudStorage> {
    let mut builder = GoogleCloudStorageBuilder::from_env()
        .with_bucket_name(bucket)
        .with_retry(retries())
        .with_client_options(limits());
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_base_url(endpoint);
    }
    if let Some(path) = &options.service_account {
        builder = builder.with_service_account_path(path.to_string_lossy());
    }
    builder.build()
}

fn limits() -> ClientOptions {
    ClientOptions::new()
        .with_connect_timeout(CONNECT_LIMIT)
        .with_read_timeout(SILENCE_LIMIT)
        // The whole of a request: an object goes at a megabit a second.
        .with_timeout(Duration::from_secs(90))
        .with_user_agent(HeaderValue::from_static(concat!("nidus/", env!("CARGO_PKG_VERSION"))))
}

/// Passing faults: connections refused or broken, 5xx, throttling.
fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(3),
            base: 2.0,
        },
        max_retries: 5,
        retry_timeout: Duration::from_secs(30),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(url: &str) -> String {
        match connect(url, &RemoteOptions::default()) {
            Err(e @ RemoteError::Url { .. }) => e.to_string(),
            Err(e) => panic!("{url}: {e}"),
            Ok(_) => panic!("{url} was accepted"),
        }
    }

    #[test]
    fn urls_that_name_no_store_are_refused_with_what_would_be_right() {
        assert!(refusal("bucket/prefix").contains("s3://bucket/prefix"));
        assert!(refusal("http://host/bucket").contains("file, s3 and gs are known"));
        assert!(refusal("s3:///prefix").contains("s3://bucket/prefix is expected"));
        assert!(refusal("s3://bucket:9000/x").contains("s3://bucket/prefix is expected"));
        assert!(refusal("file://host/dir").contains("file:///directory"));
        assert!(refusal("s3://bucket/x?region=y").contains("query"));
        let secret = refusal("s3://id:secret@bucket/x");
        assert!(secret.contains("do not belong") && !secret.contains("secret"), "{secret}");
    }

    #[test]
    fn options_do_not_show_their_keys() {
        let options = RemoteOptions {
            access_key: Some("AKIA".into()),
            secret_key: Some("hush".into()),
            ..Default::default()
        };
        let shown = format!("{options:?}");
        assert!(!shown.contains("AKIA") && !shown.contains("hush"), "{shown}");
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_an_error_of_the_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let url = format!("file://{}/below", file.path().display());
        assert!(matches!(connect(&url, &RemoteOptions::default()), Err(RemoteError::Local(_))));
    }
}
