//! `nidus key`: works with and without a running daemon.

use std::process::ExitCode;

use anyhow::bail;
use clap::Subcommand;
use serde_json::json;
use uuid::Uuid;

use crate::client;
use crate::config::Config;
use crate::output::{Output, relative};

/// API keys.
#[derive(Debug, Subcommand)]
pub enum Key {
    /// Make a key and print it, alone; it is shown this once
    Create {
        /// What to call it
        #[arg(long, default_value = "key")]
        name: String,
        /// The team that it acts for, by name or id; by default the first
        #[arg(long)]
        team: Option<String>,
    },
    /// List the keys
    List,
    /// Delete a key
    Delete {
        /// Its id, as the list shows it
        id: Uuid,
    },
}

pub async fn run(command: Key, config: &Config, out: Output) -> anyhow::Result<ExitCode> {
    let store = client::store(config).await?;
    match command {
        Key::Create { name, team } => {
            let team = match team {
                Some(team) => super::team::find(&store, &team).await?.id,
                None => store.default_team().await?,
            };
            let new = store.create_key(&team, &name).await?;
            if out.json {
                out.value(&json!({ "id": new.id, "name": name, "key": new.key }))?;
            } else {
                println!("{}", new.key);
            }
        }
        Key::List => {
            let keys = store.list_keys().await?;
            if out.json {
                let list: Vec<_> = keys
                    .iter()
                    .map(|k| {
                        json!({ "id": k.id, "teamID": k.team_id, "name": k.name, "mask": k.mask,
                                "createdAt": k.created_at, "lastUsed": k.last_used })
                    })
                    .collect();
                out.value(&list)?;
            } else {
                let rows = keys
                    .iter()
                    .map(|k| {
                        let used = k.last_used.map_or_else(|| "never".to_owned(), relative);
                        vec![k.id.to_string(), k.name.clone(), k.mask.clone(), relative(k.created_at), used]
                    })
                    .collect();
                out.table(&["id", "name", "key", "created", "used"], rows, "No keys yet: nidus key create");
            }
        }
        Key::Delete { id } => {
            if !store.delete_key(id).await? {
                bail!("There is no key {id}: nidus key list shows them");
            }
        }
    }
    store.close().await;
    Ok(ExitCode::SUCCESS)
}
