//! Secrets, as they are kept: sealed.

use chrono::{DateTime, Utc};
use sqlx::Row;
use sqlx::any::AnyRow;
use uuid::Uuid;

use super::{Store, StoreError, is_unique, now, sql, time};

/// A secret without its value.
#[derive(Debug, Clone)]
pub struct SecretRow {
    pub id: String,
    pub name: String,
    pub version: i64,
    /// A JSON object of texts.
    pub metadata: String,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

const SECRET: &str = "SELECT id, name, version, metadata, created_at, updated_at FROM secrets";

fn secret(r: &AnyRow) -> Result<SecretRow, sqlx::Error> {
    Ok(SecretRow {
        id: r.try_get(0)?,
        name: r.try_get(1)?,
        version: r.try_get(2)?,
        metadata: r.try_get(3)?,
        created_at: time(r.try_get(4)?),
        updated_at: time(r.try_get(5)?),
    })
}

impl Store {
    /// Keeps a new secret; none when the team has one of this name.
    pub(crate) async fn add_secret(
        &self,
        team: &str,
        name: &str,
        sealed: &[u8],
        metadata: &str,
    ) -> Result<Option<SecretRow>, StoreError> {
        let id = format!("sec_{}", Uuid::new_v4().simple());
        let at = now();
        let added = sqlx::query(
            "INSERT INTO secrets (id, team_id, name, version, sealed, metadata, created_at, updated_at) \
             VALUES ($1, $2, $3, 1, $4, $5, $6, $7)",
        )
        .bind(&id)
        .bind(team)
        .bind(name)
        .bind(sealed)
        .bind(metadata)
        .bind(at)
        .bind(at)
        .execute(&self.pool)
        .await;
        match added {
            Ok(_) => self.secret(team, &id).await,
            Err(e) if is_unique(&e) => Ok(None),
            Err(e) => Err(sql("add a secret")(e)),
        }
    }

    /// A team's secret, by its id or name.
    pub(crate) async fn secret(&self, team: &str, id_or_name: &str) -> Result<Option<SecretRow>, StoreError> {
        let wrap = sql("look a secret up");
        let query = sqlx::AssertSqlSafe(format!(
            "{SECRET} WHERE team_id = $1 AND (id = $2 OR name = $2) ORDER BY id = $2 DESC LIMIT 1"
        ));
        let row =
            sqlx::query(query).bind(team).bind(id_or_name).fetch_optional(&self.pool).await.map_err(&wrap)?;
        row.as_ref().map(secret).transpose().map_err(wrap)
    }

    /// A team's secrets of names after this one, so many at most, by name.
    pub(crate) async fn secrets(
        &self,
        team: &str,
        after: &str,
        limit: i64,
    ) -> Result<Vec<SecretRow>, StoreError> {
        let wrap = sql("list the secrets");
        let query =
            sqlx::AssertSqlSafe(format!("{SECRET} WHERE team_id = $1 AND name > $2 ORDER BY name LIMIT $3"));
        let rows = sqlx::query(query)
            .bind(team)
            .bind(after)
            .bind(limit)
            .fetch_all(&self.pool)
            .await
            .map_err(&wrap)?;
        rows.iter().map(secret).collect::<Result<_, _>>().map_err(wrap)
    }

    /// The sealed value of a team's secret of this name.
    pub(crate) async fn sealed(&self, team: &str, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        sqlx::query_scalar("SELECT sealed FROM secrets WHERE team_id = $1 AND name = $2")
            .bind(team)
            .bind(name)
            .fetch_optional(&self.pool)
            .await
            .map_err(sql("read a secret"))
    }

    /// Gives a secret its next value; without `metadata` that stays.
    pub(crate) async fn update_secret(
        &self,
        id: &str,
        sealed: &[u8],
        metadata: Option<&str>,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "UPDATE secrets SET sealed = $1, metadata = coalesce($2, metadata), version = version + 1, updated_at = $3 \
             WHERE id = $4",
        )
        .bind(sealed)
        .bind(metadata)
        .bind(now())
        .bind(id)
        .execute(&self.pool)
        .await
        .map(drop)
        .map_err(sql("update a secret"))
    }

    /// Deletes a secret.
    pub(crate) async fn delete_secret(&self, id: &str) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM secrets WHERE id = $1")
            .bind(id)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("delete a secret"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::stores;
    use super::*;

    #[tokio::test]
    async fn secrets_have_versions_and_belong_to_a_team() {
        for made in stores().await {
            let store = &made.store;
            let team = store.default_team().await.unwrap();
            let other = store.create_team("other").await.unwrap().id;
            let s = store.add_secret(&team, "a", b"1", "{}").await.unwrap().unwrap();
            assert_eq!(s.version, 1);
            assert!(store.add_secret(&team, "a", b"2", "{}").await.unwrap().is_none());
            assert!(store.add_secret(&other, "a", b"3", "{}").await.unwrap().is_some());
            store.update_secret(&s.id, b"4", Some("{\"x\":\"y\"}")).await.unwrap();
            store.update_secret(&s.id, b"5", None).await.unwrap();
            let now = store.secret(&team, "a").await.unwrap().unwrap();
            assert_eq!((now.version, now.metadata.as_str(), &now.id), (3, "{\"x\":\"y\"}", &s.id));
            assert_eq!(store.sealed(&team, "a").await.unwrap().unwrap(), b"5");
            assert!(store.secret(&other, &s.id).await.unwrap().is_none());
            store.add_secret(&team, "b", b"", "{}").await.unwrap();
            let names = |rows: Vec<SecretRow>| rows.into_iter().map(|r| r.name).collect::<Vec<_>>();
            assert_eq!(names(store.secrets(&team, "", 1).await.unwrap()), ["a"]);
            assert_eq!(names(store.secrets(&team, "a", 9).await.unwrap()), ["b"]);
            store.delete_secret(&s.id).await.unwrap();
            assert!(store.secret(&team, "a").await.unwrap().is_none());
        }
    }
}
