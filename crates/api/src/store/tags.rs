//! Tags of builds.

use chrono::{DateTime, Utc};
use sqlx::Row;

use super::{Store, StoreError, now, sql, time};

/// A tag of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagRow {
    pub tag: String,
    pub build_id: String,
    pub created_at: DateTime<Utc>,
}

/// A build that a tag stands for, or stood for.
#[derive(Debug, Clone)]
pub struct AssignmentRow {
    pub id: String,
    pub tag: String,
    pub build_id: String,
    pub assigned_at: DateTime<Utc>,
    pub build_created_at: DateTime<Utc>,
    pub build_finished_at: Option<DateTime<Utc>>,
}

impl Store {
    /// Gives a build these tags, which other builds of its template lose.
    pub(crate) async fn put_tags(
        &self,
        template: &str,
        build: &str,
        tags: &[String],
    ) -> Result<(), StoreError> {
        let wrap = sql("set tags");
        let mut tx = self.write().await.map_err(&wrap)?;
        let at = now();
        for tag in tags {
            sqlx::query(
                "INSERT INTO tags (template_id, tag, build_id, created_at) VALUES ($1, $2, $3, $4) \
                 ON CONFLICT (template_id, tag) DO UPDATE SET build_id = $3, created_at = $4",
            )
            .bind(template)
            .bind(tag)
            .bind(build)
            .bind(at)
            .execute(&mut *tx)
            .await
            .map_err(&wrap)?;
            sqlx::query(
                "INSERT INTO tag_assignments (id, template_id, tag, build_id, assigned_at) VALUES ($1, $2, $3, $4, $5)",
            )
            .bind(uuid::Uuid::new_v4().to_string())
            .bind(template)
            .bind(tag)
            .bind(build)
            .bind(at)
            .execute(&mut *tx)
            .await
            .map_err(&wrap)?;
        }
        tx.commit().await.map_err(wrap)
    }

    /// What the tags of a template stood for, newest first; only of those that it still has.
    pub(crate) async fn assignments(&self, template: &str) -> Result<Vec<AssignmentRow>, StoreError> {
        let wrap = sql("list what tags stood for");
        let rows = sqlx::query(
            "SELECT a.id, a.tag, a.build_id, a.assigned_at, b.created_at, b.finished_at FROM tag_assignments a \
             JOIN builds b ON b.id = a.build_id JOIN tags t ON t.template_id = a.template_id AND t.tag = a.tag \
             WHERE a.template_id = $1 ORDER BY a.assigned_at DESC, a.rowid DESC",
        )
        .bind(template)
        .fetch_all(&self.pool)
        .await
        .map_err(&wrap)?;
        let row = |r: &sqlx::any::AnyRow| {
            Ok(AssignmentRow {
                id: r.try_get(0)?,
                tag: r.try_get(1)?,
                build_id: r.try_get(2)?,
                assigned_at: time(r.try_get(3)?),
                build_created_at: time(r.try_get(4)?),
                build_finished_at: r.try_get::<Option<i64>, _>(5)?.map(time),
            })
        };
        rows.iter().map(row).collect::<Result<_, _>>().map_err(wrap)
    }

    /// Takes tags away; those that there are not do not matter.
    pub(crate) async fn remove_tags(&self, template: &str, tags: &[String]) -> Result<(), StoreError> {
        for tag in tags {
            for query in [
                "DELETE FROM tags WHERE template_id = $1 AND tag = $2",
                "DELETE FROM tag_assignments WHERE template_id = $1 AND tag = $2",
            ] {
                sqlx::query(query)
                    .bind(template)
                    .bind(tag)
                    .execute(&self.pool)
                    .await
                    .map_err(sql("remove a tag"))?;
            }
        }
        Ok(())
    }

    /// The tags of a template, those that were set last at the front.
    pub(crate) async fn tags(&self, template: &str) -> Result<Vec<TagRow>, StoreError> {
        let wrap = sql("list tags");
        let rows = sqlx::query(
            "SELECT tag, build_id, created_at FROM tags WHERE template_id = $1 ORDER BY created_at DESC, tag",
        )
        .bind(template)
        .fetch_all(&self.pool)
        .await
        .map_err(&wrap)?;
        let row = |r: &sqlx::any::AnyRow| {
            Ok(TagRow { tag: r.try_get(0)?, build_id: r.try_get(1)?, created_at: time(r.try_get(2)?) })
        };
        rows.iter().map(row).collect::<Result<_, _>>().map_err(wrap)
    }

    /// Sets the tags that a build gets when it is ready.
    pub(crate) async fn want_tags(&self, build: &str, tags: &[String]) -> Result<(), StoreError> {
        sqlx::query("UPDATE builds SET wanted_tags = $1 WHERE id = $2")
            .bind(tags.join(","))
            .bind(build)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("note tags"))
    }

    /// The tags that a build gets when it is ready.
    pub(crate) async fn wanted_tags(&self, build: &str) -> Result<Vec<String>, StoreError> {
        let text: Option<String> = sqlx::query_scalar("SELECT wanted_tags FROM builds WHERE id = $1")
            .bind(build)
            .fetch_optional(&self.pool)
            .await
            .map_err(sql("look tags up"))?;
        Ok(text.unwrap_or_default().split(',').filter(|t| !t.is_empty()).map(str::to_owned).collect())
    }

    /// Notes where a build failed, and what was there before.
    pub(crate) async fn set_failure(
        &self,
        build: &str,
        step: Option<&str>,
        layer: Option<&str>,
    ) -> Result<(), StoreError> {
        sqlx::query("UPDATE builds SET failed_step = $1, failed_layer = $2 WHERE id = $3")
            .bind(step)
            .bind(layer)
            .bind(build)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("note a failure"))
    }

    /// Sets the sizes of a build; 0 is as it turns out.
    pub(crate) async fn set_sizes(
        &self,
        build: &str,
        cpu: i64,
        memory_mb: i64,
        disk_mb: i64,
    ) -> Result<(), StoreError> {
        sqlx::query("UPDATE builds SET cpu_count = $1, memory_mb = $2, disk_mb = $3 WHERE id = $4")
            .bind(cpu)
            .bind(memory_mb)
            .bind(disk_mb)
            .bind(build)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("set a build's sizes"))
    }

    /// Sets whether others may use a template.
    pub(crate) async fn set_public(&self, template: &str, public: bool) -> Result<(), StoreError> {
        sqlx::query("UPDATE templates SET public = $1, updated_at = $2 WHERE id = $3")
            .bind(i64::from(public))
            .bind(now())
            .bind(template)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("change a template"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::stores;
    use super::*;

    #[tokio::test]
    async fn a_tag_belongs_to_one_build() {
        for made in stores().await {
            let store = &made.store;
            let team = store.default_team().await.unwrap();
            let t = store.put_template(&team, "t", false).await.unwrap();
            for build in ["a", "b"] {
                store.add_build(build, &t.id, 1, 512).await.unwrap();
            }
            let tags = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
            store.put_tags(&t.id, "a", &tags(&["default", "v1"])).await.unwrap();
            store.put_tags(&t.id, "b", &tags(&["default"])).await.unwrap();
            let of = |rows: Vec<TagRow>| {
                let mut all: Vec<_> = rows.into_iter().map(|r| (r.tag, r.build_id)).collect();
                all.sort();
                all
            };
            let pair = |t: &str, b: &str| (t.to_owned(), b.to_owned());
            assert_eq!(of(store.tags(&t.id).await.unwrap()), [pair("default", "b"), pair("v1", "a")]);
            let stood: Vec<_> = store.assignments(&t.id).await.unwrap();
            let stood: Vec<_> = stood.into_iter().map(|a| (a.tag, a.build_id)).collect();
            assert_eq!(stood, [pair("default", "b"), pair("v1", "a"), pair("default", "a")]);
            store.remove_tags(&t.id, &tags(&["v1", "none"])).await.unwrap();
            assert_eq!(store.assignments(&t.id).await.unwrap().len(), 2);
            assert_eq!(of(store.tags(&t.id).await.unwrap()), [pair("default", "b")]);
            store.want_tags("a", &tags(&["x", "y"])).await.unwrap();
            assert_eq!(store.wanted_tags("a").await.unwrap(), ["x", "y"]);
            assert!(store.wanted_tags("b").await.unwrap().is_empty());
            store.set_failure("a", Some("2"), Some("l")).await.unwrap();
            let a = store.build("a").await.unwrap().unwrap();
            assert_eq!((a.failed_step.as_deref(), a.failed_layer.as_deref()), (Some("2"), Some("l")));
        }
    }
}
