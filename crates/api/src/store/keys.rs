//! API keys and access tokens.

use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use sqlx::Row;
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::teams::{TEAM, TeamRow, team};
use super::{Store, StoreError, now, sql, time};

/// Form that older SDKs insist on: this and 40 hexadecimal digits.
const PREFIX: &str = "e2b_";
/// And the one of access tokens.
const TOKEN_PREFIX: &str = "sk_e2b_";
/// `last_used` is not written more often than this.
const USED_STEP_MS: i64 = 60_000;

/// A key, or an access token, at the only time that it is seen.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// Id, for lists and deletion.
    pub id: Uuid,
    /// The key.
    pub key: String,
    /// Its first and last characters.
    pub mask: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// A key as it is kept.
#[derive(Debug, Clone)]
pub struct ApiKey {
    /// Id.
    pub id: Uuid,
    /// The team that it acts for.
    pub team_id: String,
    /// What it is called.
    pub name: String,
    /// Its first and last characters.
    pub mask: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it was used last, to the minute.
    pub last_used: Option<DateTime<Utc>>,
}

fn hash(key: &str) -> Vec<u8> {
    Sha256::digest(key.as_bytes()).to_vec()
}

/// A new key of this form.
fn new_key(prefix: &str) -> Result<NewKey, StoreError> {
    let mut bytes = [0u8; 20];
    getrandom::fill(&mut bytes).map_err(|e| StoreError::Random(e.to_string()))?;
    let digits: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    Ok(NewKey {
        id: Uuid::new_v4(),
        key: format!("{prefix}{digits}"),
        mask: format!("{prefix}{}...{}", &digits[..4], &digits[36..]),
        created_at: time(now()),
    })
}

impl Store {
    /// Makes a key of a team.
    pub async fn create_key(&self, team: &str, name: &str) -> Result<NewKey, StoreError> {
        let insert = "INSERT INTO api_keys (id, team_id, name, hash, mask, created_at) VALUES ($1, $2, $3, $4, $5, $6)";
        self.add_key(insert, new_key(PREFIX)?, team, name).await
    }

    /// Makes an access token of a team: it manages the team's keys.
    pub async fn create_token(&self, team: &str, name: &str) -> Result<NewKey, StoreError> {
        let insert = "INSERT INTO access_tokens (id, team_id, name, hash, mask, created_at) VALUES ($1, $2, $3, $4, $5, $6)";
        self.add_key(insert, new_key(TOKEN_PREFIX)?, team, name).await
    }

    async fn add_key(
        &self,
        insert: &'static str,
        new: NewKey,
        team: &str,
        name: &str,
    ) -> Result<NewKey, StoreError> {
        sqlx::query(insert)
            .bind(new.id.to_string())
            .bind(team)
            .bind(name)
            .bind(hash(&new.key))
            .bind(&new.mask)
            .bind(new.created_at.timestamp_millis())
            .execute(&self.pool)
            .await
            .map_err(sql("add a key"))?;
        Ok(new)
    }

    /// Deletes an access token of a team; false when it has none of this id.
    pub async fn delete_token(&self, team: &str, id: Uuid) -> Result<bool, StoreError> {
        sqlx::query("DELETE FROM access_tokens WHERE id = $1 AND team_id = $2")
            .bind(id.to_string())
            .bind(team)
            .execute(&self.pool)
            .await
            .map(|r| r.rows_affected() > 0)
            .map_err(sql("delete an access token"))
    }

    /// The team that an access token manages.
    pub(crate) async fn team_of_token(&self, token: &str) -> Result<Option<TeamRow>, StoreError> {
        let wrap = sql("look an access token up");
        let wanted = hash(token);
        let query = sqlx::AssertSqlSafe(format!(
            "SELECT k.hash, {TEAM} FROM access_tokens k JOIN teams t ON t.id = k.team_id WHERE k.hash = $1"
        ));
        let row = sqlx::query(query).bind(&wanted).fetch_optional(&self.pool).await.map_err(&wrap)?;
        let Some(row) = row else { return Ok(None) };
        let found: Vec<u8> = row.try_get(0).map_err(&wrap)?;
        if !bool::from(found.ct_eq(&wanted)) {
            return Ok(None);
        }
        team(&row, 1).map(Some).map_err(wrap)
    }

    /// Calls a team's key something else; false when it has none of this id.
    pub async fn rename_key(&self, team: &str, id: Uuid, name: &str) -> Result<bool, StoreError> {
        sqlx::query("UPDATE api_keys SET name = $1 WHERE id = $2 AND team_id = $3")
            .bind(name)
            .bind(id.to_string())
            .bind(team)
            .execute(&self.pool)
            .await
            .map(|r| r.rows_affected() > 0)
            .map_err(sql("rename a key"))
    }

    /// Deletes a team's key; false when it has none of this id.
    pub async fn delete_key_of(&self, team: &str, id: Uuid) -> Result<bool, StoreError> {
        sqlx::query("DELETE FROM api_keys WHERE id = $1 AND team_id = $2")
            .bind(id.to_string())
            .bind(team)
            .execute(&self.pool)
            .await
            .map(|r| r.rows_affected() > 0)
            .map_err(sql("delete a key"))
    }

    /// All keys, oldest first.
    pub async fn list_keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        let wrap = sql("list the keys");
        let rows = sqlx::query(
            "SELECT id, name, mask, created_at, last_used, team_id FROM api_keys ORDER BY created_at, id",
        )
        .fetch_all(&self.pool)
        .await
        .map_err(&wrap)?;
        rows.iter()
            .map(|r| {
                Ok(ApiKey {
                    id: r.try_get::<String, _>(0)?.parse().unwrap_or_default(),
                    name: r.try_get(1)?,
                    mask: r.try_get(2)?,
                    created_at: time(r.try_get(3)?),
                    last_used: r.try_get::<Option<i64>, _>(4)?.map(time),
                    team_id: r.try_get(5)?,
                })
            })
            .collect::<Result<_, _>>()
            .map_err(wrap)
    }

    /// Deletes a key; false when there is none of this id.
    pub async fn delete_key(&self, id: Uuid) -> Result<bool, StoreError> {
        sqlx::query("DELETE FROM api_keys WHERE id = $1")
            .bind(id.to_string())
            .execute(&self.pool)
            .await
            .map(|r| r.rows_affected() > 0)
            .map_err(sql("delete a key"))
    }

    /// The team that a key acts for.
    pub(crate) async fn team_of_key(&self, key: &str) -> Result<Option<TeamRow>, StoreError> {
        let wrap = sql("look a key up");
        let wanted = hash(key);
        let row = sqlx::query(sqlx::AssertSqlSafe(format!(
            "SELECT k.hash, k.last_used, {TEAM} FROM api_keys k JOIN teams t ON t.id = k.team_id WHERE k.hash = $1"
        )))
        .bind(&wanted)
        .fetch_optional(&self.pool)
        .await
        .map_err(&wrap)?;
        let Some(row) = row else { return Ok(None) };
        let found: Vec<u8> = row.try_get(0).map_err(&wrap)?;
        if !bool::from(found.ct_eq(&wanted)) {
            return Ok(None);
        }
        let team = team(&row, 2).map_err(&wrap)?;
        let last: Option<i64> = row.try_get(1).map_err(&wrap)?;
        if last.is_none_or(|l| now() - l > USED_STEP_MS) {
            sqlx::query("UPDATE api_keys SET last_used = $1 WHERE hash = $2")
                .bind(now())
                .bind(&wanted)
                .execute(&self.pool)
                .await
                .map_err(wrap)?;
        }
        Ok(Some(team))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::stores;
    use super::*;

    #[tokio::test]
    async fn keys_come_are_known_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).await.unwrap();
        let team = store.default_team().await.unwrap();
        let key = store.create_key(&team, "mine").await.unwrap();
        assert!(key.key.len() == 44 && key.key[4..].bytes().all(|b| b.is_ascii_hexdigit()));
        assert!(store.team_of_key(&key.key).await.unwrap().is_some());
        assert!(store.team_of_key("e2b_0000000000000000000000000000000000000000").await.unwrap().is_none());
        let listed = store.list_keys().await.unwrap();
        assert_eq!((listed.len(), listed[0].name.as_str()), (1, "mine"));
        assert!(listed[0].last_used.is_some() && !listed[0].mask.contains(&key.key[8..40]));
        // The file holds no key that could be taken out of it.
        let raw = std::fs::read(dir.path().join("db")).unwrap();
        assert!(!raw.windows(44).any(|w| w == key.key.as_bytes()));
        assert!(store.delete_key(key.id).await.unwrap());
        assert!(!store.delete_key(key.id).await.unwrap());
        assert!(store.team_of_key(&key.key).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn keys_and_tokens_are_their_teams() {
        for made in stores().await {
            let store = &made.store;
            let team = store.default_team().await.unwrap();
            let other = store.create_team("other").await.unwrap().id;
            let key = store.create_key(&team, "a").await.unwrap();
            let token = store.create_token(&team, "t").await.unwrap();
            assert!(token.key.len() == 47 && token.key.starts_with("sk_e2b_"));
            assert_eq!(store.team_of_token(&token.key).await.unwrap().unwrap().id, team);
            // Neither is good for what the other is for.
            assert!(store.team_of_token(&key.key).await.unwrap().is_none());
            assert!(store.team_of_key(&token.key).await.unwrap().is_none());
            assert!(!store.rename_key(&other, key.id, "b").await.unwrap());
            assert!(!store.delete_key_of(&other, key.id).await.unwrap());
            assert!(!store.delete_token(&other, token.id).await.unwrap());
            assert!(store.rename_key(&team, key.id, "b").await.unwrap());
            assert_eq!(store.list_keys().await.unwrap()[0].name, "b");
            assert!(store.delete_token(&team, token.id).await.unwrap());
            assert!(store.team_of_token(&token.key).await.unwrap().is_none());
        }
    }
}
