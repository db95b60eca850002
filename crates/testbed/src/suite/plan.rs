//! From the table to what the machine is told: programs built, paths shared.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::jobs::Entry;
use super::programs::Workspace;
use crate::protocol::{Job, Share, Spec};

/// How a job's result is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A Rust test program, or a command that tells its tests as one does: a result a test.
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
    /// Preparations that have been made, and what each is for.
    prepared: Vec<(Vec<String>, PathBuf)>,
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
            let mut filled = self.fill_all(command, workspace)?;
            if let Some(preparation) = &entry.prepare {
                let preparation = self.fill_all(preparation, workspace)?;
                let dir = self.prepare(preparation)?.display().to_string();
                filled.iter_mut().for_each(|word| *word = word.replace("{prepared}", &dir));
            }
            let mut entry = entry.clone();
            for value in entry.env.values_mut() {
                *value = self.fill(value, workspace)?;
            }
            let kind = if entry.lines { Kind::TestProgram } else { Kind::Command };
            self.push(&entry, entry.name.clone(), filled, kind);
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
        self.spec.jobs.push(Job { name, command, env: entry.env.clone(), timeout: entry.timeout() });
        self.kinds.push(kind);
    }

    /// Runs a preparation on this host, once for all jobs that have it. Returns its directory.
    fn prepare(&mut self, command: Vec<String>) -> Result<PathBuf> {
        if let Some((_, dir)) = self.prepared.iter().find(|(other, _)| *other == command) {
            return Ok(dir.clone());
        }
        let (program, arguments) = command.split_first().context("'prepare' is empty")?;
        let out =
            Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
        let out = out.with_context(|| format!("run {program}"))?;
        if !out.status.success() {
            bail!("{program} failed ({})", out.status);
        }
        let text = String::from_utf8_lossy(&out.stdout);
        let dir = PathBuf::from(text.lines().last().unwrap_or_default());
        if !dir.is_absolute() || !dir.is_dir() {
            bail!("the last line of {program}'s output is no directory: {}", dir.display());
        }
        self.share(&dir);
        self.prepared.push((command, dir.clone()));
        Ok(dir)
    }

    fn fill_all(&mut self, words: &[String], workspace: &Workspace) -> Result<Vec<String>> {
        words.iter().map(|word| self.fill(word, workspace)).collect()
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

    #[test]
    fn a_preparation_is_made_once_and_its_directory_is_shared() {
        let workspace = Workspace { root: "/w".into(), whole: false };
        let dir = tempfile::tempdir().unwrap();
        let script = format!("echo >>{0}/runs; echo talk; echo {0}", dir.path().display());
        let extra =
            format!("prepare = ['sh', '-c', '{script}']\nlines = true\nenv = {{ REPO = '{{repo}}/r' }}");
        let mut entries = vec![entry(&extra), entry(&extra)];
        entries.iter_mut().for_each(|e| e.run = Some(vec!["{prepared}/x".into()]));
        let plan = Plan::new(entries, &workspace, |_| None).unwrap();
        assert_eq!(plan.spec.jobs[1].command, [format!("{}/x", dir.path().display())]);
        assert_eq!(plan.spec.jobs[0].env["REPO"], "/w/r");
        assert_eq!(plan.kinds, [Kind::TestProgram, Kind::TestProgram]);
        assert!(plan.spec.shares.iter().any(|s| s.guest == dir.path()));
        assert_eq!(std::fs::read_to_string(dir.path().join("runs")).unwrap(), "\n");
        let failing = entry("prepare = ['false']");
        assert!(Plan::new(vec![failing], &workspace, |_| None).is_err());
    }
}
