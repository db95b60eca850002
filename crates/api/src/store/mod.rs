//! What the API keeps, in one SQLite file: teams, their keys, secrets and volumes, templates and their builds,
//! paused sandboxes and snapshots.

mod checkpoints;
mod keys;
mod secrets;
mod snapshots;
mod tags;
mod teams;
mod templates;
mod volumes;

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};

use uuid::Uuid;

pub use checkpoints::SnapshotFilter;
pub use keys::{ApiKey, NewKey};
pub use secrets::SecretRow;
pub use snapshots::SnapshotRow;
pub use tags::{AssignmentRow, TagRow};
pub use teams::TeamRow;
pub use templates::{BuildRow, BuildStatus, TemplateRow};
pub use volumes::VolumeRow;

/// Version of the schema that this program writes.
const SCHEMA: i64 = STEPS.len() as i64;
/// What makes each version out of the one before it.
const STEPS: [&str; 6] = [
    include_str!("schema.sql"),
    include_str!("schema2.sql"),
    include_str!("schema3.sql"),
    include_str!("schema4.sql"),
    include_str!("schema5.sql"),
    include_str!("schema6.sql"),
];
/// Another process (`nidus key create`) may be writing.
const BUSY_LIMIT: Duration = Duration::from_secs(10);

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
    #[error("The database {path} has schema {found}, this nidus knows up to {SCHEMA}: use the newer nidus")]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
    /// SQLite failed.
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

/// The database.
#[derive(Debug, Clone)]
pub struct Store {
    pool: SqlitePool,
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
        let open = |source| StoreError::Open { path: path.to_owned(), source };
        std::fs::File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(open)?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .foreign_keys(true)
            .busy_timeout(BUSY_LIMIT);
        let began = std::time::Instant::now();
        let pool = loop {
            match SqlitePoolOptions::new().max_connections(4).connect_with(options.clone()).await {
                // The first switch of a new file to its log does not wait for another's lock.
                Err(e) if is_busy(&e) && began.elapsed() < BUSY_LIMIT => {
                    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                }
                done => break done.map_err(|e| open(std::io::Error::other(e)))?,
            }
        };
        let found: i64 = sqlx::query_scalar("PRAGMA user_version")
            .fetch_one(&pool)
            .await
            .map_err(|e| open(std::io::Error::other(e)))?;
        if found > SCHEMA {
            return Err(StoreError::TooNew { path: path.to_owned(), found });
        }
        let store = Self { pool };
        if found < SCHEMA {
            store.migrate().await?;
        }
        Ok(store)
    }

    async fn migrate(&self) -> Result<(), StoreError> {
        let wrap = sql("make its tables");
        // One writer at a time: a second process waits here and then finds the tables.
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(&wrap)?;
        let found: i64 =
            sqlx::query_scalar("PRAGMA user_version").fetch_one(&mut *tx).await.map_err(&wrap)?;
        for step in STEPS.iter().skip(usize::try_from(found).unwrap_or_default()) {
            sqlx::raw_sql(*step).execute(&mut *tx).await.map_err(&wrap)?;
        }
        let version = sqlx::AssertSqlSafe(format!("PRAGMA user_version = {}", SCHEMA.max(found)));
        sqlx::query(version).execute(&mut *tx).await.map_err(&wrap)?;
        if found == 0 {
            sqlx::query("INSERT INTO teams (id, name, created_at) VALUES (?, 'default', ?)")
                .bind(uuid::Uuid::new_v4().to_string())
                .bind(now())
                .execute(&mut *tx)
                .await
                .map_err(&wrap)?;
        }
        tx.commit().await.map_err(&wrap)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_older_file_gets_what_it_lacks_and_keeps_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let options = SqliteConnectOptions::new().filename(&path).create_if_missing(true);
        let old = SqlitePool::connect_with(options).await.unwrap();
        sqlx::raw_sql(STEPS[0]).execute(&old).await.unwrap();
        sqlx::raw_sql("INSERT INTO teams VALUES ('t', 'mine', 1); PRAGMA user_version = 1;")
            .execute(&old)
            .await
            .unwrap();
        old.close().await;
        let store = Store::open(&path).await.unwrap();
        assert_eq!(store.default_team().await.unwrap(), "t");
        assert!(store.snapshots("t").await.unwrap().is_empty());
        let version: i64 = sqlx::query_scalar("PRAGMA user_version").fetch_one(&store.pool).await.unwrap();
        assert_eq!(version, SCHEMA);
    }

    #[tokio::test]
    async fn a_new_file_is_its_owners_and_opens_twice() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let (a, b) = tokio::join!(Store::open(&path), Store::open(&path));
        let (a, b) = (a.unwrap(), b.unwrap());
        assert_eq!(a.default_team().await.unwrap(), b.default_team().await.unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        sqlx::query("PRAGMA user_version = 99").execute(&a.pool).await.unwrap();
        assert!(matches!(Store::open(&path).await, Err(StoreError::TooNew { found: 99, .. })));
    }
}
