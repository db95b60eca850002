//! The userfaultfd handler against a real process that hands over its memory as Firecracker does.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod child;
mod faults;
mod hostile;
mod live;
mod prefetch;
mod rig;
mod storage;

/// Not a test: what the child of each test runs, see `child`.
#[test]
#[ignore = "started by the other tests"]
fn child_process() {
    if let Some(directory) = child::directory() {
        child::run(&directory);
        // Without the test runner's closing words, which the parent does not read.
        std::process::exit(0);
    }
}
