//! The command line's own client of the REST API.

use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use futures::TryStreamExt;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::Frame;
use hyper::{Method, Request, StatusCode};
use hyper_util::client::legacy::{Client as Http, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use nidus_api::Store;
use serde_json::Value;

use crate::config::Config;

const MAX_ANSWER: usize = 64 << 20;

/// Where a daemon is, and the key for it.
#[derive(Debug, Clone)]
pub struct Client {
    http: Http<HttpConnector, Full<Bytes>>,
    api: String,
    /// Base URL of envd requests.
    pub sandbox_url: String,
    /// The API key.
    pub key: String,
}

/// Variables of the SDKs, which point this command elsewhere too.
fn variable(names: [&str; 2]) -> Option<String> {
    names.iter().find_map(|n| std::env::var(n).ok().filter(|v| !v.is_empty()))
}

/// The API that the SDKs' variables name, if they do.
pub fn named_api() -> Option<String> {
    variable(["NIDUS_API_URL", "E2B_API_URL"])
}

impl Client {
    /// From the SDKs' variables, else for the daemon of this configuration. Then the key is the
    /// command line's own, made at its first use.
    pub async fn new(config: &Config) -> anyhow::Result<Self> {
        let api = named_api().unwrap_or_else(|| format!("http://{}", config.api_addr));
        let proxy = || format!("http://{}", config.proxy_addr);
        let sandbox_url = variable(["NIDUS_SANDBOX_URL", "E2B_SANDBOX_URL"]).unwrap_or_else(proxy);
        let key = match variable(["NIDUS_API_KEY", "E2B_API_KEY"]) {
            Some(key) => key,
            None => own_key(config).await?,
        };
        let http = Http::builder(TokioExecutor::new()).build_http();
        Ok(Self { http, api: api.trim_end_matches('/').to_owned(), sandbox_url, key })
    }

    /// One call; the answer's JSON, or null when it has none.
    pub async fn call(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<Value> {
        let url = format!("{}{path}", self.api);
        let mut request = Request::builder().method(method).uri(&url).header("x-api-key", &self.key);
        let bytes = match body {
            Some(v) => {
                request = request.header("content-type", "application/json");
                Bytes::from(serde_json::to_vec(&v)?)
            }
            None => Bytes::new(),
        };
        let request = request.body(Full::new(bytes)).with_context(|| format!("'{url}' is not a URL"))?;
        let answer = self.http.request(request).await.map_err(|e| {
            if e.is_connect() {
                anyhow!("No daemon answers at {}. Start one with: nidus serve", self.api)
            } else {
                anyhow!("The call to {url} failed: {e}")
            }
        })?;
        let status = answer.status();
        let bytes = Limited::new(answer.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|e| anyhow!("The answer of {url} broke off: {e}"))?
            .to_bytes();
        let value: Value =
            if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).unwrap_or_default() };
        if status.is_success() {
            return Ok(value);
        }
        let message = value["message"].as_str().unwrap_or("the server does not say why");
        if status == StatusCode::UNAUTHORIZED {
            bail!("{message}");
        }
        bail!("{message} ({})", status.as_u16())
    }
}

impl Client {
    /// Sends a file to an address that the server gave for it.
    pub async fn upload(&self, url: &str, file: std::fs::File) -> anyhow::Result<()> {
        let length = file.metadata().context("Cannot look at the files to be sent")?.len();
        let pieces = tokio_util::io::ReaderStream::with_capacity(tokio::fs::File::from_std(file), 256 << 10);
        let body = StreamBody::new(pieces.map_ok(Frame::data));
        let request = Request::put(url).header("content-length", length).body(body);
        let request = request.with_context(|| format!("'{url}' is not a URL"))?;
        let http = Http::builder(TokioExecutor::new()).build_http();
        let answer =
            http.request(request).await.map_err(|e| anyhow!("The files were not sent to {url}: {e}"))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let text = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let text = text.map(|t| String::from_utf8_lossy(&t.to_bytes()).into_owned()).unwrap_or_default();
        bail!("The files were refused ({}): {text}", status.as_u16())
    }
}

/// The database that is configured, with its tables.
pub async fn database(config: &Config) -> anyhow::Result<Store> {
    Ok(match &config.database {
        Some(url) if url.starts_with("postgres://") || url.starts_with("postgresql://") => {
            Store::connect(url).await?
        }
        Some(_) => bail!(
            "database is a URL that begins with postgres://, or is left out for a file in the data directory"
        ),
        None => Store::open(&config.data_dir.join("nidus.db")).await?,
    })
}

/// Opens the store, for commands that need no daemon.
pub async fn store(config: &Config) -> anyhow::Result<Store> {
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("Cannot make the data directory {}", config.data_dir.display()))?;
    database(config).await
}

/// The key in the data directory, which only its owner may read.
pub async fn own_key(config: &Config) -> anyhow::Result<String> {
    let path = config.data_dir.join("cli.key");
    if let Ok(key) = std::fs::read_to_string(&path) {
        let store = store(config).await?;
        let known = store.list_keys().await?;
        let key = key.trim();
        // A database that was made anew does not know it.
        if known.iter().any(|k| k.name == KEY_NAME && k.mask == mask(key)) {
            return Ok(key.to_owned());
        }
    }
    let store = store(config).await?;
    let new = store.create_key(&store.default_team().await?, KEY_NAME).await?;
    let mut file = std::fs::File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("Cannot write {}", path.display()))?;
    std::io::Write::write_all(&mut file, format!("{}\n", new.key).as_bytes())
        .with_context(|| format!("Cannot write {}", path.display()))?;
    Ok(new.key)
}

const KEY_NAME: &str = "this machine's command line";

fn mask(key: &str) -> String {
    if key.len() != 44 || !key.is_ascii() {
        return String::new();
    }
    format!("{}...{}", &key[..8], &key[40..])
}
