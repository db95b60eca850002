//! The workspace's own programs, built by cargo, which also says where they are.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// A test program.
#[derive(Debug, Clone)]
pub struct TestProgram {
    /// `lib`, `bin`, or an integration test's name.
    pub target: String,
    pub path: PathBuf,
}

/// Where cargo and its results are.
#[derive(Debug)]
pub struct Workspace {
    pub root: PathBuf,
    /// Build everything in one go, as `make unit` does: crates are compiled once for both.
    pub whole: bool,
}

/// A line of `--message-format=json`; the other kinds of lines lack one of these fields.
#[derive(Deserialize)]
struct Artifact {
    package_id: String,
    target: Target,
    profile: Profile,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

impl Workspace {
    /// The workspace of the current directory.
    pub fn find(whole: bool) -> Result<Self> {
        let out = Command::new("cargo")
            .args(["locate-project", "--workspace", "--message-format", "plain"])
            .stderr(Stdio::inherit())
            .output()
            .context("run cargo")?;
        let manifest = PathBuf::from(String::from_utf8_lossy(&out.stdout).trim());
        match manifest.parent() {
            Some(root) if out.status.success() => Ok(Self { root: root.to_owned(), whole }),
            _ => bail!("the test bed's tests are run from a checkout of the repository"),
        }
    }

    /// Builds the test programs of a package.
    pub fn tests(&self, package: &str) -> Result<Vec<TestProgram>> {
        let selection = if self.whole { vec!["--workspace"] } else { vec!["-p", package] };
        let artifacts = self.cargo(&[&["test", "--no-run"], &selection[..]].concat())?;
        Ok(artifacts
            .into_iter()
            .filter(|a| a.profile.test && is_of(&a.package_id, package))
            .filter_map(|a| {
                let target = match a.target.kind.first().map(String::as_str) {
                    Some("test") => a.target.name,
                    Some("bin") => "bin".into(),
                    Some("bench" | "example") => return None,
                    _ => "lib".into(),
                };
                Some(TestProgram { target, path: a.executable? })
            })
            .collect())
    }

    /// Builds a program.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        // Examples too: with the features that tests bring nothing is compiled anew after `make unit`.
        let selection = if self.whole {
            vec!["--workspace", "--bins", "--examples"]
        } else {
            vec!["-p", name, "--bin", name]
        };
        let artifacts = self.cargo(&[&["build"], &selection[..]].concat())?;
        let found = artifacts.into_iter().filter(|a| a.target.name == name && !a.profile.test);
        found
            .filter_map(|a| a.executable)
            .next()
            .with_context(|| format!("the workspace has no program {name}"))
    }

    fn cargo(&self, args: &[&str]) -> Result<Vec<Artifact>> {
        let out = Command::new("cargo")
            .args(args)
            .args(["--release", "--message-format=json-render-diagnostics"])
            .current_dir(&self.root)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .context("run cargo")?;
        if !out.status.success() {
            bail!("cargo {} failed ({})", args.join(" "), out.status);
        }
        let lines = String::from_utf8_lossy(&out.stdout);
        Ok(lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }
}

/// Package ids end in `/DIRECTORY#VERSION` or `/DIRECTORY#NAME@VERSION`.
fn is_of(id: &str, package: &str) -> bool {
    let name = id.rsplit_once('#').map_or(id, |(url, rest)| match rest.split_once('@') {
        Some((name, _)) => name,
        None => url.rsplit('/').next().unwrap_or(url),
    });
    name == package
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_known_by_their_ids() {
        assert!(is_of("path+file:///w/crates/block#nidus-block@0.1.0", "nidus-block"));
        assert!(is_of("path+file:///w/crates/guest-init#0.1.0", "guest-init"));
        assert!(!is_of("path+file:///w/crates/block#nidus-block@0.1.0", "block"));
    }

    #[test]
    fn lines_of_cargo_are_artifacts_or_not() {
        let line = r#"{"reason":"compiler-artifact","package_id":"p#a@1","manifest_path":"m",
            "target":{"kind":["test"],"crate_types":["bin"],"name":"t","src_path":"s","edition":"2024",
            "doc":false,"doctest":false,"test":true},"profile":{"opt_level":"2","test":true},
            "features":[],"filenames":["f"],"executable":"/f","fresh":true}"#;
        assert!(serde_json::from_str::<Artifact>(line).unwrap().profile.test);
        assert!(serde_json::from_str::<Artifact>(r#"{"reason":"build-finished","success":true}"#).is_err());
    }
}
