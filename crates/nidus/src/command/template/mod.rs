//! `nidus template`.

mod build;
mod context;
mod progress;

use std::process::ExitCode;

use clap::Subcommand;
use hyper::Method;
use serde_json::{Value, json};

use crate::client::Client;
use crate::config::Config;
use crate::output::{Output, relative, size};

/// Templates.
#[derive(Debug, Subcommand)]
pub enum Template {
    /// Build a template: of a Dockerfile, an image or another template. A name that exists gets a new build
    Build(Box<build::Build>),
    /// List the templates
    List,
    /// Delete a template and its builds
    Delete {
        /// Name or id
        name: String,
    },
    /// Forget layers of builds, those first that were not used for the longest time
    Prune {
        /// What is to be left at most, as 500M or 20G
        #[arg(long, default_value = "0", value_name = "SIZE", value_parser = bytes)]
        keep: u64,
    },
}

fn bytes(text: &str) -> Result<u64, String> {
    let bad = || format!("'{text}' is not a number with K, M, G or T after it");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(bad()),
    };
    digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift)).ok_or_else(bad)
}

pub async fn run(command: Template, config: &Config, out: Output) -> anyhow::Result<ExitCode> {
    let client = Client::new(config).await?;
    match command {
        Template::Build(build) => return build::run(&client, out, *build).await,
        Template::Prune { keep } => {
            let pruned = client.call(Method::POST, "/admin/layers/prune", Some(json!({ "maxBytes": keep })));
            let pruned = pruned.await?;
            if out.json {
                return out.value(&pruned).map(|()| ExitCode::SUCCESS);
            }
            let number = |k: &str| pruned[k].as_u64().unwrap_or_default();
            println!(
                "{} layers removed, {} free again; {} layers with {} are left",
                number("removedLayers"),
                size(number("removedBytes")),
                number("leftLayers"),
                size(number("leftBytes"))
            );
        }
        Template::List => {
            let list = client.call(Method::GET, "/templates", None).await?;
            if out.json {
                out.value(&list)?;
            } else {
                let rows = list.as_array().into_iter().flatten().map(row).collect();
                let head = ["name", "id", "status", "vcpus", "memory", "disk", "envd", "used", "created"];
                out.table(&head, rows, "No templates yet: nidus template build");
            }
        }
        Template::Delete { name } => {
            client.call(Method::DELETE, &format!("/templates/{name}"), None).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn row(t: &Value) -> Vec<String> {
    let text = |k: &str| t[k].as_str().unwrap_or_default().to_owned();
    let names: Vec<&str> = t["names"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let created = text("createdAt").parse().map(relative).unwrap_or_default();
    vec![
        names.join(", "),
        text("templateID"),
        text("buildStatus"),
        t["cpuCount"].to_string(),
        format!("{} MiB", t["memoryMB"]),
        format!("{} MiB", t["diskSizeMB"]),
        text("envdVersion"),
        format!("{}x", t["spawnCount"]),
        created,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(bytes("0"), Ok(0));
        assert_eq!(bytes("500M"), Ok(500 << 20));
        assert_eq!(bytes("20GiB"), Ok(20 << 30));
        for bad in ["", "x", "1X", "-1G", "99999999999T"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }
}
