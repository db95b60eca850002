//! Dockerfiles, as far as a template can be built of one.
//!
//! One stage; FROM, RUN, COPY, ADD of local files, ENV, ARG, WORKDIR, USER, CMD, ENTRYPOINT and HEALTHCHECK; what only concerns images (LABEL,
//! EXPOSE and such) is left out with a warning, and anything else is an error that names its line.
//! Format: [Dockerfile reference](https://docs.docker.com/reference/dockerfile/).

use std::collections::BTreeMap;

use crate::env::{expand, expand_known, literal, lookup};

/// Most bytes of a Dockerfile.
const MAX_BYTES: usize = 1 << 20;

/// A Dockerfile that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("Dockerfile line {line}: {reason}")]
pub struct DockerfileError {
    /// Line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

/// What COPY copies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopySource {
    /// Paths or patterns in the context.
    pub sources: Vec<String>,
    /// Where to.
    pub target: String,
    /// Owner.
    pub owner: Option<String>,
    /// Permissions, octal.
    pub mode: Option<String>,
}

/// An instruction that does something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Instruction {
    /// A line of shell.
    Run(String),
    /// Files.
    Copy(CopySource),
    /// Variables for good.
    Env(Vec<(String, String)>),
    /// Variables for the build.
    Arg(Vec<(String, String)>),
    /// Directory.
    Workdir(String),
    /// User.
    User(String),
}

/// A Dockerfile that was read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dockerfile {
    /// Image, `scratch` excepted.
    pub from: String,
    /// What is done, in order.
    pub instructions: Vec<Instruction>,
    /// ENTRYPOINT and CMD as a line of shell.
    pub start: Option<String>,
    /// HEALTHCHECK's command as a line of shell: it tells when what was started is ready.
    pub ready: Option<String>,
    /// What is left out, for people.
    pub warnings: Vec<String>,
}

struct Line {
    number: usize,
    text: String,
    /// Here-documents that follow it.
    documents: Vec<String>,
}

impl Dockerfile {
    /// Reads one; `args` are the values of `--build-arg`.
    ///
    /// # Errors
    /// With the line and what is wrong with it.
    pub fn parse(text: &str, args: &BTreeMap<String, String>) -> Result<Self, DockerfileError> {
        if text.len() > MAX_BYTES {
            return Err(DockerfileError { line: 1, reason: format!("it has more than {MAX_BYTES} bytes") });
        }
        let mut file = Self::default();
        // Of ARG before FROM, and of what came after it.
        let (mut global, mut known) = (BTreeMap::new(), BTreeMap::<String, String>::new());
        let (mut entrypoint, mut cmd) = (None, None);
        let mut escape = '\\';
        for line in logical_lines(text, &mut escape)? {
            let error = |reason: String| DockerfileError { line: line.number, reason };
            let (word, rest) = line.text.split_once(char::is_whitespace).unwrap_or((&line.text, ""));
            let rest = rest.trim();
            let replace = |text: &str| expand(text, &|n| lookup(&[&known], n));
            // What the image sets is known where it is built alone.
            let later = |text: &str| expand_known(text, &|n| lookup(&[&known], n));
            let word = word.to_ascii_uppercase();
            if file.from.is_empty() && !matches!(word.as_str(), "FROM" | "ARG") {
                return Err(error(format!("{word} before FROM")));
            }
            match word.as_str() {
                "FROM" if !file.from.is_empty() => {
                    return Err(error("a second FROM: builds with several stages are not supported".into()));
                }
                "FROM" => {
                    let image = expand(rest, &|n| lookup(&[&global], n));
                    // A list of packages (debian:SUITE,PACKAGE,...) may go over several lines.
                    let pieces: Vec<&str> = image.split(',').map(str::trim).collect();
                    let image = pieces.join(",");
                    let words: Vec<&str> =
                        image.split_whitespace().filter(|w| !w.starts_with("--")).collect();
                    match words.as_slice() {
                        ["scratch", ..] => return Err(error("FROM scratch has no system to run in".into())),
                        [image] => file.from = (*image).to_owned(),
                        [image, keyword, _] if keyword.eq_ignore_ascii_case("as") => {
                            file.from = (*image).to_owned()
                        }
                        _ => return Err(error("FROM takes the name of an image".into())),
                    }
                }
                "ARG" => {
                    let mut pairs = Vec::new();
                    for part in words(rest).map_err(&error)? {
                        let (name, default) = match part.split_once('=') {
                            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                            None => (part, None),
                        };
                        let from = if file.from.is_empty() { &global } else { &known };
                        let default = default.map(|d| expand(&d, &|n| lookup(&[from], n)));
                        let value =
                            args.get(&name).cloned().or(default).or_else(|| global.get(&name).cloned());
                        if let Some(value) = value {
                            pairs.push((name, value));
                        }
                    }
                    if file.from.is_empty() {
                        global.extend(pairs);
                    } else if !pairs.is_empty() {
                        let literals = pairs.iter().map(|(n, v)| (n.clone(), literal(v))).collect();
                        known.extend(pairs);
                        file.instructions.push(Instruction::Arg(literals));
                    }
                }
                "ENV" => {
                    let pairs = env_pairs(rest).map_err(&error)?;
                    let pairs: Vec<_> = pairs.into_iter().map(|(n, v)| (n, later(&v))).collect();
                    for (name, value) in &pairs {
                        let whole = expand(value, &|_| None);
                        if literal(&whole) == *value {
                            known.insert(name.clone(), whole);
                        } else {
                            known.remove(name);
                        }
                    }
                    file.instructions.push(Instruction::Env(pairs));
                }
                "RUN" => {
                    let (flags, command) = flags(rest);
                    if let Some(flag) = flags.first() {
                        file.warnings.push(format!("line {}: RUN {flag} has no effect", line.number));
                    }
                    let command = match (&line.documents[..], exec_form(command)) {
                        ([document, ..], _) if command.starts_with("<<") => document.clone(),
                        ([document, ..], _) => format!("{command}\n{document}"),
                        (_, Some(words)) => shell_line(&words),
                        _ => command.to_owned(),
                    };
                    if command.trim().is_empty() {
                        return Err(error("RUN has no command".into()));
                    }
                    file.instructions.push(Instruction::Run(command));
                }
                "COPY" | "ADD" => {
                    let copy = copy(&word, rest, &replace, &later).map_err(&error)?;
                    if !line.documents.is_empty() {
                        return Err(error(format!("{word} of a here-document is not supported")));
                    }
                    file.instructions.push(Instruction::Copy(copy));
                }
                "WORKDIR" => file.instructions.push(Instruction::Workdir(later(rest.trim_matches('"')))),
                "USER" => file.instructions.push(Instruction::User(replace(rest))),
                "CMD" => cmd = Some(command_line(rest)),
                "ENTRYPOINT" => entrypoint = Some(command_line(rest)),
                "HEALTHCHECK" => {
                    // Its options are times of a check that goes on for ever.
                    let (_, check) = flags(rest);
                    let (kind, command) = check.split_once(char::is_whitespace).unwrap_or((check, ""));
                    file.ready = match kind.to_ascii_uppercase().as_str() {
                        "NONE" => None,
                        "CMD" if !command.trim().is_empty() => Some(command_line(command.trim())),
                        _ => return Err(error("HEALTHCHECK takes CMD and a command, or NONE".into())),
                    };
                }
                "LABEL" | "MAINTAINER" | "EXPOSE" | "STOPSIGNAL" | "VOLUME" | "SHELL" => {
                    file.warnings.push(format!("line {}: {word} has no meaning for a template", line.number));
                }
                _ => {
                    let word: String = word.chars().filter(|c| !c.is_control()).take(40).collect();
                    return Err(error(format!("'{word}' is no instruction that is known")));
                }
            }
        }
        if file.from.is_empty() {
            return Err(DockerfileError { line: 1, reason: "it has no FROM".into() });
        }
        file.start = match (entrypoint, cmd) {
            (Some(e), Some(c)) => Some(format!("{e} {c}")),
            (e, c) => e.or(c),
        };
        Ok(file)
    }
}

/// Lines with their continuations, comments left out, and the here-documents that belong to them.
fn logical_lines(text: &str, escape: &mut char) -> Result<Vec<Line>, DockerfileError> {
    let mut lines: Vec<Line> = Vec::new();
    let mut open: Option<Line> = None;
    let mut source = text.trim_start_matches('\u{feff}').lines().enumerate();
    let mut directives = true;
    while let Some((n, raw)) = source.next() {
        let trimmed = raw.trim();
        if let Some(comment) = trimmed.strip_prefix('#') {
            if directives
                && let Some((name, value)) = comment.split_once('=')
                && name.trim().eq_ignore_ascii_case("escape")
            {
                *escape = value.trim().chars().next().unwrap_or('\\');
            }
            continue;
        }
        directives = false;
        if trimmed.is_empty() {
            continue;
        }
        let (part, goes_on) = match trimmed.strip_suffix(*escape) {
            Some(part) => (part.trim_end(), true),
            None => (trimmed, false),
        };
        let line =
            open.get_or_insert_with(|| Line { number: n + 1, text: String::new(), documents: Vec::new() });
        if !line.text.is_empty() {
            line.text.push(' ');
        }
        line.text.push_str(part);
        if goes_on {
            continue;
        }
        let Some(mut line) = open.take() else { continue };
        for name in document_names(&line.text) {
            let mut document = String::new();
            let mut ended = false;
            for (_, raw) in source.by_ref() {
                if raw.trim_start_matches('\t') == name {
                    ended = true;
                    break;
                }
                document.push_str(raw);
                document.push('\n');
            }
            if !ended {
                let reason = format!("the here-document {name} has no end");
                return Err(DockerfileError { line: line.number, reason });
            }
            line.documents.push(document);
        }
        lines.push(line);
    }
    lines.extend(open);
    Ok(lines)
}

/// `<<NAME`, `<<-NAME`, `<<"NAME"` in RUN and COPY.
fn document_names(text: &str) -> Vec<String> {
    let word = text.split_whitespace().next().unwrap_or_default();
    if !["RUN", "COPY", "ADD"].iter().any(|w| word.eq_ignore_ascii_case(w)) {
        return Vec::new();
    }
    let names = text.split_whitespace().skip(1).filter_map(|w| w.strip_prefix("<<"));
    let names = names.map(|n| n.trim_start_matches('-').trim_matches(['"', '\'']).to_owned());
    names.filter(|n| !n.is_empty() && n.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')).collect()
}

/// Leading `--name[=value]`.
fn flags(text: &str) -> (Vec<&str>, &str) {
    let mut flags = Vec::new();
    let mut rest = text;
    while rest.starts_with("--") {
        let (flag, after) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        flags.push(flag);
        rest = after.trim_start();
    }
    (flags, rest)
}

fn exec_form(text: &str) -> Option<Vec<String>> {
    text.starts_with('[').then(|| serde_json::from_str(text).ok()).flatten()
}

fn shell_line(words: &[String]) -> String {
    let quoted: Vec<String> = words.iter().map(|w| quote(w)).collect();
    quoted.join(" ")
}

fn command_line(text: &str) -> String {
    exec_form(text).map_or_else(|| text.to_owned(), |words| shell_line(&words))
}

/// A word as the shell reads it back.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// `replace` is for what is needed here, `later` for what is read where it is built.
fn copy(
    word: &str,
    text: &str,
    replace: &dyn Fn(&str) -> String,
    later: &dyn Fn(&str) -> String,
) -> Result<CopySource, String> {
    let (flags, rest) = flags(text);
    let (mut owner, mut mode) = (None, None);
    for flag in flags {
        match flag.split_once('=') {
            Some(("--chown", value)) => owner = Some(replace(value)),
            Some(("--chmod", value)) => mode = Some(value.to_owned()),
            Some(("--from", _)) => return Err("COPY --from is not supported: there is one stage".into()),
            _ if flag == "--link" || flag.starts_with("--link=") => {}
            _ => return Err(format!("{word} {flag} is not supported")),
        }
    }
    let mut paths = match exec_form(rest) {
        Some(paths) => paths,
        None => words(rest)?,
    };
    let target = paths.pop().ok_or_else(|| format!("{word} needs a source and a target"))?;
    let target = later(&target);
    paths.iter_mut().for_each(|p| *p = replace(p));
    if paths.is_empty() {
        return Err(format!("{word} needs a source and a target"));
    }
    if paths.iter().any(|p| p.contains("://") || p.starts_with("git@")) {
        return Err(format!("{word} of an address is not supported: use RUN with curl or git"));
    }
    // In a Dockerfile a path from the root is one from the context's.
    let sources = paths.into_iter().map(|p| p.trim_start_matches('/').to_owned());
    let sources = sources.map(|p| if p.is_empty() { ".".to_owned() } else { p }).collect();
    Ok(CopySource { sources, target, owner, mode })
}

/// `NAME=VALUE ...`, or the old `NAME VALUE`.
fn env_pairs(text: &str) -> Result<Vec<(String, String)>, String> {
    let first = text.split_whitespace().next().unwrap_or_default();
    if !first.contains('=') {
        let (name, value) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        if name.is_empty() {
            return Err("ENV needs a name and a value".into());
        }
        return Ok(vec![(name.to_owned(), value.trim().to_owned())]);
    }
    let pair = |w: String| match w.split_once('=') {
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None => Err(format!("ENV: '{w}' has no value")),
    };
    words(text)?.into_iter().map(pair).collect()
}

/// Words with quotes taken away; variables stay.
fn words(text: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (Some('\''), c) => word.get_or_insert_default().push(c),
            (_, '\\') => match chars.next() {
                // A dollar is kept from being a variable's later on.
                Some('$') => word.get_or_insert_default().push_str("\\$"),
                Some(c) => word.get_or_insert_default().push(c),
                None => word.get_or_insert_default().push('\\'),
            },
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err("a quote is not closed".into());
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Dockerfile, DockerfileError> {
        Dockerfile::parse(text, &BTreeMap::from([("V".to_owned(), "9".to_owned())]))
    }

    #[test]
    fn packages_of_debian_over_several_lines() {
        let file = parse("FROM debian:bookworm,\\\n  gcc, \\\n  git AS x\nHEALTHCHECK NONE\n").unwrap();
        assert_eq!((file.from.as_str(), file.ready), ("debian:bookworm,gcc,git", None));
        assert!(parse("FROM x\nHEALTHCHECK curl\n").is_err());
    }

    #[test]
    fn an_ordinary_dockerfile() {
        let file = parse(
            "# syntax=docker/dockerfile:1\nARG BASE=3.12\nFROM --platform=linux/amd64 python:${BASE} AS app\n\n\
             ARG V=1 BASE\nENV A=1 B=\"two words\" P=$V\nENV OLD some value\nWORKDIR /app\n\
             COPY --chown=me:us --chmod=755 a.txt 'b c' ./dir/\nCOPY [\"x y\", \"/z\"]\n\
             RUN apt-get update && \\\n    # a comment inside\n    apt-get install -y x\nRUN [\"echo\", \"a b\"]\n\
             RUN <<EOF\nset -e\necho hi\nEOF\nLABEL a=b\nUSER me\n\
             HEALTHCHECK --interval=5s CMD curl -f http://localhost/\nENTRYPOINT [\"python\"]\nCMD [\"-m\", \"x y\"]\n",
        )
        .unwrap();
        let s = str::to_owned;
        assert_eq!(file.from, "python:3.12");
        assert_eq!(file.start.as_deref(), Some("python -m 'x y'"));
        assert_eq!(file.ready.as_deref(), Some("curl -f http://localhost/"));
        assert_eq!(file.warnings.len(), 1);
        assert_eq!(
            file.instructions,
            [
                Instruction::Arg(vec![(s("V"), s("9")), (s("BASE"), s("3.12"))]),
                Instruction::Env(vec![(s("A"), s("1")), (s("B"), s("two words")), (s("P"), s("9"))]),
                Instruction::Env(vec![(s("OLD"), s("some value"))]),
                Instruction::Workdir(s("/app")),
                Instruction::Copy(CopySource {
                    sources: vec![s("a.txt"), s("b c")],
                    target: s("./dir/"),
                    owner: Some(s("me:us")),
                    mode: Some(s("755")),
                }),
                Instruction::Copy(CopySource {
                    sources: vec![s("x y")],
                    target: s("/z"),
                    owner: None,
                    mode: None
                }),
                Instruction::Run(s("apt-get update && apt-get install -y x")),
                Instruction::Run(s("echo 'a b'")),
                Instruction::Run(s("set -e\necho hi\n")),
                Instruction::User(s("me")),
            ]
        );
    }

    #[test]
    fn variables_of_the_image_are_left_to_those_who_have_it() {
        let file = parse(
            "FROM a\nARG V\nENV PATH=/opt/$V:$PATH Q=\\$V\nENV R=$PATH S=$Q\nWORKDIR $HOME/$V\nCOPY $V $HOME/x$V\n",
        );
        let pair = |n: &str, v: &str| (n.to_owned(), v.to_owned());
        let file = file.unwrap();
        assert_eq!(
            file.instructions[1..4],
            [
                Instruction::Env(vec![pair("PATH", "/opt/9:$PATH"), pair("Q", r"\$V")]),
                Instruction::Env(vec![pair("R", "$PATH"), pair("S", r"\$V")]),
                Instruction::Workdir("$HOME/9".into()),
            ]
        );
        let Instruction::Copy(copy) = &file.instructions[4] else { panic!("{file:?}") };
        assert_eq!((copy.sources[0].as_str(), copy.target.as_str()), ("9", "$HOME/x9"));
    }

    #[test]
    fn what_cannot_be_built_is_named_with_its_line() {
        for (text, line, reason) in [
            ("", 1, "no FROM"),
            ("RUN x", 1, "before FROM"),
            ("FROM scratch", 1, "scratch"),
            ("FROM a\nFROM b", 2, "several stages"),
            ("FROM a\n\nCOPY --from=b /x /y", 3, "--from"),
            ("FROM a\nCOPY x", 2, "source and a target"),
            ("FROM a\nADD https://x/y /z", 2, "address"),
            ("FROM a\nRUN", 2, "no command"),
            ("FROM a\nONBUILD RUN x", 2, "no instruction"),
            ("FROM a\nENV A=\"x", 2, "quote"),
            ("FROM a\nRUN <<EOF\nx", 2, "no end"),
        ] {
            let e = parse(text).unwrap_err();
            assert!(e.line == line && e.reason.contains(reason), "{text}: {e}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(FROM a\n)?((RUN|COPY|ENV|ARG|ADD|CMD|FROM|USER) ?[ -~\n]{0,30}\n){0,5}") {
            let _ = parse(&text);
        }
    }
}
