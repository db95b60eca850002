//! `nidus template build`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use hyper::Method;
use nidus_build::{Dockerfile, Instruction};
use serde_json::{Value, json};

use super::context::BuildContext;
use super::progress::Progress;
use crate::client::Client;
use crate::output::Output;

/// Between two looks at a build.
const LOOK: Duration = Duration::from_millis(250);

/// Options of `nidus template build`.
#[derive(Debug, Args)]
pub struct Build {
    /// Directory that COPY copies from
    #[arg(default_value = ".")]
    context: PathBuf,
    /// Name that sandboxes are created from, as NAME or NAME:TAG; the context's own when not set
    #[arg(long, short)]
    name: Option<String>,
    /// Dockerfile to build; Dockerfile in the context when nothing else is named
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Image to begin with: any of a registry, or debian:SUITE[,PACKAGE...], which is made from packages
    #[arg(long, alias = "from", conflicts_with_all = ["file", "from_template"], value_name = "IMAGE")]
    from_image: Option<String>,
    /// Template to begin with
    #[arg(long, conflicts_with = "file", value_name = "NAME")]
    from_template: Option<String>,
    /// Name for the image's registry; the password is read from NIDUS_REGISTRY_PASSWORD
    #[arg(long, value_name = "NAME")]
    registry_user: Option<String>,
    /// Virtual processors
    #[arg(long)]
    cpu: Option<i32>,
    /// Memory in MiB
    #[arg(long)]
    memory: Option<i32>,
    /// Command that runs in every sandbox; of a Dockerfile, ENTRYPOINT and CMD when not set
    #[arg(long, value_name = "COMMAND")]
    start_cmd: Option<String>,
    /// Command that succeeds once what was started is ready; of a Dockerfile, HEALTHCHECK's when not set
    #[arg(long, value_name = "COMMAND")]
    ready_cmd: Option<String>,
    /// Value of an ARG of the Dockerfile
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    build_arg: Vec<(String, String)>,
    /// Do everything anew
    #[arg(long)]
    no_cache: bool,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("'{text}' is not NAME=VALUE"))?;
    Ok((name.to_owned(), value.to_owned()))
}

/// What is to be built, in the words of the API, and the files that it needs by their hash.
struct Plan {
    start: Value,
    warnings: Vec<String>,
    /// Sources in the context.
    copies: Vec<(usize, String)>,
}

fn plan(build: &Build) -> anyhow::Result<Plan> {
    let mut start = json!({ "force": build.no_cache });
    let (mut steps, mut copies) = (Vec::new(), Vec::new());
    let mut warnings = Vec::new();
    let (mut start_cmd, mut ready_cmd) = (build.start_cmd.clone(), build.ready_cmd.clone());
    if let Some(image) = &build.from_image {
        start["fromImage"] = json!(image);
    } else if let Some(template) = &build.from_template {
        start["fromTemplate"] = json!(template);
    } else {
        let path = build.file.clone().unwrap_or_else(|| build.context.join("Dockerfile"));
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!("Cannot read {}: name a Dockerfile (-f), an image (--from-image) or a template (--from-template)", path.display())
        })?;
        let args: BTreeMap<_, _> = build.build_arg.iter().cloned().collect();
        let file = Dockerfile::parse(&text, &args)?;
        start["fromImage"] = json!(file.from);
        warnings = file.warnings;
        start_cmd = start_cmd.or(file.start);
        ready_cmd = ready_cmd.or(file.ready);
        // As Docker begins, and as sandboxes are used.
        let step = |kind: &str, args: &[&str]| json!({ "type": kind, "args": args });
        let set = |f: fn(&Instruction) -> bool| file.instructions.iter().any(f);
        let user = set(|i| matches!(i, Instruction::User(_)));
        let workdir = set(|i| matches!(i, Instruction::Workdir(_)));
        steps.push(step("USER", &["root"]));
        steps.push(step("WORKDIR", &["/"]));
        for instruction in file.instructions {
            match instruction {
                Instruction::Run(command) => steps.push(step("RUN", &[&command])),
                Instruction::Workdir(dir) => steps.push(step("WORKDIR", &[&dir])),
                Instruction::User(name) => steps.push(step("USER", &[&name])),
                Instruction::Env(pairs) | Instruction::Arg(pairs) if pairs.is_empty() => {}
                Instruction::Env(pairs) => steps.push(step("ENV", &flat(&pairs))),
                Instruction::Arg(pairs) => steps.push(step("ARG", &flat(&pairs))),
                Instruction::Copy(copy) => {
                    let several = copy.sources.len() > 1;
                    let target =
                        if several { format!("{}/", copy.target.trim_end_matches('/')) } else { copy.target };
                    for source in copy.sources {
                        let (owner, mode) = (copy.owner.as_deref(), copy.mode.as_deref());
                        let words = [&source, target.as_str(), owner.unwrap_or(""), mode.unwrap_or("")];
                        let new = step("COPY", &words);
                        copies.push((steps.len(), source));
                        steps.push(new);
                    }
                }
            }
        }
        if !user {
            steps.push(step("USER", &["user"]));
        }
        if !workdir {
            steps.push(step("WORKDIR", &["/home/user"]));
        }
    }
    if let Some(user) = &build.registry_user {
        let password = std::env::var("NIDUS_REGISTRY_PASSWORD").unwrap_or_default();
        if password.is_empty() {
            bail!("--registry-user needs the password in NIDUS_REGISTRY_PASSWORD");
        }
        start["fromImageRegistry"] = json!({ "type": "registry", "username": user, "password": password });
    }
    start["steps"] = json!(steps);
    if let Some(command) = start_cmd {
        start["startCmd"] = json!(command);
    }
    if let Some(command) = ready_cmd {
        start["readyCmd"] = json!(command);
    }
    Ok(Plan { start, warnings, copies })
}

fn flat(pairs: &[(String, String)]) -> Vec<&str> {
    pairs.iter().flat_map(|(n, v)| [n.as_str(), v.as_str()]).collect()
}

/// The name of a directory, in the letters of names of templates.
fn name_of(context: &Path) -> anyhow::Result<String> {
    let full = context.canonicalize().with_context(|| format!("There is no {}", context.display()))?;
    let name = full.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '-' };
    let name: String = name.chars().map(plain).take(64).collect();
    if name.is_empty() {
        bail!("The directory has no name: give the template one with --name");
    }
    Ok(name)
}

pub async fn run(client: &Client, out: Output, build: Build) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let name = match &build.name {
        Some(name) => name.clone(),
        None => name_of(&build.context)?,
    };
    let Plan { mut start, warnings, copies } = plan(&build)?;
    for warning in &warnings {
        eprintln!("warning: {warning}");
    }
    let mut body = json!({ "name": name });
    if let Some(cpu) = build.cpu {
        body["cpuCount"] = json!(cpu);
    }
    if let Some(memory) = build.memory {
        body["memoryMB"] = json!(memory);
    }
    let made = client.call(Method::POST, "/v3/templates", Some(body)).await?;
    let text = |k: &str| made[k].as_str().unwrap_or_default().to_owned();
    let (template, id) = (text("templateID"), text("buildID"));
    if !copies.is_empty() {
        let context = BuildContext::open(&build.context)?;
        for (step, source) in copies {
            let archive = context.archive(&source)?;
            let path = format!("/templates/{template}/files/{}", archive.hash);
            let link = client.call(Method::GET, &path, None).await?;
            if link["present"] != true {
                client.upload(link["url"].as_str().unwrap_or_default(), archive.file).await?;
            }
            start["steps"][step]["filesHash"] = json!(archive.hash);
        }
    }
    client.call(Method::POST, &format!("/v2/templates/{template}/builds/{id}"), Some(start)).await?;
    let mut progress = Progress::new(out);
    let mut seen = 0;
    let end = loop {
        let path = format!("/templates/{template}/builds/{id}/status?logsOffset={seen}&level=info");
        let status = client.call(Method::GET, &path, None).await?;
        let entries = status["logEntries"].as_array().cloned().unwrap_or_default();
        seen += entries.len();
        entries.iter().for_each(|e| progress.entry(e));
        match status["status"].as_str() {
            Some("ready" | "error") if entries.is_empty() => break status,
            _ if !entries.is_empty() => {}
            _ => tokio::time::sleep(LOOK).await,
        }
    };
    if end["status"] == "error" {
        progress.failed();
        progress.end();
        let reason = end["reason"]["message"].as_str().unwrap_or("no reason is known");
        let step = end["reason"]["step"].as_str().map(|s| format!(" in step {s}")).unwrap_or_default();
        let shell = match end["reason"]["layer"].as_str() {
            Some(layer) => format!(
                "\nA shell in the state before that step: nidus sandbox connect $(nidus sandbox create {layer})"
            ),
            None => String::new(),
        };
        bail!("The build failed{step}: {reason}{shell}");
    }
    progress.end();
    if out.json {
        out.value(&json!({ "templateID": template, "buildID": id, "name": name }))?;
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{name} is ready after {:.1} s (template {template}, build {id})",
        began.elapsed().as_secs_f64()
    );
    Ok(ExitCode::SUCCESS)
}
