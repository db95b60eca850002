//! Command-line flags.

use std::net::{IpAddr, Ipv4Addr};

use nidus_envd_protocol::{ENVD_PORT, ENVD_VERSION};

const HELP: &str = "\
envd: runs processes and serves files inside a sandbox

  --port PORT      TCP port to serve (default 49983; 0 takes a free one)
  --listen ADDR    address to serve (default 0.0.0.0)
  --no-system      leave the machine alone: POST /init does not set the clock, the host name,
                   the kernel's entropy or files in /etc (for tests outside a guest)
  --version        print the version of E2B's envd that this one behaves as
  --help           print this";

/// How to serve.
#[derive(Debug, PartialEq, Eq)]
pub struct Flags {
    pub port: u16,
    pub listen: IpAddr,
    /// Whether this process may change the machine it runs on.
    pub system: bool,
}

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    Run(Flags),
    Print(String),
}

/// Reads the arguments; the error is a sentence.
pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Action, String> {
    let mut flags = Flags { port: ENVD_PORT, listen: Ipv4Addr::UNSPECIFIED.into(), system: true };
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let (name, inline) = match arg.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (arg.as_str(), None),
        };
        let mut value = || inline.clone().or_else(|| args.next()).ok_or(format!("{name} needs a value"));
        match name {
            "--port" => {
                let text = value()?;
                flags.port = text.parse().map_err(|_| format!("'{text}' is not a port"))?;
            }
            "--listen" => {
                let text = value()?;
                flags.listen = text.parse().map_err(|_| format!("'{text}' is not an IP address"))?;
            }
            "--no-system" => flags.system = false,
            "--version" => return Ok(Action::Print(ENVD_VERSION.to_owned())),
            "--help" | "-h" => return Ok(Action::Print(HELP.to_owned())),
            _ => return Err(format!("unknown flag {arg} (try --help)")),
        }
    }
    Ok(Action::Run(flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<Action, String> {
        parse(args.iter().map(|a| (*a).to_owned()))
    }

    #[test]
    fn flags_and_their_errors() {
        let run = parsed(&["--port=0", "--listen", "::1", "--no-system"]);
        assert_eq!(run, Ok(Action::Run(Flags { port: 0, listen: "::1".parse().unwrap(), system: false })));
        assert_eq!(parsed(&["--port", "x"]), Err("'x' is not a port".into()));
        assert_eq!(parsed(&["--port"]), Err("--port needs a value".into()));
        assert_eq!(parsed(&["-x"]), Err("unknown flag -x (try --help)".into()));
    }
}
