//! `nidus team`: works with and without a running daemon.

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Subcommand;
use nidus_api::{Store, TeamRow};
use serde_json::json;

use crate::client;
use crate::config::Config;
use crate::output::{Output, relative};

/// Teams: whose keys, sandboxes, templates, secrets and volumes are apart.
#[derive(Debug, Subcommand)]
pub enum Team {
    /// Make a team
    Create {
        /// What to call it
        name: String,
        /// Sandboxes that it may run at once; 0 is without a limit
        #[arg(long, default_value_t = 0)]
        max_sandboxes: u32,
    },
    /// List the teams
    List,
    /// Set how many sandboxes a team may run at once
    Limit {
        /// Name or id
        team: String,
        /// Sandboxes at once; 0 is without a limit
        max_sandboxes: u32,
    },
    /// Shut a team out: all its requests are refused
    Block {
        /// Name or id
        team: String,
        /// What it is told
        #[arg(long, default_value = "ask whoever runs this installation")]
        reason: String,
    },
    /// Let a team in again
    Unblock {
        /// Name or id
        team: String,
    },
    /// Make an access token, which manages the team's keys, and print it, alone; it is shown this once
    Token {
        /// Name or id
        team: String,
        /// What to call it
        #[arg(long, default_value = "token")]
        name: String,
    },
}

/// A team by its name or id.
pub async fn find(store: &Store, team: &str) -> anyhow::Result<TeamRow> {
    let found = store.team(team).await?;
    found.with_context(|| {
        format!("There is no team {team}, or more than one of this name: nidus team list shows them")
    })
}

pub async fn run(command: Team, config: &Config, out: Output) -> anyhow::Result<ExitCode> {
    let store = client::store(config).await?;
    match command {
        Team::Create { name, max_sandboxes } => {
            if name.trim().is_empty() || name.chars().any(char::is_control) {
                bail!("A team's name is not empty and has no control characters");
            }
            let team = store.create_team(name.trim()).await?;
            store.limit_team(&team.id, max_sandboxes.into()).await?;
            if out.json {
                out.value(&json!({ "id": team.id, "name": team.name, "maxSandboxes": max_sandboxes }))?;
            } else {
                println!("{}", team.id);
            }
        }
        Team::List => {
            let teams = store.teams().await?;
            if out.json {
                let list: Vec<_> = teams
                    .iter()
                    .map(|t| {
                        json!({ "id": t.id, "name": t.name, "maxSandboxes": t.max_sandboxes,
                                "blocked": t.blocked, "createdAt": t.created_at })
                    })
                    .collect();
                out.value(&list)?;
            } else {
                let rows = teams
                    .iter()
                    .map(|t| {
                        let most = match t.max_sandboxes {
                            0 => "no limit".to_owned(),
                            n => n.to_string(),
                        };
                        let state = t.blocked.as_ref().map_or("".to_owned(), |r| format!("blocked: {r}"));
                        vec![t.id.clone(), t.name.clone(), most, relative(t.created_at), state]
                    })
                    .collect();
                out.table(&["id", "name", "sandboxes", "created", ""], rows, "No teams: nidus team create");
            }
        }
        Team::Limit { team, max_sandboxes } => {
            store.limit_team(&find(&store, &team).await?.id, max_sandboxes.into()).await?;
        }
        Team::Block { team, reason } => {
            store.block_team(&find(&store, &team).await?.id, Some(&reason)).await?;
        }
        Team::Unblock { team } => store.block_team(&find(&store, &team).await?.id, None).await?,
        Team::Token { team, name } => {
            let new = store.create_token(&find(&store, &team).await?.id, &name).await?;
            if out.json {
                out.value(&json!({ "id": new.id, "name": name, "token": new.key }))?;
            } else {
                println!("{}", new.key);
            }
        }
    }
    store.close().await;
    Ok(ExitCode::SUCCESS)
}
