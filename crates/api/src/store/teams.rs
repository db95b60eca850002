//! Teams and what they may do.

use chrono::{DateTime, Utc};
use sqlx::Row;
use sqlx::any::AnyRow;
use uuid::Uuid;

use super::{Store, StoreError, now, sql, time};

/// A team as it is kept.
#[derive(Debug, Clone)]
pub struct TeamRow {
    /// Id.
    pub id: String,
    /// What it is called.
    pub name: String,
    /// Sandboxes that it may run at once; 0 is without a limit.
    pub max_sandboxes: i64,
    /// Why it may do nothing at all, if that is so.
    pub blocked: Option<String>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// The columns of [`team`], of a table that is called `t`.
pub(super) const TEAM: &str = "t.id, t.name, t.max_sandboxes, t.blocked, t.created_at";

/// From the columns [`TEAM`], the first of which is this one.
pub(super) fn team(r: &AnyRow, first: usize) -> Result<TeamRow, sqlx::Error> {
    Ok(TeamRow {
        id: r.try_get(first)?,
        name: r.try_get(first + 1)?,
        max_sandboxes: r.try_get(first + 2)?,
        blocked: r.try_get(first + 3)?,
        created_at: time(r.try_get(first + 4)?),
    })
}

impl Store {
    /// Makes a team.
    pub async fn create_team(&self, name: &str) -> Result<TeamRow, StoreError> {
        let id = Uuid::new_v4().to_string();
        let at = now();
        sqlx::query("INSERT INTO teams (id, name, created_at) VALUES ($1, $2, $3)")
            .bind(&id)
            .bind(name)
            .bind(at)
            .execute(&self.pool)
            .await
            .map_err(sql("add a team"))?;
        Ok(TeamRow { id, name: name.to_owned(), max_sandboxes: 0, blocked: None, created_at: time(at) })
    }

    /// All teams, oldest first.
    pub async fn teams(&self) -> Result<Vec<TeamRow>, StoreError> {
        let wrap = sql("list the teams");
        let query = sqlx::AssertSqlSafe(format!("SELECT {TEAM} FROM teams t ORDER BY t.created_at, t.id"));
        let rows = sqlx::query(query).fetch_all(&self.pool).await.map_err(&wrap)?;
        rows.iter().map(|r| team(r, 0)).collect::<Result<_, _>>().map_err(wrap)
    }

    /// One team by its id.
    pub(crate) async fn team_of_id(&self, id: &str) -> Result<Option<TeamRow>, StoreError> {
        let wrap = sql("look a team up");
        let query = sqlx::AssertSqlSafe(format!("SELECT {TEAM} FROM teams t WHERE t.id = $1"));
        let row = sqlx::query(query).bind(id).fetch_optional(&self.pool).await.map_err(&wrap)?;
        row.map(|r| team(&r, 0)).transpose().map_err(wrap)
    }

    /// One team, by its id, or by its name if only one has that.
    pub async fn team(&self, id_or_name: &str) -> Result<Option<TeamRow>, StoreError> {
        if let Some(team) = self.team_of_id(id_or_name).await? {
            return Ok(Some(team));
        }
        let mut all = self.teams().await?;
        all.retain(|t| t.name == id_or_name);
        Ok(if all.len() == 1 { all.pop() } else { None })
    }

    /// Sets how many sandboxes a team may run at once (0 is without a limit).
    pub async fn limit_team(&self, id: &str, max_sandboxes: i64) -> Result<(), StoreError> {
        sqlx::query("UPDATE teams SET max_sandboxes = $1 WHERE id = $2")
            .bind(max_sandboxes)
            .bind(id)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("limit a team"))
    }

    /// Shuts a team out, for the reason given, or lets it in again.
    pub async fn block_team(&self, id: &str, reason: Option<&str>) -> Result<(), StoreError> {
        sqlx::query("UPDATE teams SET blocked = $1 WHERE id = $2")
            .bind(reason)
            .bind(id)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("block a team"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::stores;

    #[tokio::test]
    async fn teams_are_found_limited_and_blocked() {
        for made in stores().await {
            let store = &made.store;
            let t = store.create_team("second").await.unwrap();
            assert_eq!(store.teams().await.unwrap().len(), 2);
            assert_eq!(store.team("second").await.unwrap().unwrap().id, t.id);
            assert_eq!(store.team(&t.id).await.unwrap().unwrap().name, "second");
            store.create_team("second").await.unwrap();
            assert!(store.team("second").await.unwrap().is_none(), "which of the two?");
            store.limit_team(&t.id, 3).await.unwrap();
            store.block_team(&t.id, Some("unpaid")).await.unwrap();
            let known = store.team(&t.id).await.unwrap().unwrap();
            assert_eq!((known.max_sandboxes, known.blocked.as_deref()), (3, Some("unpaid")));
            let key = store.create_key(&t.id, "k").await.unwrap();
            let by_key = store.team_of_key(&key.key).await.unwrap().unwrap();
            assert_eq!((by_key.id, by_key.blocked.as_deref()), (t.id.clone(), Some("unpaid")));
            store.block_team(&t.id, None).await.unwrap();
            assert!(store.team(&t.id).await.unwrap().unwrap().blocked.is_none());
        }
    }
}
