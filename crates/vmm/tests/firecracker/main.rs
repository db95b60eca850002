//! The Firecracker driver with a real Firecracker, a real KVM and a real kernel. This program is
//! also the guest's first process.
//!
//! NIDUS_FIRECRACKER names the program or a directory of versions; without it, and where KVM does not
//! run the guest's kernel, everything is skipped with the reason. In the test bed (NIDUS_TESTBED)
//! KVM must work.

// A test program, though not one of libtest's.
#![allow(clippy::unwrap_used, clippy::panic)]

mod bed;
mod guest;
mod host;
mod net;
mod pages;
mod scenario;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use bed::Bed;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

type Test = fn(&Bed) -> Result<(), Failed>;

const TESTS: &[(&str, Test)] = &[
    ("a_guest_boots_and_uses_memory_disk_and_network", scenario::boots),
    ("a_snapshot_resumes_with_its_memory_served", scenario::resumes_served),
    ("a_snapshot_resumes_with_its_memory_mapped", scenario::resumes_mapped),
    ("two_clones_of_a_snapshot_run_side_by_side", scenario::clones),
    ("a_diff_holds_what_was_written_and_nothing_else", scenario::diff),
    ("a_diff_on_its_base_resumes", scenario::diff_resumes),
    ("the_process_is_confined", scenario::confined),
    ("a_killed_vm_leaves_nothing", scenario::leaves_nothing),
    ("an_end_is_noticed_and_explained", scenario::ends),
    ("what_cannot_be_done_is_refused", scenario::refused),
    ("a_load_that_fails_says_why", scenario::bad_state),
    ("the_clock_can_move_on", scenario::clock),
    ("huge_pages", scenario::huge_pages),
];

fn main() -> ExitCode {
    if std::process::id() == 1 {
        guest::run();
    }
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    if arguments.list {
        let trials = TESTS.iter().map(|(name, _)| Trial::test(*name, || Ok(()))).collect();
        return libtest_mimic::run(&arguments, trials).exit_code();
    }
    let bed = ready();
    if let Ok(bed) = &bed {
        println!("{}", bed.about());
    }
    let trials = TESTS
        .iter()
        .map(|(name, test)| {
            let bed = bed.clone();
            Trial::ignorable_test(*name, move || match bed {
                Ok(bed) => test(&bed).map(|()| Completion::Completed),
                Err(NotReady::Skip(reason)) => Ok(Completion::ignored_with(reason)),
                Err(NotReady::Broken(reason)) => Err(reason.into()),
            })
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if let Ok(bed) = &bed {
        bed.close();
    }
    conclusion.exit_code()
}

/// Why the tests cannot run.
#[derive(Clone)]
enum NotReady {
    /// The host has not what they need.
    Skip(String),
    /// It should have.
    Broken(String),
}

fn ready() -> Result<Arc<Bed>, NotReady> {
    let Some(place) = std::env::var_os("NIDUS_FIRECRACKER").filter(|p| !p.is_empty()) else {
        return Err(NotReady::Skip("NIDUS_FIRECRACKER does not name a Firecracker".into()));
    };
    let in_testbed = std::env::var_os("NIDUS_TESTBED").is_some();
    match Bed::new(&PathBuf::from(place)) {
        Ok(bed) => Ok(Arc::new(bed)),
        Err(reason) if in_testbed => Err(NotReady::Broken(reason)),
        Err(reason) => Err(NotReady::Skip(reason)),
    }
}
