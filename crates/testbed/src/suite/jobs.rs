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
    pub like: Option<String>,
    pub package: Option<String>,
    pub tests: Option<Vec<String>>,
    pub run: Option<Vec<String>>,
    pub prepare: Option<Vec<String>>,
    #[serde(default)]
    pub lines: bool,
    #[serde(default)]
    pub needs: Vec<String>,
    pub missing: Option<String>,
    #[serde(default)]
    pub args: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    pub timeout: Option<u64>,
}

/// Seconds for a job that does not say.
const DEFAULT_TIMEOUT: u64 = 120;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    job: Vec<Entry>,
}

impl Entry {
    /// In seconds.
    pub fn timeout(&self) -> u64 {
        self.timeout.unwrap_or(DEFAULT_TIMEOUT)
    }

    /// What the entry does not say is as in `other`.
    fn fill_from(&mut self, other: &Self) {
        let Self {
            name: _,
            like: _,
            package,
            tests,
            run,
            prepare,
            lines,
            needs,
            missing,
            args,
            env,
            timeout,
        } = other.clone();
        self.package = self.package.take().or(package);
        self.tests = self.tests.take().or(tests);
        self.run = self.run.take().or(run);
        self.prepare = self.prepare.take().or(prepare);
        self.lines |= lines;
        self.needs.extend(needs);
        self.missing = self.missing.take().or(missing);
        if self.args.is_empty() {
            self.args = args;
        }
        self.timeout = self.timeout.or(timeout);
        for (name, value) in env {
            self.env.entry(name).or_insert(value);
        }
    }

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
    let mut table: Table = toml::from_str(text)?;
    for i in 0..table.job.len() {
        let (before, rest) = table.job.split_at_mut(i);
        if let Some(like) = rest[0].like.clone() {
            let other = before.iter().find(|e| e.name == like);
            let other = other.with_context(|| format!("no job {like} stands before its like"))?;
            rest[0].fill_from(other);
        }
    }
    let mut names = std::collections::BTreeSet::new();
    for entry in &table.job {
        if !names.insert(&entry.name) {
            bail!("two jobs have the name {}", entry.name);
        }
        if entry.package.is_some() == entry.run.is_some() {
            bail!("the job {} must have either 'package' or 'run'", entry.name);
        }
        if entry.package.is_some() && (entry.lines || entry.prepare.is_some()) {
            bail!("the job {} has 'lines' or 'prepare', which belong to 'run'", entry.name);
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
    fn a_like_job_says_only_what_differs() {
        let first =
            "[[job]]\nname = 'a'\nrun = ['x']\nlines = true\ntimeout = 7\nenv = { V = '1', W = '1' }\n";
        let second = "[[job]]\nname = 'b'\nlike = 'a'\nneeds = ['N']\nenv = { V = '2' }\n";
        let jobs = parse(&format!("{first}{second}")).unwrap();
        assert_eq!(
            (jobs[1].run.clone(), jobs[1].lines, jobs[1].timeout()),
            (Some(vec!["x".into()]), true, 7)
        );
        assert_eq!((jobs[1].env["V"].as_str(), jobs[1].env["W"].as_str()), ("2", "1"));
        assert_eq!((jobs[0].needs.len(), jobs[1].needs.len()), (0, 1));
        assert!(format!("{:#}", parse(second).unwrap_err()).contains("no job a"));
    }

    #[test]
    fn what_is_missing_is_found() {
        let entry = &parse("[[job]]\nname = 'a'\nrun = ['x']\nneeds = ['A', 'B']").unwrap()[0];
        assert_eq!(entry.lacks(|_| Some("x".into())), None);
        assert_eq!(entry.lacks(|n| (n == "A").then(|| "x".into())), Some("B"));
        assert_eq!(entry.lacks(|_| Some(String::new())), Some("A"));
    }
}
