//! Templates, their names and their builds.

use chrono::{DateTime, Utc};
use sqlx::AnyConnection;
use sqlx::Row;
use sqlx::any::AnyRow;

use super::{Store, StoreError, now, sql, time};

/// How a build stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BuildStatus {
    /// Asked for.
    Waiting,
    /// At work.
    Building,
    /// Can be used.
    Ready,
    /// Failed.
    Error,
}

impl BuildStatus {
    fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Building => "building",
            Self::Ready => "ready",
            Self::Error => "error",
        }
    }

    fn of(name: &str) -> Self {
        match name {
            "waiting" => Self::Waiting,
            "building" => Self::Building,
            "ready" => Self::Ready,
            _ => Self::Error,
        }
    }
}

/// A template.
#[derive(Debug, Clone)]
pub struct TemplateRow {
    pub id: String,
    pub team_id: String,
    pub public: bool,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
    pub spawn_count: i64,
    pub last_spawned_at: Option<DateTime<Utc>>,
    pub aliases: Vec<String>,
    /// The sandbox that it is a snapshot of; none for a template that was built.
    pub snapshot_of: Option<String>,
    /// Grows with every template.
    pub number: i64,
}

/// A build of one.
#[derive(Debug, Clone)]
pub struct BuildRow {
    pub id: String,
    pub template_id: String,
    pub status: BuildStatus,
    pub reason: Option<String>,
    pub cpu_count: i64,
    pub memory_mb: i64,
    pub disk_mb: i64,
    pub envd_version: String,
    pub kernel_version: String,
    pub vmm_version: String,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
    pub finished_at: Option<DateTime<Utc>>,
    /// The step that it failed in.
    pub failed_step: Option<String>,
    /// The build that has the state before that step.
    pub failed_layer: Option<String>,
}

const BUILD: &str = "SELECT id, template_id, status, reason, cpu_count, memory_mb, disk_mb, envd_version, \
    kernel_version, vmm_version, created_at, updated_at, finished_at, failed_step, failed_layer FROM builds";

fn build(r: &AnyRow) -> Result<BuildRow, sqlx::Error> {
    Ok(BuildRow {
        id: r.try_get(0)?,
        template_id: r.try_get(1)?,
        status: BuildStatus::of(&r.try_get::<String, _>(2)?),
        reason: r.try_get(3)?,
        cpu_count: r.try_get(4)?,
        memory_mb: r.try_get(5)?,
        disk_mb: r.try_get(6)?,
        envd_version: r.try_get(7)?,
        kernel_version: r.try_get(8)?,
        vmm_version: r.try_get(9)?,
        created_at: time(r.try_get(10)?),
        updated_at: time(r.try_get(11)?),
        finished_at: r.try_get::<Option<i64>, _>(12)?.map(time),
        failed_step: r.try_get(13)?,
        failed_layer: r.try_get(14)?,
    })
}

pub(super) fn template(r: &AnyRow) -> Result<TemplateRow, sqlx::Error> {
    let names: Option<String> = r.try_get(7)?;
    Ok(TemplateRow {
        id: r.try_get(0)?,
        team_id: r.try_get(1)?,
        public: r.try_get::<i64, _>(2)? != 0,
        created_at: time(r.try_get(3)?),
        updated_at: time(r.try_get(4)?),
        spawn_count: r.try_get(5)?,
        last_spawned_at: r.try_get::<Option<i64>, _>(6)?.map(time),
        aliases: names.unwrap_or_default().split(',').filter(|n| !n.is_empty()).map(str::to_owned).collect(),
        snapshot_of: r.try_get(8)?,
        number: r.try_get(9)?,
    })
}

macro_rules! template_query {
    ($where:literal) => {
        concat!(
            "SELECT t.id, t.team_id, t.public, t.created_at, t.updated_at, t.spawn_count, t.last_spawned_at, ",
            "(SELECT string_agg(alias, ',') FROM aliases a WHERE a.template_id = t.id), t.snapshot_of, t.rowid ",
            "FROM templates t ",
            $where
        )
    };
}

pub(super) use template_query;

/// The template of this name, or a new one.
pub(super) async fn find_or_add(
    tx: &mut AnyConnection,
    team: &str,
    name: Option<&str>,
    public: bool,
) -> Result<TemplateRow, StoreError> {
    let wrap = sql("add a template");
    let known: Option<String> = sqlx::query_scalar("SELECT template_id FROM aliases WHERE alias = $1")
        .bind(name)
        .fetch_optional(&mut *tx)
        .await
        .map_err(&wrap)?;
    let id = match known {
        Some(id) => id,
        None => {
            let id = crate::sandboxes::random_id(20).map_err(StoreError::Random)?;
            sqlx::query(
                "INSERT INTO templates (id, team_id, public, created_at, updated_at) VALUES ($1, $2, $3, $4, $5)",
            )
            .bind(&id)
            .bind(team)
            .bind(i64::from(public))
            .bind(now())
            .bind(now())
            .execute(&mut *tx)
            .await
            .map_err(&wrap)?;
            if let Some(name) = name {
                sqlx::query("INSERT INTO aliases (alias, template_id) VALUES ($1, $2)")
                    .bind(name)
                    .bind(&id)
                    .execute(&mut *tx)
                    .await
                    .map_err(&wrap)?;
            }
            id
        }
    };
    let row =
        sqlx::query(template_query!("WHERE t.id = $1")).bind(&id).fetch_one(&mut *tx).await.map_err(&wrap)?;
    template(&row).map_err(wrap)
}

impl Store {
    /// Adds a template, or finds the one of this name. The name's team must be the same.
    pub(crate) async fn put_template(
        &self,
        team: &str,
        name: &str,
        public: bool,
    ) -> Result<TemplateRow, StoreError> {
        let wrap = sql("add a template");
        let mut tx = self.write().await.map_err(&wrap)?;
        let found = find_or_add(&mut tx, team, Some(name), public).await?;
        tx.commit().await.map_err(&wrap)?;
        Ok(found)
    }

    /// A template by id or by name.
    pub(crate) async fn template(&self, id_or_name: &str) -> Result<Option<TemplateRow>, StoreError> {
        let wrap = sql("look a template up");
        let row = sqlx::query(template_query!(
            "WHERE t.id = $1 OR t.id = (SELECT template_id FROM aliases WHERE alias = $1)"
        ))
        .bind(id_or_name)
        .fetch_optional(&self.pool)
        .await
        .map_err(&wrap)?;
        row.as_ref().map(template).transpose().map_err(wrap)
    }

    /// A team's templates and the public ones, oldest first; without snapshots of sandboxes.
    pub(crate) async fn templates(&self, team: &str) -> Result<Vec<TemplateRow>, StoreError> {
        let wrap = sql("list the templates");
        let rows = sqlx::query(template_query!(
            "WHERE (t.team_id = $1 OR t.public <> 0) AND t.snapshot_of IS NULL ORDER BY t.created_at, t.id"
        ))
        .bind(team)
        .fetch_all(&self.pool)
        .await
        .map_err(&wrap)?;
        rows.iter().map(template).collect::<Result<_, _>>().map_err(wrap)
    }

    /// Deletes a template with its names and builds.
    pub(crate) async fn delete_template(&self, id: &str) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM templates WHERE id = $1")
            .bind(id)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("delete a template"))
    }

    /// One more sandbox was made of it.
    pub(crate) async fn count_spawn(&self, id: &str) -> Result<(), StoreError> {
        sqlx::query("UPDATE templates SET spawn_count = spawn_count + 1, last_spawned_at = $1 WHERE id = $2")
            .bind(now())
            .bind(id)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("count a sandbox"))
    }

    /// Adds a build that waits.
    pub(crate) async fn add_build(
        &self,
        id: &str,
        template: &str,
        cpu_count: i32,
        memory_mb: i32,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO builds (id, template_id, status, cpu_count, memory_mb, disk_mb, created_at, updated_at) \
             VALUES ($1, $2, 'waiting', $3, $4, 0, $5, $6)",
        )
        .bind(id)
        .bind(template)
        .bind(cpu_count)
        .bind(memory_mb)
        .bind(now())
        .bind(now())
        .execute(&self.pool)
        .await
        .map(drop)
        .map_err(sql("add a build"))
    }

    /// A build by id.
    pub(crate) async fn build(&self, id: &str) -> Result<Option<BuildRow>, StoreError> {
        let wrap = sql("look a build up");
        let query = sqlx::AssertSqlSafe(format!("{BUILD} WHERE id = $1"));
        let row = sqlx::query(query).bind(id).fetch_optional(&self.pool).await.map_err(&wrap)?;
        row.as_ref().map(build).transpose().map_err(wrap)
    }

    /// Builds of a template, newest first.
    pub(crate) async fn builds(&self, template: &str) -> Result<Vec<BuildRow>, StoreError> {
        let wrap = sql("list builds");
        let query = sqlx::AssertSqlSafe(format!(
            "{BUILD} WHERE template_id = $1 ORDER BY created_at DESC, rowid DESC"
        ));
        let rows = sqlx::query(query).bind(template).fetch_all(&self.pool).await.map_err(&wrap)?;
        rows.iter().map(build).collect::<Result<_, _>>().map_err(wrap)
    }

    /// All builds that something here refers to: templates (unless the build failed), paused sandboxes,
    /// and what is being made of sandboxes or is deleted once nobody needs it.
    pub(crate) async fn kept_builds(&self) -> Result<Vec<String>, StoreError> {
        // In one statement, since a build may go from one table to another.
        sqlx::query_scalar(
            "SELECT id FROM builds WHERE status != 'error' \
             UNION SELECT build_id FROM snapshots UNION SELECT build_id FROM checkpoints ORDER BY 1",
        )
        .fetch_all(&self.pool)
        .await
        .map_err(sql("list the builds that are kept"))
    }

    /// Builds that were at work when a daemon ended; they are not any more.
    pub(crate) async fn fail_interrupted_builds(&self) -> Result<(), StoreError> {
        sqlx::query(
            "UPDATE builds SET status = 'error', reason = 'nidus was stopped while it was built', \
             updated_at = $1, finished_at = $1 WHERE status = 'building'",
        )
        .bind(now())
        .execute(&self.pool)
        .await
        .map(drop)
        .map_err(sql("mark interrupted builds"))
    }

    /// Sets status and reason.
    pub(crate) async fn set_build(
        &self,
        id: &str,
        status: BuildStatus,
        reason: Option<&str>,
    ) -> Result<(), StoreError> {
        let finished = matches!(status, BuildStatus::Ready | BuildStatus::Error).then(now);
        sqlx::query(
            "UPDATE builds SET status = $1, reason = $2, updated_at = $3, finished_at = $4 WHERE id = $5",
        )
        .bind(status.name())
        .bind(reason)
        .bind(now())
        .bind(finished)
        .bind(id)
        .execute(&self.pool)
        .await
        .map(drop)
        .map_err(sql("change a build"))
    }

    /// Sets what a finished build is.
    pub(crate) async fn finish_build(
        &self,
        id: &str,
        disk_mb: i32,
        envd: &str,
        kernel: &str,
        vmm: &str,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "UPDATE builds SET disk_mb = $1, envd_version = $2, kernel_version = $3, vmm_version = $4, \
             status = 'ready', reason = NULL, updated_at = $5, finished_at = $5 WHERE id = $6",
        )
        .bind(disk_mb)
        .bind(envd)
        .bind(kernel)
        .bind(vmm)
        .bind(now())
        .bind(id)
        .execute(&self.pool)
        .await
        .map(drop)
        .map_err(sql("finish a build"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::stores;
    use super::*;

    #[tokio::test]
    async fn builds_are_kept_unless_they_failed() {
        for made in stores().await {
            let store = &made.store;
            let team = store.default_team().await.unwrap();
            let t = store.put_template(&team, "base", true).await.unwrap();
            for build in ["waiting", "building", "ready", "failed"] {
                store.add_build(build, &t.id, 1, 512).await.unwrap();
            }
            store.set_build("building", BuildStatus::Building, None).await.unwrap();
            store.finish_build("ready", 2048, "0.6", "6.1", "qemu").await.unwrap();
            store.set_build("failed", BuildStatus::Error, Some("why")).await.unwrap();
            let config = nidus_proto::node::SandboxConfig { build_id: "paused".into(), ..Default::default() };
            let config = nidus_proto::node::SandboxConfig { team_id: team, ..config };
            store.begin_pause(&config, Utc::now(), false).await.unwrap();
            store.note_checkpoint("checkpoint", &t.id).await.unwrap();
            let kept = store.kept_builds().await.unwrap();
            assert_eq!(kept, ["building", "checkpoint", "paused", "ready", "waiting"]);
            store.delete_template(&t.id).await.unwrap();
            assert_eq!(store.kept_builds().await.unwrap(), ["checkpoint", "paused"]);
        }
    }

    #[tokio::test]
    async fn a_templates_life() {
        for made in stores().await {
            let store = &made.store;
            let team = store.default_team().await.unwrap();
            let t = store.put_template(&team, "base", true).await.unwrap();
            assert_eq!(store.put_template(&team, "base", true).await.unwrap().id, t.id);
            assert_eq!(store.template("base").await.unwrap().unwrap().id, t.id);
            assert_eq!(store.template(&t.id).await.unwrap().unwrap().aliases, ["base"]);
            assert!(store.template("other").await.unwrap().is_none());
            store.add_build("b1", &t.id, 1, 512).await.unwrap();
            store.set_build("b1", BuildStatus::Building, None).await.unwrap();
            store.fail_interrupted_builds().await.unwrap();
            let b = store.build("b1").await.unwrap().unwrap();
            assert!(b.status == BuildStatus::Error && b.reason.is_some() && b.finished_at.is_some());
            store.add_build("b2", &t.id, 1, 512).await.unwrap();
            store.finish_build("b2", 2048, "0.6", "6.1", "qemu").await.unwrap();
            let builds = store.builds(&t.id).await.unwrap();
            assert_eq!(builds.iter().map(|b| b.id.as_str()).collect::<Vec<_>>(), ["b2", "b1"]);
            assert_eq!(
                (builds[0].status, builds[0].disk_mb, builds[0].vmm_version.as_str()),
                (BuildStatus::Ready, 2048, "qemu")
            );
            store.count_spawn(&t.id).await.unwrap();
            assert_eq!(store.templates(&team).await.unwrap()[0].spawn_count, 1);
            store.delete_template(&t.id).await.unwrap();
            assert!(
                store.template("base").await.unwrap().is_none() && store.build("b2").await.unwrap().is_none()
            );
        }
    }
}
