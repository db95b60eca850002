//! `nidus gc`: through the daemon if one runs, else with its own hands on the data directory.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use hyper::Method;
use nidus_api::{DEFAULT_GRACE, GarbageReport};
use nidus_build::LayerIndex;
use nidus_sandbox::Lineages;

use crate::client::{self, Client};
use crate::config::Config;
use crate::lock::DataLock;
use crate::output::{self, Output};

/// Options of `nidus gc`.
#[derive(Debug, Args)]
pub struct Gc {
    /// Delete what is listed; without this, nothing is changed
    #[arg(long)]
    delete: bool,
    /// Leave alone what is younger than this in an object store, as 90s, 30m, 24h or 7d
    #[arg(long, value_name = "TIME", value_parser = time)]
    grace: Option<Duration>,
}

fn time(text: &str) -> Result<Duration, String> {
    let bad = || format!("'{text}' is not a number with s, m, h or d after it");
    let unit = text.chars().next_back().ok_or_else(bad)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(bad()),
    };
    let number: u32 = text.strip_suffix(unit).and_then(|n| n.parse().ok()).ok_or_else(bad)?;
    Ok(Duration::from_secs(u64::from(number) * seconds))
}

pub async fn run(gc: Gc, config: &Config, out: Output) -> anyhow::Result<ExitCode> {
    let dir = &config.data_dir;
    let report = if client::named_api().is_some() {
        by_daemon(&gc, config).await?
    } else if !dir.is_dir() {
        bail!("There is no data directory {}", dir.display())
    } else {
        match DataLock::take(dir) {
            Ok(_lock) => without_daemon(&gc, config).await?,
            // A daemon has it.
            Err(_) => by_daemon(&gc, config).await?,
        }
    };
    if out.json {
        out.value(&report)?;
    } else {
        print(&report, out);
    }
    let failed = report.garbage.iter().any(|g| g.error.is_some());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn by_daemon(gc: &Gc, config: &Config) -> anyhow::Result<GarbageReport> {
    let method = if gc.delete { Method::DELETE } else { Method::GET };
    let grace = gc.grace.unwrap_or(DEFAULT_GRACE).as_secs();
    let path = format!("/admin/garbage?graceSeconds={grace}");
    let report = Client::new(config).await?.call(method, &path, None).await?;
    serde_json::from_value(report).context("The daemon's answer cannot be read")
}

/// The caller holds the data directory's lock.
async fn without_daemon(gc: &Gc, config: &Config) -> anyhow::Result<GarbageReport> {
    let store = client::store(config).await?;
    let builds = Arc::new(crate::builds::open(config, &store).await?);
    let lineages = Lineages::new(builds.clone());
    let mut request = store.garbage_request(gc.grace.unwrap_or(DEFAULT_GRACE), gc.delete).await?;
    let layers = LayerIndex::open(config.layers_dir()).context("Cannot open the index of layers")?;
    let kept = nidus_orchestrator::keep_layers(&mut request, &layers).await;
    kept.map_err(|s| anyhow!("{}", s.message()))?;
    let answer = nidus_orchestrator::collect(&lineages, &request, |build| lineages.remove(build)).await;
    let answer = answer.map_err(|s| anyhow!("{}", s.message()))?;
    builds.remove_queued().await?;
    store.close().await;
    Ok(GarbageReport::new(gc.delete, answer))
}

fn print(report: &GarbageReport, out: Output) {
    let size = |bytes| if bytes == 0 { "-".to_owned() } else { output::size(bytes) };
    let rows = report.garbage.iter().map(|g| {
        let age = g.age_seconds.map_or_else(|| "-".to_owned(), |s| output::duration(s.max(0).unsigned_abs()));
        let why = match &g.error {
            Some(error) => format!("NOT DELETED: {error}"),
            None => g.why.clone(),
        };
        vec![g.build_id.clone(), size(g.disk_bytes), size(g.bucket_bytes), age, why]
    });
    let rows: Vec<_> = rows.collect();
    let any = !rows.is_empty();
    out.table(
        &["build", "disk", "bucket", "age", "why"],
        rows,
        "Nothing to collect: everything is referred to",
    );
    if any {
        let (disk, bucket) = (output::size(report.disk_bytes), output::size(report.bucket_bytes));
        let what = if report.deleted { "Deleted" } else { "Nothing was deleted yet (nidus gc --delete)" };
        println!("{what}: {disk} on the disk, {bucket} in the bucket");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(time("0s"), Ok(Duration::ZERO));
        assert_eq!(time("36h"), Ok(Duration::from_secs(36 * 3600)));
        assert_eq!(time("7d"), Ok(Duration::from_secs(7 * 86_400)));
        for bad in ["", "7", "h", "-1h", "1.5h", "1\u{17e}"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }
}
