//! The test bed: an emulated machine (QEMU's TCG with AMD SVM) in which KVM, kernel NBD and
//! Firecracker are real, whatever the host can do.
//!
//! One program plays all parts. On the host it makes the machine's image from Debian's packages
//! ([`image`]), boots it ([`vm`]) and runs one command ([`run`]) or the set of tests
//! ([`suite`]). In the machine it is the first process and runs the jobs ([`agent`]).

mod agent;
mod check;
mod image;
mod protocol;
mod run;
mod suite;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Exit code for failures of the test bed itself, apart from those of the command in it.
const OWN_FAILURE: u8 = 125;

#[derive(Parser)]
#[command(name = "testbed", about = "An emulated machine with real KVM and kernel NBD, for tests")]
struct Cli {
    /// Where images are kept
    #[arg(long, env = "NIDUS_TESTBED_DIR", default_value = "/var/cache/nidus-testbed", global = true)]
    dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make the machine's image if it is not there, and print its directory
    Image,
    /// Boot the machine, run a command in it as root, and exit with its exit code
    Run(run::Options),
    /// Boot the machine and run the set of tests in it
    Test(suite::Options),
    /// Boot Debian's kernel under /dev/kvm (meant for inside the machine)
    SelfCheck(check::Options),
    /// Run the jobs (started by the first process of the machine)
    #[command(hide = true)]
    Agent,
}

/// The machine's size.
#[derive(Args, Clone, Debug)]
struct Size {
    /// Memory in MiB; the host gives what is touched
    #[arg(long, default_value_t = 6144)]
    memory: u32,
    /// Virtual processors
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Give QEMU's monitor this socket, for a look at a machine that hangs ('info registers -a')
    #[arg(long, value_name = "SOCKET")]
    monitor: Option<PathBuf>,
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        agent::first_process();
    }
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Image => image::ensure(&cli.dir).map(|image| {
            println!("{}", image.dir.display());
            ExitCode::SUCCESS
        }),
        Command::Run(options) => run::run(&cli.dir, options),
        Command::Test(options) => suite::run(&cli.dir, options),
        Command::SelfCheck(options) => check::run(&options),
        Command::Agent => agent::run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("testbed: {error:#}");
        ExitCode::from(OWN_FAILURE)
    })
}
