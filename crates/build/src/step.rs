//! The instructions of a build.

use std::collections::BTreeMap;

/// An instruction, as clients send it: a kind and words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Run a line of shell.
    Run {
        /// The line.
        command: String,
        /// User; the context's when not set.
        user: Option<String>,
    },
    /// Copy uploaded files.
    Copy {
        /// Path or pattern in the upload.
        source: String,
        /// Where to.
        target: String,
        /// Owner; the context's user when not set.
        owner: Option<String>,
        /// Permissions.
        mode: Option<u32>,
    },
    /// Set variables, for later steps and in sandboxes.
    Env(Vec<(String, String)>),
    /// Set variables for later steps.
    Arg(Vec<(String, String)>),
    /// Change the directory; it is made.
    Workdir(String),
    /// Change the user, who is made if there is none.
    User(String),
}

/// An instruction that cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StepError {
    /// The kind is not known.
    #[error("'{0}' is no instruction: RUN, COPY, ENV, ARG, WORKDIR and USER are")]
    Unknown(String),
    /// The words do not fit.
    #[error("{kind} {reason}")]
    Words {
        /// The kind.
        kind: &'static str,
        /// What is wrong.
        reason: String,
    },
}

impl Step {
    /// Reads kind and words.
    ///
    /// # Errors
    /// [`StepError`] that says what is wrong.
    pub fn parse(kind: &str, args: &[String]) -> Result<Self, StepError> {
        let kind = kind.to_ascii_uppercase();
        let words = |kind, reason: &str| Err(StepError::Words { kind, reason: reason.to_owned() });
        let text = |n: usize| args.get(n).map(String::as_str).unwrap_or_default();
        let some = |n: usize| args.get(n).filter(|a| !a.is_empty()).cloned();
        match kind.as_str() {
            "RUN" if text(0).trim().is_empty() => words("RUN", "has no command"),
            "RUN" => Ok(Self::Run { command: text(0).to_owned(), user: some(1).map(user).transpose()? }),
            "COPY" | "ADD" => {
                let (Some(source), Some(target)) = (some(0), some(1)) else {
                    return words("COPY", "needs a source and a target");
                };
                let parse = |m: String| u32::from_str_radix(&m, 8).ok().filter(|m| *m <= 0o7777);
                let mode = match some(3) {
                    None => None,
                    Some(m) => match parse(m.clone()) {
                        Some(mode) => Some(mode),
                        None => return words("COPY", &format!("'{m}' are no permissions")),
                    },
                };
                Ok(Self::Copy { source, target, owner: some(2).map(user).transpose()?, mode })
            }
            "ENV" | "ARG" => {
                let kind = if kind == "ENV" { "ENV" } else { "ARG" };
                if args.is_empty() || !args.len().is_multiple_of(2) {
                    return words(kind, "needs names and values in turn");
                }
                let pairs: Vec<_> = args.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
                let bad =
                    pairs.iter().find(|(n, v)| n.is_empty() || n.contains(['=', '\0']) || v.contains('\0'));
                if let Some((name, _)) = bad {
                    return words(kind, &format!("'{}' is no name of a variable", name.escape_debug()));
                }
                Ok(if kind == "ENV" { Self::Env(pairs) } else { Self::Arg(pairs) })
            }
            "WORKDIR" => match some(0) {
                Some(dir) if !dir.contains('\0') => Ok(Self::Workdir(dir)),
                _ => words("WORKDIR", "needs a directory"),
            },
            "USER" => match some(0) {
                Some(name) => Ok(Self::User(user(name)?)),
                None => words("USER", "needs a name"),
            },
            _ => Err(StepError::Unknown(kind.chars().filter(|c| !c.is_control()).take(40).collect())),
        }
    }

    /// All that tells it from another one.
    pub(crate) fn words(&self) -> Vec<String> {
        let pairs = |kind: &str, pairs: &[(String, String)]| {
            let words = pairs.iter().flat_map(|(n, v)| [n.clone(), v.clone()]);
            std::iter::once(kind.to_owned()).chain(words).collect()
        };
        let optional = |o: &Option<String>| o.clone().unwrap_or_default();
        match self {
            Self::Run { command, user } => vec!["RUN".into(), command.clone(), optional(user)],
            Self::Copy { source, target, owner, mode } => {
                let mode = mode.map(|m| format!("{m:o}")).unwrap_or_default();
                vec!["COPY".into(), source.clone(), target.clone(), optional(owner), mode]
            }
            Self::Env(p) => pairs("ENV", p),
            Self::Arg(p) => pairs("ARG", p),
            Self::Workdir(dir) => vec!["WORKDIR".into(), dir.clone()],
            Self::User(user) => vec!["USER".into(), user.clone()],
        }
    }

    /// As it is shown.
    pub fn title(&self) -> String {
        let pairs = |pairs: &[(String, String)]| {
            let shown: Vec<String> = pairs.iter().map(|(n, v)| format!("{n}={v}")).collect();
            shown.join(" ")
        };
        let text = match self {
            Self::Run { command, user: None } => format!("RUN {command}"),
            Self::Run { command, user: Some(user) } => format!("RUN [{user}] {command}"),
            Self::Copy { source, target, .. } => format!("COPY {source} {target}"),
            Self::Env(p) => format!("ENV {}", pairs(p)),
            Self::Arg(p) => format!("ARG {}", pairs(p)),
            Self::Workdir(dir) => format!("WORKDIR {dir}"),
            Self::User(user) => format!("USER {user}"),
        };
        let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        if line.chars().count() > 200 {
            format!("{}…", line.chars().take(199).collect::<String>())
        } else {
            line
        }
    }
}

/// Names of users and groups are words of a command line, with a colon between.
fn user(name: String) -> Result<String, StepError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':');
    if name.len() > 64 || name.starts_with('-') || !name.chars().all(plain) {
        let shown: String = name.chars().filter(|c| !c.is_control()).take(64).collect();
        return Err(StepError::Words { kind: "USER", reason: format!("'{shown}' is no name of a user") });
    }
    Ok(name)
}

/// `path` below `dir`, unless it is absolute; without `.` and `..`.
pub(crate) fn join(dir: &str, path: &str) -> String {
    let whole = if path.starts_with('/') { path.to_owned() } else { format!("{dir}/{path}") };
    let mut parts: Vec<&str> = Vec::new();
    for part in whole.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// The environment of a step: arguments give way to what is set for good.
pub(crate) fn environment(
    env: &BTreeMap<String, String>,
    args: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let mut all = args.clone();
    all.extend(env.clone());
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(kind: &str, args: &[&str]) -> Result<Step, StepError> {
        Step::parse(kind, &args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn instructions_are_read_as_the_sdks_send_them() {
        assert_eq!(
            parse("RUN", &["pip install x", "root"]),
            Ok(Step::Run { command: "pip install x".into(), user: Some("root".into()) })
        );
        let copy = |owner: Option<&str>, mode| Step::Copy {
            source: "a".into(),
            target: "/b".into(),
            owner: owner.map(Into::into),
            mode,
        };
        assert_eq!(parse("COPY", &["a", "/b", "", ""]), Ok(copy(None, None)));
        assert_eq!(parse("COPY", &["a", "/b", "root", "0755"]), Ok(copy(Some("root"), Some(0o755))));
        assert_eq!(parse("ENV", &["A", "1", "B", ""]).unwrap().title(), "ENV A=1 B=");
        assert_eq!(parse("workdir", &["/x"]), Ok(Step::Workdir("/x".into())));
        assert_eq!(parse("USER", &["me"]), Ok(Step::User("me".into())));
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_reason() {
        for (kind, args, text) in [
            ("RUN", &[][..], "RUN has no command"),
            ("RUN", &["x", "a b"], "no name of a user"),
            ("COPY", &["a"], "needs a source and a target"),
            ("COPY", &["a", "b", "", "rwx"], "no permissions"),
            ("COPY", &["a", "b", "", "77777"], "no permissions"),
            ("ENV", &["A"], "in turn"),
            ("ENV", &["A=B", "1"], "no name of a variable"),
            ("USER", &["-x"], "no name of a user"),
            ("USER", &["$(reboot)"], "no name of a user"),
            ("HEALTHCHECK", &["x"], "is no instruction"),
        ] {
            let e = parse(kind, args).unwrap_err().to_string();
            assert!(e.contains(text), "{kind} {args:?}: {e}");
        }
    }

    #[test]
    fn directories_are_joined_as_in_a_shell() {
        assert_eq!(join("/home/user", "app"), "/home/user/app");
        assert_eq!(join("/a/b", "../c/./d"), "/a/c/d");
        assert_eq!(join("/a", "/x/"), "/x");
        assert_eq!(join("/a", "../../.."), "/");
    }
}
