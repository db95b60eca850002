//! Paused sandboxes.

use chrono::{DateTime, Utc};
use nidus_proto::node::SandboxConfig;
use prost::Message;
use sqlx::Row;
use sqlx::any::AnyRow;

use super::{Store, StoreError, now, sql, time};

/// A build of a paused sandbox.
#[derive(Debug, Clone)]
pub struct SnapshotRow {
    pub build_id: String,
    pub sandbox_id: String,
    /// The node has said that the build is there.
    pub paused: bool,
    /// What the sandbox is resumed with.
    pub config: SandboxConfig,
    pub started_at: DateTime<Utc>,
    pub paused_at: DateTime<Utc>,
    /// It was paused without its memory.
    pub filesystem_only: bool,
}

macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT build_id, sandbox_id, status, config, started_at, paused_at, filesystem_only ",
            "FROM snapshots ",
            $rest
        )
    };
}

fn row(r: &AnyRow) -> Result<SnapshotRow, sqlx::Error> {
    let config: Vec<u8> = r.try_get(3)?;
    let config = SandboxConfig::decode(config.as_slice()).map_err(|e| sqlx::Error::Decode(Box::new(e)))?;
    Ok(SnapshotRow {
        build_id: r.try_get(0)?,
        sandbox_id: r.try_get(1)?,
        paused: r.try_get::<String, _>(2)? == "paused",
        config,
        started_at: time(r.try_get(4)?),
        paused_at: time(r.try_get(5)?),
        filesystem_only: r.try_get::<i64, _>(6)? != 0,
    })
}

impl Store {
    /// Notes that a sandbox is about to be paused with this configuration, which names the build.
    pub(crate) async fn begin_pause(
        &self,
        config: &SandboxConfig,
        started_at: DateTime<Utc>,
        filesystem_only: bool,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO snapshots \
             (build_id, sandbox_id, team_id, status, config, started_at, paused_at, filesystem_only) \
             VALUES ($1, $2, $3, 'pausing', $4, $5, $6, $7)",
        )
        .bind(&config.build_id)
        .bind(&config.sandbox_id)
        .bind(&config.team_id)
        .bind(config.encode_to_vec())
        .bind(started_at.timestamp_millis())
        .bind(now())
        .bind(i64::from(filesystem_only))
        .execute(&self.pool)
        .await
        .map(drop)
        .map_err(sql("note a pause"))
    }

    /// The build is there.
    pub(crate) async fn finish_pause(&self, build: &str) -> Result<(), StoreError> {
        sqlx::query("UPDATE snapshots SET status = 'paused', paused_at = $1 WHERE build_id = $2")
            .bind(now())
            .bind(build)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("finish a pause"))
    }

    /// There is no such build, or no more.
    pub(crate) async fn forget_snapshot(&self, build: &str) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM snapshots WHERE build_id = $1")
            .bind(build)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("forget a pause"))
    }

    /// All builds of a team's sandbox, newest first.
    pub(crate) async fn snapshots_of(
        &self,
        team: &str,
        sandbox: &str,
    ) -> Result<Vec<SnapshotRow>, StoreError> {
        let wrap = sql("look a paused sandbox up");
        let rows = sqlx::query(select!("WHERE team_id = $1 AND sandbox_id = $2 ORDER BY rowid DESC"))
            .bind(team)
            .bind(sandbox)
            .fetch_all(&self.pool)
            .await
            .map_err(&wrap)?;
        rows.iter().map(row).collect::<Result<_, _>>().map_err(wrap)
    }

    /// The newest build of a sandbox, whosever it is.
    pub(crate) async fn newest_snapshot(&self, sandbox: &str) -> Result<Option<SnapshotRow>, StoreError> {
        let wrap = sql("look a paused sandbox up");
        let found = sqlx::query(select!("WHERE sandbox_id = $1 ORDER BY rowid DESC LIMIT 1"))
            .bind(sandbox)
            .fetch_optional(&self.pool)
            .await
            .map_err(&wrap)?;
        found.as_ref().map(row).transpose().map_err(wrap)
    }

    /// The newest build of each sandbox of a team.
    pub(crate) async fn snapshots(&self, team: &str) -> Result<Vec<SnapshotRow>, StoreError> {
        let wrap = sql("list paused sandboxes");
        let rows = sqlx::query(select!(
            "WHERE team_id = $1 AND rowid IN (SELECT max(rowid) FROM snapshots GROUP BY sandbox_id)"
        ))
        .bind(team)
        .fetch_all(&self.pool)
        .await
        .map_err(&wrap)?;
        rows.iter().map(row).collect::<Result<_, _>>().map_err(wrap)
    }

    /// Pauses whose end nobody noted, since the daemon was ended meanwhile.
    pub(crate) async fn interrupted_pauses(&self) -> Result<Vec<SnapshotRow>, StoreError> {
        let wrap = sql("list interrupted pauses");
        let rows =
            sqlx::query(select!("WHERE status = 'pausing'")).fetch_all(&self.pool).await.map_err(&wrap)?;
        rows.iter().map(row).collect::<Result<_, _>>().map_err(wrap)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::stores;
    use super::*;

    #[tokio::test]
    async fn a_pause_is_noted_before_it_is_done() {
        for made in stores().await {
            let store = &made.store;
            let team = store.default_team().await.unwrap();
            let config = |sandbox: &str, build: &str| SandboxConfig {
                sandbox_id: sandbox.into(),
                build_id: build.into(),
                team_id: team.clone(),
                metadata: [("k".into(), "\u{17e}".into())].into(),
                ..Default::default()
            };
            let started = DateTime::from_timestamp(5, 0).unwrap();
            for (sandbox, build) in [("a", "1"), ("b", "2"), ("a", "3")] {
                store.begin_pause(&config(sandbox, build), started, build == "3").await.unwrap();
            }
            assert_eq!(store.interrupted_pauses().await.unwrap().len(), 3);
            store.finish_pause("1").await.unwrap();
            let of_a = store.snapshots_of(&team, "a").await.unwrap();
            let seen: Vec<_> = of_a.iter().map(|s| (s.build_id.as_str(), s.paused)).collect();
            assert_eq!(seen, [("3", false), ("1", true)]);
            assert!(of_a[0].filesystem_only && !of_a[1].filesystem_only);
            assert_eq!((&of_a[0].config, of_a[0].started_at), (&config("a", "3"), started));
            assert!(store.snapshots_of("another", "a").await.unwrap().is_empty());
            assert_eq!(store.newest_snapshot("a").await.unwrap().unwrap().build_id, "3");
            assert!(store.newest_snapshot("c").await.unwrap().is_none());
            let mut newest: Vec<_> =
                store.snapshots(&team).await.unwrap().into_iter().map(|s| s.build_id).collect();
            newest.sort();
            assert_eq!(newest, ["2", "3"]);
            store.forget_snapshot("3").await.unwrap();
            assert_eq!(store.snapshots_of(&team, "a").await.unwrap()[0].build_id, "1");
        }
    }
}
