//! `testbed run`: one command in the machine.

use std::io::{Write, stderr, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::protocol::{End, Event, Frame, Job, Share, Spec};
use crate::vm::Vm;
use crate::{OWN_FAILURE, Size, image};

/// Exit code when the time was over, as timeout(1) has it.
const TIMED_OUT: u8 = 124;
/// For booting and going off, beside the job's own time.
pub const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// Options of `testbed run`.
#[derive(Args, Debug)]
pub struct Options {
    #[command(flatten)]
    size: Size,
    /// Seconds until the command is killed
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// A directory that the machine sees: DIR (at /share), or DIR:PATH; with :ro at the end it
    /// cannot be changed from there
    #[arg(long, value_parser = parse_share)]
    share: Vec<Share>,
    /// A variable for the command
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// Show what the machine's kernel says
    #[arg(long)]
    console: bool,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Boots the machine for one command and returns its exit code.
pub fn run(cache: &Path, options: Options) -> Result<ExitCode> {
    let mut guests: Vec<&PathBuf> = options.share.iter().map(|s| &s.guest).collect();
    guests.sort();
    if let Some(pair) = guests.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!("two directories cannot be shared at {}; give one another path", pair[0].display());
    }
    let image = image::ensure(cache)?;
    let job = Job {
        name: "command".into(),
        command: options.command,
        env: options.env.into_iter().collect(),
        timeout: options.timeout,
    };
    let spec = Spec { shares: options.share, jobs: vec![job] };
    let end = Instant::now() + Duration::from_secs(options.timeout) + BOOT_LIMIT;
    let mut vm = Vm::boot(&image, &options.size, &spec, options.console)?;
    let mut ended = None;
    loop {
        match vm.next(end)? {
            None => bail!("the machine did not answer in time and was killed; {}", vm.console()),
            Some(Frame::Out(bytes)) => show(stdout(), &bytes)?,
            Some(Frame::Err(bytes)) => show(stderr(), &bytes)?,
            Some(Frame::Event(Event::Ended(_, how, _))) => ended = Some(how),
            Some(Frame::Event(Event::Note(text))) => eprintln!("testbed: {text}"),
            Some(Frame::Event(Event::Finished)) => break,
            Some(Frame::Event(Event::Up | Event::Started(_))) => {}
        }
    }
    let code = match ended {
        Some(End::Exited(code)) => u8::try_from(code).unwrap_or(OWN_FAILURE),
        // As shells have it.
        Some(End::Killed(signal)) => u8::try_from(128 + signal).unwrap_or(OWN_FAILURE),
        Some(End::TimedOut) => {
            eprintln!("testbed: the command was killed after {} s", options.timeout);
            TIMED_OUT
        }
        Some(how @ End::NotStarted(_)) => bail!("the command was {how}"),
        None => bail!("the machine ran no command; {}", vm.console()),
    };
    vm.finish(end)?;
    Ok(ExitCode::from(code))
}

fn show(mut to: impl Write, bytes: &[u8]) -> Result<()> {
    to.write_all(bytes).and_then(|()| to.flush()).context("pass the command's output on")
}

fn parse_share(text: &str) -> Result<Share> {
    let (text, read_only) = match text.strip_suffix(":ro") {
        Some(rest) => (rest, true),
        None => (text, false),
    };
    let (host, guest) = text.split_once(':').unwrap_or((text, "/share"));
    if !guest.starts_with('/') {
        bail!("the path in the machine must begin with /");
    }
    let host = Path::new(host).canonicalize().with_context(|| format!("cannot find {host}"))?;
    Ok(Share { host, guest: guest.into(), read_only })
}

fn parse_variable(text: &str) -> Result<(String, String)> {
    let (name, value) = text.split_once('=').context("a variable is given as NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read() {
        let share = |guest: &str, read_only| Share { host: "/tmp".into(), guest: guest.into(), read_only };
        assert_eq!(parse_share("/tmp").unwrap(), share("/share", false));
        assert_eq!(parse_share("/tmp:ro").unwrap(), share("/share", true));
        assert_eq!(parse_share("/tmp:/x:ro").unwrap(), share("/x", true));
        assert!(parse_share("/tmp:x").is_err());
        assert!(parse_share("/nonexistent/dir").is_err());
    }
}
