//! `nidus template`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Subcommand;
use hyper::Method;
use serde_json::{Value, json};

use crate::client::Client;
use crate::config::Config;
use crate::output::{Output, relative};

/// Templates.
#[derive(Debug, Subcommand)]
pub enum Template {
    /// Build a template; a name that exists gets a new build
    Build {
        /// Name that sandboxes are created from
        #[arg(default_value = "base")]
        name: String,
        /// What it is made of: debian:SUITE, from packages
        #[arg(long, default_value = "debian:bookworm")]
        from: String,
        /// Virtual processors
        #[arg(long, default_value_t = 1)]
        cpu: i32,
        /// Memory in MiB
        #[arg(long, default_value_t = 512)]
        memory: i32,
    },
    /// List the templates
    List,
    /// Delete a template and its builds
    Delete {
        /// Name or id
        name: String,
    },
}

/// Between two looks at a build.
const LOOK: Duration = Duration::from_millis(500);

pub async fn run(command: Template, config: &Config, out: Output) -> anyhow::Result<ExitCode> {
    let client = Client::new(config).await?;
    match command {
        Template::Build { name, from, cpu, memory } => build(&client, out, &name, &from, cpu, memory).await?,
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

async fn build(
    client: &Client,
    out: Output,
    name: &str,
    from: &str,
    cpu: i32,
    memory: i32,
) -> anyhow::Result<()> {
    let began = Instant::now();
    let body = json!({ "name": name, "cpuCount": cpu, "memoryMB": memory });
    let made = client.call(Method::POST, "/v3/templates", Some(body)).await?;
    let (template, build) =
        (made["templateID"].as_str().unwrap_or_default(), made["buildID"].as_str().unwrap_or_default());
    let start = format!("/v2/templates/{template}/builds/{build}");
    client.call(Method::POST, &start, Some(json!({ "fromImage": from }))).await?;
    let spinner = out.spinner(&format!("building {name} from {from}"));
    let mut seen = 0;
    let end = loop {
        let path = format!("/templates/{template}/builds/{build}/status?logsOffset={seen}&level=info");
        let status = client.call(Method::GET, &path, None).await?;
        let lines = status["logEntries"].as_array().cloned().unwrap_or_default();
        seen += lines.len();
        for line in &lines {
            let text = line["message"].as_str().unwrap_or_default();
            if spinner.is_hidden() {
                eprintln!("{text}");
            } else {
                spinner.println(text);
            }
        }
        match status["status"].as_str() {
            Some("ready" | "error") if lines.is_empty() => break status,
            _ => tokio::time::sleep(LOOK).await,
        }
    };
    spinner.finish_and_clear();
    if end["status"] == "error" {
        bail!("The build failed: {}", end["reason"]["message"].as_str().unwrap_or("no reason is known"));
    }
    if out.json {
        return out.value(&json!({ "templateID": template, "buildID": build, "name": name }));
    }
    println!(
        "{name} is ready after {:.1} s (template {template}, build {build})",
        began.elapsed().as_secs_f64()
    );
    Ok(())
}
