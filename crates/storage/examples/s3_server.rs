//! An S3 server for tests: `cargo run --release -p nidus-storage --example s3_server -- --root DIR`.
//!
//! Prints `listening on http://ADDRESS` once it does. On SIGUSR1, and at its end by SIGTERM or
//! SIGINT, it prints to stderr how many requests it answered and how many bytes it sent.

use std::{net::SocketAddr, path::PathBuf, sync::atomic::Ordering::Relaxed, time::Duration};

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

#[path = "../tests/support/s3.rs"]
mod s3;

/// An S3 server on a directory, with latency and failures on demand.
#[derive(Parser)]
struct Args {
    /// Where the buckets lie
    #[arg(long)]
    root: PathBuf,
    /// A bucket that is made if it is absent
    #[arg(long, default_value = "nidus")]
    bucket: String,
    /// Where to listen; port 0 takes any
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The id of the access key
    #[arg(long, default_value = "test")]
    access_key: String,
    /// The secret access key
    #[arg(long, default_value = "test-secret")]
    secret_key: String,
    /// Milliseconds added to every request
    #[arg(long, default_value_t = 0)]
    latency_ms: u64,
    /// Answers every n-th request with 503; 0 none
    #[arg(long, default_value_t = 0)]
    fail_every: u64,
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let args = Args::parse();
    std::fs::create_dir_all(args.root.join(&args.bucket))?;
    let mut signals =
        [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::user_defined1()].map(signal);
    let server = s3::Server::start(
        args.listen,
        s3::Config {
            root: args.root,
            access_key: args.access_key,
            secret_key: args.secret_key,
            latency: Duration::from_millis(args.latency_ms),
            fail_every: args.fail_every,
        },
    )
    .await?;
    println!("listening on {}", server.endpoint());
    let [Ok(terminate), Ok(interrupt), Ok(report)] = &mut signals else {
        return Err(std::io::Error::other("cannot listen for signals"));
    };
    loop {
        let ended = tokio::select! {
            _ = terminate.recv() => true,
            _ = interrupt.recv() => true,
            _ = report.recv() => false,
        };
        let count = &server.counters;
        eprintln!("requests={} sent={}", count.requests.load(Relaxed), count.sent.load(Relaxed));
        if ended {
            return Ok(());
        }
    }
}
