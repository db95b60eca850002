//! What the API keeps, in one SQLite file or on a Postgres server: teams, their keys, secrets and volumes, templates and their builds,
//! paused sandboxes and snapshots.

mod checkpoints;
mod keys;
mod secrets;
mod snapshots;
mod tags;
mod teams;
mod templates;
mod volumes;

mod migrate;
#[cfg(test)]
mod testing;

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::any::AnyPoolOptions;
use sqlx::{Any, AnyPool, Transaction};

use uuid::Uuid;

pub use checkpoints::SnapshotFilter;
pub use keys::{ApiKey, NewKey};
pub use secrets::SecretRow;
pub use snapshots::SnapshotRow;
pub use tags::{AssignmentRow, TagRow};
pub use teams::TeamRow;
pub use templates::{BuildRow, BuildStatus, TemplateRow};
pub use volumes::VolumeRow;

/// Another process (`nidus key create`) may be writing.
const BUSY_LIMIT: Duration = Duration::from_secs(10);

/// Connections to a Postgres server.
const CONNECTIONS: u32 = 16;
/// Whoever holds this advisory lock of Postgres writes; with SQLite it is the file's own lock.
const WRITER: i64 = 0x006e_6964_7573;

/// Why the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be used.
    #[error("Cannot open the database {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A newer program wrote it.
    #[error("The database {path} has schema {found}, this nidus knows up to {known}: use the newer nidus")]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// The newest version that this program knows.
        known: i64,
    },
    /// The server cannot be used.
    #[error("Cannot use the database server: {0}")]
    Server(sqlx::Error),
    /// A statement failed.
    #[error("The database failed while it was to {action}: {source}")]
    Sql {
        /// What was being done.
        action: &'static str,
        /// The cause.
        source: sqlx::Error,
    },
    /// No random bytes.
    #[error("Cannot make a random key: {0}")]
    Random(String),
}

fn sql(action: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| StoreError::Sql { action, source }
}

/// What keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Sqlite,
    Postgres,
}

/// The database.
#[derive(Debug, Clone)]
pub struct Store {
    pool: AnyPool,
    kind: Kind,
}

/// SQLITE_BUSY.
fn is_busy(e: &sqlx::Error) -> bool {
    e.as_database_error().and_then(|e| e.code()).is_some_and(|code| code == "5")
}

/// Something of this name is there already.
fn is_unique(e: &sqlx::Error) -> bool {
    e.as_database_error().is_some_and(|e| e.is_unique_violation())
}

/// Milliseconds since 1970, as times are kept.
fn now() -> i64 {
    Utc::now().timestamp_millis()
}

fn time(ms: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(ms).unwrap_or_default()
}

impl Store {
    /// Opens the file, or makes it (readable by its owner alone) with the default team.
    ///
    /// # Errors
    /// When it cannot be made or read, or was written by a newer program.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        sqlx::any::install_default_drivers();
        let open = |source| StoreError::Open { path: path.to_owned(), source };
        std::fs::File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(open)?;
        let url = url::Url::from_file_path(std::path::absolute(path).map_err(open)?);
        let url = url.map_err(|()| open(std::io::Error::other("it is not a path of a file")))?;
        let url = url.as_str().replacen("file://", "sqlite://", 1);
        let set_up = format!(
            "PRAGMA busy_timeout = {}; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON;",
            BUSY_LIMIT.as_millis()
        );
        let options = AnyPoolOptions::new().max_connections(4).after_connect(move |connection, _| {
            let set_up = sqlx::AssertSqlSafe(set_up.clone());
            Box::pin(async move { sqlx::raw_sql(set_up).execute(connection).await.map(drop) })
        });
        let began = std::time::Instant::now();
        let pool = loop {
            match options.clone().connect(&url).await {
                // The first switch of a new file to its log does not wait for another's lock.
                Err(e) if is_busy(&e) && began.elapsed() < BUSY_LIMIT => {
                    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                }
                done => break done.map_err(|e| open(std::io::Error::other(e)))?,
            }
        };
        let store = Self { pool, kind: Kind::Sqlite };
        store.migrate(path).await?;
        Ok(store)
    }

    /// Connects to a Postgres server (`postgres://user:password@host/database`), and makes its tables where
    /// they are missing.
    ///
    /// # Errors
    /// When it cannot be reached, or was written by a newer program.
    pub async fn connect(url: &str) -> Result<Self, StoreError> {
        sqlx::any::install_default_drivers();
        let pool = AnyPoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(BUSY_LIMIT);
        let pool = pool.connect(url).await.map_err(StoreError::Server)?;
        let store = Self { pool, kind: Kind::Postgres };
        // Its name without who may use it.
        let name = url.rsplit_once('@').map_or("of Postgres", |(_, name)| name);
        store.migrate(Path::new(name)).await?;
        Ok(store)
    }

    /// Begins a change. One writer at a time: what it reads stays true until it is done.
    async fn write(&self) -> Result<Transaction<'static, Any>, sqlx::Error> {
        match self.kind {
            Kind::Sqlite => self.pool.begin_with("BEGIN IMMEDIATE").await,
            Kind::Postgres => {
                let mut tx = self.pool.begin().await?;
                sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(WRITER).execute(&mut *tx).await?;
                Ok(tx)
            }
        }
    }

    /// Id of the team that a single machine has.
    pub async fn default_team(&self) -> Result<String, StoreError> {
        sqlx::query_scalar("SELECT id FROM teams ORDER BY created_at LIMIT 1")
            .fetch_one(&self.pool)
            .await
            .map_err(sql("read the default team"))
    }

    /// Whose database this is: an id that it was made with. It knows all that refers to what is marked
    /// as this one's.
    pub async fn installation(&self) -> Result<Uuid, StoreError> {
        let id = self.default_team().await?;
        id.parse().map_err(|e: uuid::Error| sql("read whose it is")(sqlx::Error::Decode(Box::new(e))))
    }

    /// Closes it, with what is not yet in the file.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}
