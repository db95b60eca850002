//! The table of jobs: `jobs.toml` in this crate, or another one.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

const OWN_TABLE: &str = include_str!("../../jobs.toml");

/// A job as the table has it; see there.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub name: String,
    pub package: Option<String>,
    pub tests: Option<Vec<String>>,
    pub run: Option<Vec<String>>,
    #[serde(default)]
    pub needs: Vec<String>,
    pub missing: Option<String>,
    #[serde(default)]
    pub args: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default = "default_timeout")]
    pub timeout: u64,
}

fn default_timeout() -> u64 {
    120
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    job: Vec<Entry>,
}

impl Entry {
    /// The first variable that the job needs and the host does not have.
    pub fn lacks(&self, host: impl Fn(&str) -> Option<String>) -> Option<&str> {
        self.needs.iter().find(|name| host(name).is_none_or(|v| v.is_empty())).map(String::as_str)
    }
}

/// Reads the table at `path`, or this crate's own.
pub fn table(path: Option<&Path>) -> Result<Vec<Entry>> {
    match path {
        None => parse(OWN_TABLE).context("read jobs.toml"),
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
            parse(&text).with_context(|| format!("read {}", path.display()))
        }
    }
}

fn parse(text: &str) -> Result<Vec<Entry>> {
    let table: Table = toml::from_str(text)?;
    let mut names = std::collections::BTreeSet::new();
    for entry in &table.job {
        if !names.insert(&entry.name) {
            bail!("two jobs have the name {}", entry.name);
        }
        if entry.package.is_some() == entry.run.is_some() {
            bail!("the job {} must have either 'package' or 'run'", entry.name);
        }
        if entry.run.is_some() && (entry.tests.is_some() || !entry.args.is_empty()) {
            bail!("the job {} has 'tests' or 'args', which belong to 'package'", entry.name);
        }
    }
    Ok(table.job)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_table_is_sound() {
        assert!(!table(None).unwrap().is_empty());
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| format!("{:#}", parse(text).unwrap_err());
        let job = "[[job]]\nname = 'a'\nrun = ['x']\n";
        assert!(error(&format!("{job}{job}")).contains("name a"));
        assert!(error("[[job]]\nname = 'a'\n").contains("either"));
        assert!(error("[[job]]\nname = 'a'\nrun = ['x']\ntests = ['lib']").contains("belong"));
        assert!(error("[[job]]\nname = 'a'\nrnu = ['x']\n").contains("rnu"));
    }

    #[test]
    fn what_is_missing_is_found() {
        let entry = &parse("[[job]]\nname = 'a'\nrun = ['x']\nneeds = ['A', 'B']").unwrap()[0];
        assert_eq!(entry.lacks(|_| Some("x".into())), None);
        assert_eq!(entry.lacks(|n| (n == "A").then(|| "x".into())), Some("B"));
        assert_eq!(entry.lacks(|_| Some(String::new())), Some("A"));
    }
}
