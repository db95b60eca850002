//! From the table to what the machine is told: programs built, paths shared.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::jobs::Entry;
use super::programs::Workspace;
use crate::protocol::{Job, Share, Spec};

/// How a job's result is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A Rust test program: a result a test.
    TestProgram,
    /// Its exit code is the result.
    Command,
}

/// The run.
#[derive(Debug, Default)]
pub struct Plan {
    pub spec: Spec,
    /// One for each job of the specification.
    pub kinds: Vec<Kind>,
    /// Names of jobs that cannot run here, and why.
    pub skipped: Vec<(String, String)>,
}

impl Plan {
    /// Plans the jobs of `entries`; `variable` tells the host's environment.
    pub fn new(
        entries: Vec<Entry>,
        workspace: &Workspace,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let mut plan = Self::default();
        plan.share(&workspace.root);
        for mut entry in entries {
            if let Some(name) = entry.lacks(&variable) {
                let why = entry.missing.clone().unwrap_or_else(|| format!("{name} is not set"));
                plan.skipped.push((entry.name, why));
                continue;
            }
            for name in &entry.needs {
                let value = variable(name).unwrap_or_default();
                let path = Path::new(&value);
                if path.exists() {
                    let path = path.canonicalize().with_context(|| format!("resolve {name}={value}"))?;
                    plan.share(path.parent().unwrap_or(Path::new("/")));
                    entry.env.insert(name.clone(), path.display().to_string());
                } else {
                    entry.env.insert(name.clone(), value);
                }
            }
            plan.add(&entry, workspace).with_context(|| format!("plan the job {}", entry.name))?;
        }
        Ok(plan)
    }

    fn add(&mut self, entry: &Entry, workspace: &Workspace) -> Result<()> {
        if let Some(command) = &entry.run {
            let mut filled = Vec::new();
            for word in command {
                filled.push(self.fill(word, workspace)?);
            }
            self.push(entry, entry.name.clone(), filled, Kind::Command);
            return Ok(());
        }
        let package = entry.package.as_deref().unwrap_or_default();
        let mut programs = workspace.tests(package)?;
        if let Some(wanted) = &entry.tests {
            if let Some(unknown) = wanted.iter().find(|w| !programs.iter().any(|p| p.target == **w)) {
                bail!("{package} has no test program {unknown}");
            }
            programs.retain(|p| wanted.contains(&p.target));
        }
        if programs.is_empty() {
            bail!("{package} has no test program");
        }
        let several = programs.len() > 1;
        for program in programs {
            let name =
                if several { format!("{}/{}", entry.name, program.target) } else { entry.name.clone() };
            self.share(program.path.parent().unwrap_or(Path::new("/")));
            let mut command = vec![program.path.display().to_string()];
            command.extend(entry.args.iter().cloned());
            self.push(entry, name, command, Kind::TestProgram);
        }
        Ok(())
    }

    fn push(&mut self, entry: &Entry, name: String, command: Vec<String>, kind: Kind) {
        self.spec.jobs.push(Job { name, command, env: entry.env.clone(), timeout: entry.timeout });
        self.kinds.push(kind);
    }

    /// Puts paths into a word of a command.
    fn fill(&mut self, word: &str, workspace: &Workspace) -> Result<String> {
        let mut word = word.replace("{repo}", &workspace.root.display().to_string());
        while let Some((before, rest)) = word.split_once("{program:") {
            let (name, after) = rest.split_once('}').context("'{program:' lacks its '}'")?;
            let path = workspace.program(name)?;
            self.share(path.parent().unwrap_or(Path::new("/")));
            word = format!("{before}{}{after}", path.display());
        }
        Ok(word)
    }

    /// Shares a directory read-only under its own path, unless a share covers it.
    fn share(&mut self, dir: &Path) {
        if self.spec.shares.iter().any(|s| dir.starts_with(&s.host)) {
            return;
        }
        let path = PathBuf::from(dir);
        self.spec.shares.push(Share { host: path.clone(), guest: path, read_only: true });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(extra: &str) -> Entry {
        toml::from_str(&format!("name = 'a'\nrun = ['x', '{{repo}}/y']\n{extra}")).unwrap()
    }

    #[test]
    fn commands_are_filled_and_needs_are_met_or_told() {
        let workspace = Workspace { root: "/w".into(), whole: false };
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("program");
        std::fs::write(&file, b"").unwrap();
        let (needy, other) = (entry("needs = ['F']"), entry("needs = ['G']\nmissing = 'no G here'"));
        let plan = Plan::new(vec![needy, other], &workspace, |name| {
            (name == "F").then(|| file.display().to_string())
        })
        .unwrap();
        assert_eq!(plan.spec.jobs.len(), 1);
        assert_eq!(plan.spec.jobs[0].command, ["x", "/w/y"]);
        let shared: Vec<_> = plan.spec.shares.iter().map(|s| s.guest.as_path()).collect();
        assert_eq!(shared, [Path::new("/w"), &dir.path().canonicalize().unwrap()]);
        assert_eq!(plan.skipped, [("a".into(), "no G here".into())]);
    }
}
