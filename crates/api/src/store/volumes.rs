//! Volumes: whose they are and what they are called. The node has their files.

use sqlx::Row;
use sqlx::any::AnyRow;
use uuid::Uuid;

use super::{Store, StoreError, is_unique, now, sql};

/// A volume as it is known.
#[derive(Debug, Clone)]
pub struct VolumeRow {
    pub id: String,
    pub team_id: String,
    pub name: String,
}

fn volume(r: &AnyRow) -> Result<VolumeRow, sqlx::Error> {
    Ok(VolumeRow { id: r.try_get(0)?, team_id: r.try_get(1)?, name: r.try_get(2)? })
}

impl Store {
    /// Notes a new volume; none when the team has one of this name.
    pub(crate) async fn add_volume(&self, team: &str, name: &str) -> Result<Option<VolumeRow>, StoreError> {
        let id = Uuid::new_v4().to_string();
        let added =
            sqlx::query("INSERT INTO volumes (id, team_id, name, created_at) VALUES ($1, $2, $3, $4)")
                .bind(&id)
                .bind(team)
                .bind(name)
                .bind(now())
                .execute(&self.pool)
                .await;
        match added {
            Ok(_) => Ok(Some(VolumeRow { id, team_id: team.to_owned(), name: name.to_owned() })),
            Err(e) if is_unique(&e) => Ok(None),
            Err(e) => Err(sql("add a volume")(e)),
        }
    }

    /// The volume of this id.
    pub(crate) async fn volume(&self, id: &str) -> Result<Option<VolumeRow>, StoreError> {
        let wrap = sql("look a volume up");
        let row = sqlx::query("SELECT id, team_id, name FROM volumes WHERE id = $1")
            .bind(id)
            .fetch_optional(&self.pool)
            .await
            .map_err(&wrap)?;
        row.as_ref().map(volume).transpose().map_err(wrap)
    }

    /// A team's volumes, oldest first.
    pub(crate) async fn volumes(&self, team: &str) -> Result<Vec<VolumeRow>, StoreError> {
        let wrap = sql("list the volumes");
        let rows =
            sqlx::query("SELECT id, team_id, name FROM volumes WHERE team_id = $1 ORDER BY created_at, id")
                .bind(team)
                .fetch_all(&self.pool)
                .await
                .map_err(&wrap)?;
        rows.iter().map(volume).collect::<Result<_, _>>().map_err(wrap)
    }

    /// Forgets a volume.
    pub(crate) async fn delete_volume(&self, id: &str) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM volumes WHERE id = $1")
            .bind(id)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(sql("delete a volume"))
    }
}
