//! API keys.

use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use sqlx::Row;
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::{Store, StoreError, now, sql, time};

/// Form that older SDKs insist on: this and 40 hexadecimal digits.
const PREFIX: &str = "e2b_";
/// `last_used` is not written more often than this.
const USED_STEP_MS: i64 = 60_000;

/// A key at the only time that it is seen.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// Id, for lists and deletion.
    pub id: Uuid,
    /// The key.
    pub key: String,
}

/// A key as it is kept.
#[derive(Debug, Clone)]
pub struct ApiKey {
    /// Id.
    pub id: Uuid,
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

impl Store {
    /// Makes a key of the default team.
    pub async fn create_key(&self, name: &str) -> Result<NewKey, StoreError> {
        let mut bytes = [0u8; 20];
        getrandom::fill(&mut bytes).map_err(|e| StoreError::Random(e.to_string()))?;
        let digits: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let new = NewKey { id: Uuid::new_v4(), key: format!("{PREFIX}{digits}") };
        sqlx::query(
            "INSERT INTO api_keys (id, team_id, name, hash, mask, created_at) VALUES (?, ?, ?, ?, ?, ?)",
        )
        .bind(new.id.to_string())
        .bind(self.default_team().await?)
        .bind(name)
        .bind(hash(&new.key))
        .bind(format!("{PREFIX}{}...{}", &digits[..4], &digits[36..]))
        .bind(now())
        .execute(&self.pool)
        .await
        .map_err(sql("add a key"))?;
        Ok(new)
    }

    /// All keys, oldest first.
    pub async fn list_keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        let wrap = sql("list the keys");
        let rows =
            sqlx::query("SELECT id, name, mask, created_at, last_used FROM api_keys ORDER BY created_at, id")
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
                })
            })
            .collect::<Result<_, _>>()
            .map_err(wrap)
    }

    /// Deletes a key; false when there is none of this id.
    pub async fn delete_key(&self, id: Uuid) -> Result<bool, StoreError> {
        sqlx::query("DELETE FROM api_keys WHERE id = ?")
            .bind(id.to_string())
            .execute(&self.pool)
            .await
            .map(|r| r.rows_affected() > 0)
            .map_err(sql("delete a key"))
    }

    /// Id and name of the team that a key belongs to.
    pub(crate) async fn team_of_key(&self, key: &str) -> Result<Option<(String, String)>, StoreError> {
        let wrap = sql("look a key up");
        let wanted = hash(key);
        let row = sqlx::query(
            "SELECT k.hash, t.id, t.name, k.last_used FROM api_keys k JOIN teams t ON t.id = k.team_id WHERE k.hash = ?",
        )
        .bind(&wanted)
        .fetch_optional(&self.pool)
        .await
        .map_err(&wrap)?;
        let Some(row) = row else { return Ok(None) };
        let found: Vec<u8> = row.try_get(0).map_err(&wrap)?;
        if !bool::from(found.ct_eq(&wanted)) {
            return Ok(None);
        }
        let team = (row.try_get(1).map_err(&wrap)?, row.try_get(2).map_err(&wrap)?);
        let last: Option<i64> = row.try_get(3).map_err(&wrap)?;
        if last.is_none_or(|l| now() - l > USED_STEP_MS) {
            sqlx::query("UPDATE api_keys SET last_used = ? WHERE hash = ?")
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
    use super::*;

    #[tokio::test]
    async fn keys_come_are_known_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).await.unwrap();
        let key = store.create_key("mine").await.unwrap();
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
}
