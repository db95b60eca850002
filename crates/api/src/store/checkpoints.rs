//! Builds made of running sandboxes: those that nobody has yet or any more, and snapshots, which are
//! templates.

use nidus_proto::node::SandboxConfig;
use sqlx::Row;

use super::templates::{find_or_add, template, template_query};
use super::{Store, StoreError, TemplateRow, now, sql};

/// Which snapshots are listed.
#[derive(Debug, Default)]
pub struct SnapshotFilter {
    /// Of this sandbox.
    pub sandbox: Option<String>,
    /// Of this name or template id.
    pub name: Option<String>,
    /// Older than the template of this number.
    pub before: Option<i64>,
    /// At most so many.
    pub limit: i64,
}

impl Store {
    /// Notes a build that nobody has: one that is about to be made, or one that others still read.
    pub(crate) async fn note_checkpoint(&self, build: &str, template: &str) -> Result<(), StoreError> {
        sqlx::query("INSERT INTO checkpoints (build_id, template_id) VALUES ($1, $2) ON CONFLICT DO NOTHING")
            .bind(build)
            .bind(template)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("note a checkpoint"))
    }

    /// There is no such build, or no more.
    pub(crate) async fn forget_checkpoint(&self, build: &str) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM checkpoints WHERE build_id = $1")
            .bind(build)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("forget a checkpoint"))
    }

    /// Builds that nobody has, each with the template that it is recorded under; the newest first.
    pub(crate) async fn checkpoints(&self) -> Result<Vec<(String, String)>, StoreError> {
        let wrap = sql("list checkpoints");
        let rows = sqlx::query("SELECT build_id, template_id FROM checkpoints ORDER BY rowid DESC")
            .fetch_all(&self.pool)
            .await
            .map_err(&wrap)?;
        rows.iter().map(|r| Ok((r.try_get(0)?, r.try_get(1)?))).collect::<Result<_, _>>().map_err(wrap)
    }

    /// Makes a checkpoint the newest build of a template of its own, or of the snapshot of this name;
    /// none if another kind of template or another team has that name.
    pub(crate) async fn keep_checkpoint(
        &self,
        name: Option<&str>,
        config: &SandboxConfig,
    ) -> Result<Option<TemplateRow>, StoreError> {
        let wrap = sql("keep a snapshot");
        let mut tx = self.write().await.map_err(&wrap)?;
        let mut t = find_or_add(&mut tx, &config.team_id, name, false).await?;
        let builds: i64 = sqlx::query_scalar("SELECT count(*) FROM builds WHERE template_id = $1")
            .bind(&t.id)
            .fetch_one(&mut *tx)
            .await
            .map_err(&wrap)?;
        if t.team_id != config.team_id || (t.snapshot_of.is_none() && builds > 0) {
            return Ok(None);
        }
        sqlx::query("UPDATE templates SET snapshot_of = $1, updated_at = $2 WHERE id = $3")
            .bind(&config.sandbox_id)
            .bind(now())
            .bind(&t.id)
            .execute(&mut *tx)
            .await
            .map_err(&wrap)?;
        sqlx::query(
            "INSERT INTO builds (id, template_id, status, cpu_count, memory_mb, disk_mb, envd_version, \
             kernel_version, vmm_version, created_at, updated_at, finished_at) \
             VALUES ($1, $2, 'ready', $3, $4, $5, $6, $7, $8, $9, $9, $9)",
        )
        .bind(&config.build_id)
        .bind(&t.id)
        .bind(config.vcpu)
        .bind(config.ram_mb)
        .bind(config.total_disk_size_mb)
        .bind(&config.envd_version)
        .bind(&config.kernel_version)
        .bind(&config.firecracker_version)
        .bind(now())
        .execute(&mut *tx)
        .await
        .map_err(&wrap)?;
        sqlx::query("DELETE FROM checkpoints WHERE build_id = $1")
            .bind(&config.build_id)
            .execute(&mut *tx)
            .await
            .map_err(&wrap)?;
        tx.commit().await.map_err(&wrap)?;
        t.snapshot_of = Some(config.sandbox_id.clone());
        Ok(Some(t))
    }

    /// A team's snapshots, newest first.
    pub(crate) async fn snapshot_templates(
        &self,
        team: &str,
        filter: &SnapshotFilter,
    ) -> Result<Vec<TemplateRow>, StoreError> {
        let wrap = sql("list snapshots");
        let rows = sqlx::query(template_query!(
            "WHERE t.team_id = $1 AND t.snapshot_of IS NOT NULL AND (CAST($2 AS TEXT) IS NULL OR t.snapshot_of = $2) \
             AND (CAST($3 AS TEXT) IS NULL OR t.id = $3 OR t.id = (SELECT template_id FROM aliases WHERE alias = $3)) \
             AND (CAST($4 AS BIGINT) IS NULL OR t.rowid < $4) ORDER BY t.rowid DESC LIMIT $5"
        ))
        .bind(team)
        .bind(&filter.sandbox)
        .bind(&filter.name)
        .bind(filter.before)
        .bind(filter.limit)
        .fetch_all(&self.pool)
        .await
        .map_err(&wrap)?;
        rows.iter().map(template).collect::<Result<_, _>>().map_err(wrap)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::stores;
    use super::*;

    #[tokio::test]
    async fn a_checkpoint_becomes_a_build_of_a_snapshot() {
        for made in stores().await {
            let store = &made.store;
            let team = store.default_team().await.unwrap();
            let config = |build: &str, sandbox: &str| SandboxConfig {
                build_id: build.into(),
                sandbox_id: sandbox.into(),
                team_id: team.clone(),
                vcpu: 2,
                ram_mb: 512,
                firecracker_version: "qemu".into(),
                ..Default::default()
            };
            for build in ["1", "2", "3"] {
                store.note_checkpoint(build, "t").await.unwrap();
            }
            let alone = store.keep_checkpoint(None, &config("1", "a")).await.unwrap().unwrap();
            let named = store.keep_checkpoint(Some("n"), &config("2", "a")).await.unwrap().unwrap();
            assert_eq!(store.checkpoints().await.unwrap(), [("3".to_owned(), "t".to_owned())]);
            let again = store.keep_checkpoint(Some("n"), &config("3", "b")).await.unwrap().unwrap();
            assert_eq!((again.id.as_str(), again.snapshot_of.as_deref()), (named.id.as_str(), Some("b")));
            let built = store.put_template(&team, "built", false).await.unwrap();
            store.add_build("4", &built.id, 1, 512).await.unwrap();
            assert!(store.keep_checkpoint(Some("built"), &config("5", "b")).await.unwrap().is_none());
            store.delete_template(&built.id).await.unwrap();
            let builds = store.builds(&named.id).await.unwrap();
            assert_eq!(builds.iter().map(|b| b.id.as_str()).collect::<Vec<_>>(), ["3", "2"]);
            assert_eq!((builds[0].cpu_count, builds[0].vmm_version.as_str()), (2, "qemu"));
            assert!(store.templates(&team).await.unwrap().is_empty(), "snapshots are listed apart");
            let list = async |filter: SnapshotFilter| {
                let all = store.snapshot_templates(&team, &filter).await.unwrap();
                all.into_iter().map(|t| t.id).collect::<Vec<_>>()
            };
            let filter = || SnapshotFilter { limit: 9, ..Default::default() };
            assert_eq!(list(filter()).await, [named.id.clone(), alone.id.clone()]);
            assert_eq!(
                list(SnapshotFilter { sandbox: Some("a".into()), ..filter() }).await,
                std::slice::from_ref(&alone.id)
            );
            assert_eq!(
                list(SnapshotFilter { name: Some("n".into()), ..filter() }).await,
                std::slice::from_ref(&named.id)
            );
            assert_eq!(
                list(SnapshotFilter { before: Some(named.number), ..filter() }).await,
                std::slice::from_ref(&alone.id)
            );
            assert_eq!(list(SnapshotFilter { limit: 1, ..filter() }).await, std::slice::from_ref(&named.id));
        }
    }
}
