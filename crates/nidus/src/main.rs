//! The `nidus` command: reads the configuration, wires the parts, speaks to people.

mod builds;
mod client;
mod command;
mod config;
mod doctor;
mod driver;
mod lock;
mod output;
mod recipe;
mod resuming;
mod serve;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use command::{env, fetch, gc, key, sandbox, team, template, volume};
use config::Config;
use output::Output;

/// Runs code that nobody trusts in microVMs that start in a fraction of a second.
#[derive(Debug, Parser)]
#[command(name = "nidus", version, arg_required_else_help = true, max_term_width = 100)]
struct Args {
    /// Configuration file
    #[arg(long, global = true, env = "NIDUS_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON for programs instead of tables for people
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run everything on this machine, in the foreground, until SIGTERM or Ctrl-C
    Serve {
        /// What runs the guests; auto takes Firecracker on a KVM that works, else QEMU
        #[arg(long, value_enum)]
        vmm: Option<config::VmmChoice>,
    },
    /// Say what works on this machine, and how to get what does not
    Doctor,
    /// Make, list and delete API keys
    #[command(subcommand)]
    Key(key::Key),
    /// Make, list, limit and block teams
    #[command(subcommand)]
    Team(team::Team),
    /// Print the variables that an SDK needs: eval "$(nidus env)"
    Env,
    /// Create, list, use and kill sandboxes
    #[command(subcommand)]
    Sandbox(sandbox::Sandbox),
    /// Build, list and delete templates
    #[command(subcommand)]
    Template(template::Template),
    /// Make, list and delete volumes, whose files outlive sandboxes
    #[command(subcommand)]
    Volume(volume::Volume),
    /// List the builds that nothing refers to, and delete them
    Gc(gc::Gc),
    /// Get what the base template is made of (kernel, root file system) for a host without a network
    Fetch(fetch::Fetch),
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print the configuration in effect, as a file that could be used for it
    Show,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(code) => code,
        Err(e) => {
            // One sentence: what was being done, then why not.
            eprintln!("nidus: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut config = Config::load(args.config.as_deref())?;
    if let Command::Serve { vmm: Some(vmm) } = args.command {
        config.vmm = vmm;
    }
    let out = Output { json: args.json };
    if let Command::Config(ConfigCommand::Show) = args.command {
        if out.json {
            out.value(&config)?;
        } else {
            print!("{}", toml::to_string_pretty(&config)?);
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Command::Serve { .. } = args.command {
        nidus_telemetry::init(config.log_format, &config.log)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        match args.command {
            Command::Serve { .. } => serve::run(&config).await.map(|()| ExitCode::SUCCESS),
            Command::Doctor => doctor::run(&config, out).await,
            Command::Key(c) => key::run(c, &config, out).await,
            Command::Team(c) => team::run(c, &config, out).await,
            Command::Env => env::run(&config, out).await,
            Command::Sandbox(c) => sandbox::run(c, &config, out).await,
            Command::Template(c) => template::run(c, &config, out).await,
            Command::Volume(c) => volume::run(c, &config, out).await,
            Command::Gc(c) => gc::run(c, &config, out).await,
            Command::Fetch(c) => fetch::run(c, &config, out).await,
            Command::Config(_) => Ok(ExitCode::SUCCESS),
        }
    });
    // A thread that waits for the terminal's input must not hold the end up.
    runtime.shutdown_background();
    result
}
