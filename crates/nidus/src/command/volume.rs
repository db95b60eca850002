//! `nidus volume`.

use std::process::ExitCode;

use anyhow::bail;
use clap::Subcommand;
use hyper::Method;
use serde_json::{Value, json};

use crate::client::Client;
use crate::config::Config;
use crate::output::Output;

/// Volumes: files that outlive sandboxes, mounted with `sandbox create --volume NAME:PATH`.
#[derive(Debug, Subcommand)]
pub enum Volume {
    /// Make a volume and print its id
    Create {
        /// What to call it
        name: String,
    },
    /// List the volumes
    List,
    /// Delete volumes and all files in them
    Delete {
        /// Their names or ids
        #[arg(required = true)]
        volumes: Vec<String>,
    },
}

pub async fn run(command: Volume, config: &Config, out: Output) -> anyhow::Result<ExitCode> {
    let client = Client::new(config).await?;
    match command {
        Volume::Create { name } => {
            let made = client.call(Method::POST, "/volumes", Some(json!({ "name": name }))).await?;
            let (id, name) = (&made["volumeID"], &made["name"]);
            if out.json {
                // Without the token for its files, which a log need not have.
                out.value(&json!({ "volumeID": id, "name": name }))?;
            } else {
                println!("{}", id.as_str().unwrap_or_default());
            }
        }
        Volume::List => {
            let list = client.call(Method::GET, "/volumes", None).await?;
            if out.json {
                out.value(&list)?;
            } else {
                let text = |v: &Value, key: &str| v[key].as_str().unwrap_or_default().to_owned();
                let rows = list.as_array().into_iter().flatten();
                let rows = rows.map(|v| vec![text(v, "name"), text(v, "volumeID")]).collect();
                out.table(&["name", "id"], rows, "There are no volumes: nidus volume create NAME makes one");
            }
        }
        Volume::Delete { volumes } => {
            let list = client.call(Method::GET, "/volumes", None).await?;
            for wanted in &volumes {
                let known = list.as_array().into_iter().flatten();
                let found = known.filter_map(|v| Some((v["volumeID"].as_str()?, v["name"].as_str()?)));
                let found = found.into_iter().find(|(id, name)| id == wanted || name == wanted);
                let Some((id, _)) = found else {
                    bail!("There is no volume {wanted}: nidus volume list shows them");
                };
                client.call(Method::DELETE, &format!("/volumes/{id}"), None).await?;
            }
            if out.json {
                out.value(&json!({ "deleted": volumes }))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
