//! The daemon in the guest: runs processes and serves files for the host and the SDKs.
//!
//! One thread runs everything but file work, which goes to a small pool: guests are small, and
//! `POST /init` is on the path of every sandbox's start.

mod auth;
mod body;
mod files;
mod filesystem;
mod flags;
mod init;
mod metrics;
mod mounts;
mod paths;
mod process;
mod reply;
mod rpc;
mod server;
mod state;
mod system;
mod users;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use flags::{Action, Flags};
use state::State;

/// Threads for file work; each costs memory only while it is used.
const FILE_THREADS: usize = 64;
const FILE_THREAD_IDLE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let flags = match flags::parse(std::env::args().skip(1)) {
        Ok(Action::Run(flags)) => flags,
        Ok(Action::Print(text)) => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(reason) => {
            eprintln!("envd: {reason}");
            return ExitCode::from(2);
        }
    };
    match run(flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("envd: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: Flags) -> Result<(), String> {
    system::set_umask();
    if flags.system {
        system::protect_from_oom_killer();
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(FILE_THREADS)
        .thread_keep_alive(FILE_THREAD_IDLE)
        .build()
        .map_err(|e| format!("cannot start the runtime: {e}"))?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let address = SocketAddr::new(flags.listen, flags.port);
        let listener = server::listen(address).map_err(|e| format!("cannot listen on {address}: {e}"))?;
        if let Ok(bound) = listener.local_addr() {
            eprintln!("envd: listening on {bound}");
        }
        server::serve(listener, Arc::new(State::new(flags.system))).await;
        Ok(())
    })
}
