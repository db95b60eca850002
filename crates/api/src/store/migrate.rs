//! The tables, and how older ones become the present ones.

use std::path::Path;

use super::{Kind, Store, StoreError, now, sql};

/// Version of the schema that this program writes.
const SCHEMA: i64 = STEPS.len() as i64;
/// What makes each version out of the one before it, in SQLite.
const STEPS: [&str; 6] = [
    include_str!("schema.sql"),
    include_str!("schema2.sql"),
    include_str!("schema3.sql"),
    include_str!("schema4.sql"),
    include_str!("schema5.sql"),
    include_str!("schema6.sql"),
];
/// The version that Postgres began with, whole; later ones are steps there too.
const POSTGRES_BEGAN: i64 = 6;
const POSTGRES: [&str; 1] = [include_str!("postgres.sql")];

impl Store {
    async fn version(&self) -> Result<i64, sqlx::Error> {
        match self.kind {
            Kind::Sqlite => sqlx::query_scalar("PRAGMA user_version").fetch_one(&self.pool).await,
            Kind::Postgres => {
                let there: i64 = sqlx::query_scalar(
                    "SELECT count(*) FROM information_schema.tables \
                     WHERE table_schema = current_schema() AND table_name = 'schema_version'",
                )
                .fetch_one(&self.pool)
                .await?;
                if there == 0 {
                    return Ok(0);
                }
                sqlx::query_scalar("SELECT version FROM schema_version").fetch_one(&self.pool).await
            }
        }
    }

    /// Makes what is missing. Of two that come at once, one waits and then finds it done.
    pub(super) async fn migrate(&self, path: &Path) -> Result<(), StoreError> {
        let wrap = sql("make its tables");
        if self.checked_version(path).await? == SCHEMA {
            return Ok(());
        }
        let mut tx = self.write().await.map_err(&wrap)?;
        // Again, now that nobody else writes.
        let found = self.checked_version(path).await?;
        let steps: Vec<&str> = match self.kind {
            Kind::Sqlite => STEPS.iter().skip(usize::try_from(found).unwrap_or_default()).copied().collect(),
            Kind::Postgres => {
                let done = if found == 0 { 0 } else { found - POSTGRES_BEGAN + 1 };
                POSTGRES.iter().skip(usize::try_from(done).unwrap_or_default()).copied().collect()
            }
        };
        for step in steps {
            sqlx::raw_sql(step).execute(&mut *tx).await.map_err(&wrap)?;
        }
        let noted = match self.kind {
            Kind::Sqlite => format!("PRAGMA user_version = {SCHEMA}"),
            Kind::Postgres => format!("UPDATE schema_version SET version = {SCHEMA}"),
        };
        sqlx::raw_sql(sqlx::AssertSqlSafe(noted)).execute(&mut *tx).await.map_err(&wrap)?;
        if found == 0 {
            sqlx::query("INSERT INTO teams (id, name, created_at) VALUES ($1, 'default', $2)")
                .bind(uuid::Uuid::new_v4().to_string())
                .bind(now())
                .execute(&mut *tx)
                .await
                .map_err(&wrap)?;
        }
        tx.commit().await.map_err(&wrap)
    }

    async fn checked_version(&self, path: &Path) -> Result<i64, StoreError> {
        let found = self.version().await.map_err(sql("read the version of its tables"))?;
        if found > SCHEMA {
            return Err(StoreError::TooNew { path: path.to_owned(), found, known: SCHEMA });
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use sqlx::AnyPool;

    use super::super::testing::stores;
    use super::*;

    #[tokio::test]
    async fn an_older_file_gets_what_it_lacks_and_keeps_what_it_has() {
        sqlx::any::install_default_drivers();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let old = AnyPool::connect(&format!("sqlite://{}?mode=rwc", path.display())).await.unwrap();
        sqlx::raw_sql(STEPS[0]).execute(&old).await.unwrap();
        sqlx::raw_sql("INSERT INTO teams VALUES ('t', 'mine', 1); PRAGMA user_version = 1;")
            .execute(&old)
            .await
            .unwrap();
        old.close().await;
        let store = Store::open(&path).await.unwrap();
        assert_eq!(store.default_team().await.unwrap(), "t");
        assert!(store.snapshots("t").await.unwrap().is_empty());
        assert_eq!(store.version().await.unwrap(), SCHEMA);
    }

    #[tokio::test]
    async fn tags_that_were_set_before_have_their_history() {
        sqlx::any::install_default_drivers();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let old = AnyPool::connect(&format!("sqlite://{}?mode=rwc", path.display())).await.unwrap();
        for step in &STEPS[..5] {
            sqlx::raw_sql(*step).execute(&old).await.unwrap();
        }
        sqlx::raw_sql(
            "INSERT INTO teams VALUES ('t', 'mine', 1); \
             INSERT INTO templates (id, team_id, public, created_at, updated_at) VALUES ('x', 't', 0, 1, 1); \
             INSERT INTO builds (id, template_id, status, cpu_count, memory_mb, disk_mb, created_at, updated_at) \
             VALUES ('b', 'x', 'ready', 1, 512, 1, 1, 1); \
             INSERT INTO tags VALUES ('x', 'v1', 'b', 5); PRAGMA user_version = 5;",
        )
        .execute(&old)
        .await
        .unwrap();
        old.close().await;
        let store = Store::open(&path).await.unwrap();
        let stood = store.assignments("x").await.unwrap();
        assert_eq!((stood.len(), stood[0].tag.as_str(), stood[0].build_id.as_str()), (1, "v1", "b"));
        assert!(stood[0].id.parse::<uuid::Uuid>().is_ok(), "{}", stood[0].id);
        assert_eq!(store.team("t").await.unwrap().unwrap().max_sandboxes, 0);
    }

    #[tokio::test]
    async fn a_new_file_is_its_owners_and_opens_twice() {
        let dir = tempfile::tempdir().unwrap();
        // A name that would be something else in a URL.
        let path = dir.path().join("d b?%41#x");
        let (a, b) = tokio::join!(Store::open(&path), Store::open(&path));
        let (a, b) = (a.unwrap(), b.unwrap());
        assert_eq!(a.default_team().await.unwrap(), b.default_team().await.unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        sqlx::query("PRAGMA user_version = 99").execute(&a.pool).await.unwrap();
        assert!(matches!(Store::open(&path).await, Err(StoreError::TooNew { found: 99, .. })));
    }

    #[tokio::test]
    async fn tables_are_made_once() {
        for made in stores().await {
            let (a, b) = tokio::join!(made.again(), made.again());
            let (a, b) = (a.unwrap(), b.unwrap());
            assert_eq!(a.default_team().await.unwrap(), b.default_team().await.unwrap());
            assert_eq!(a.teams().await.unwrap().len(), 1);
            assert_eq!(a.version().await.unwrap(), SCHEMA);
        }
    }
}
