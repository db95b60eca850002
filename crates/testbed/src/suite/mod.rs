//! `testbed test`: the table of jobs in one boot of the machine, and the report.

mod jobs;
mod libtest;
mod plan;
mod programs;
mod report;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;

use crate::protocol::{End, Event, Frame};
use crate::run::BOOT_LIMIT;
use crate::vm::Vm;
use crate::{Size, image};
use libtest::Lines;
use plan::{Kind, Plan};
use programs::Workspace;
use report::{Outcome, Report};

/// How much output of a job is kept for the report.
const OUTPUT_KEPT: usize = 256 << 10;

/// Options of `testbed test`.
#[derive(Args, Debug)]
pub struct Options {
    #[command(flatten)]
    size: Size,
    /// Only the jobs with these names
    #[arg(long, value_name = "JOB")]
    only: Vec<String>,
    /// Another table of jobs than the test bed's own
    #[arg(long, value_name = "FILE")]
    jobs: Option<PathBuf>,
    /// Write the report there as JUnit's XML too
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Seconds for the whole run, from the machine's start
    #[arg(long, default_value_t = 1800)]
    timeout: u64,
    /// Build the tests of the whole workspace at once, as 'make unit' does
    #[arg(long)]
    workspace: bool,
    /// Show all output as it comes
    #[arg(long)]
    verbose: bool,
    /// Show what the machine's kernel says
    #[arg(long)]
    console: bool,
}

/// Runs the set. The exit code is 0 if nothing failed and something passed.
pub fn run(cache: &Path, options: Options) -> Result<ExitCode> {
    let table = jobs::table(options.jobs.as_deref())?;
    if let Some(unknown) = options.only.iter().find(|name| !table.iter().any(|e| e.name == **name)) {
        bail!("there is no job {unknown}");
    }
    let chosen = table.into_iter().filter(|e| options.only.is_empty() || options.only.contains(&e.name));
    let workspace = Workspace::find(options.workspace)?;
    let plan = Plan::new(chosen.collect(), &workspace, |name| std::env::var(name).ok())?;
    let mut report = Report::default();
    for (name, why) in &plan.skipped {
        report.begin(name);
        report.add("all", Outcome::Skipped(why.clone()));
        report.end(0.0, String::new());
    }
    if !plan.spec.jobs.is_empty() {
        let image = image::ensure(cache)?;
        let vm = Vm::boot(&image, &options.size, &plan.spec, options.console)?;
        let end = Instant::now() + Duration::from_secs(options.timeout);
        let mut watch = Watch { plan: &plan, report: &mut report, running: None, verbose: options.verbose };
        watch.follow(vm, end);
    }
    let good = report.close();
    if let Some(path) = &options.junit {
        report.write_junit(path)?;
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Turns what the machine says into the report.
struct Watch<'a> {
    plan: &'a Plan,
    report: &'a mut Report,
    running: Option<Running>,
    verbose: bool,
}

struct Running {
    number: usize,
    lines: Lines,
    output: Vec<u8>,
}

impl Watch<'_> {
    /// Every job is in the report afterwards, whatever became of the machine.
    fn follow(&mut self, mut vm: Vm, end: Instant) {
        let mut next = 0;
        let broken = loop {
            match vm.next(end) {
                Err(e) => break Some(format!("{e:#}")),
                Ok(None) => break Some(format!("the run's time was over; {}", vm.console())),
                Ok(Some(Frame::Event(Event::Finished))) => break None,
                Ok(Some(Frame::Event(Event::Started(number)))) => {
                    next = number + 1;
                    self.start(number);
                }
                Ok(Some(Frame::Event(Event::Ended(_, how, seconds)))) => self.ended(&how, seconds),
                Ok(Some(Frame::Event(Event::Note(text)))) => eprintln!("testbed: {text}"),
                Ok(Some(Frame::Event(Event::Up))) => {}
                Ok(Some(Frame::Out(bytes))) => self.output(&bytes, true),
                Ok(Some(Frame::Err(bytes))) => self.output(&bytes, false),
            }
        };
        let broken = match broken {
            None => vm.finish(Instant::now() + BOOT_LIMIT).err().map(|e| format!("{e:#}")),
            broken => broken,
        };
        let Some(why) = broken else { return };
        println!("testbed: {why}");
        let short = why.lines().next().unwrap_or_default().to_owned();
        if self.running.is_some() {
            self.report.add("all", Outcome::Failed(short.clone()));
            self.close(0.0);
        }
        for number in next..self.plan.spec.jobs.len() {
            self.start(number);
            self.report.add("all", Outcome::Failed(format!("not run: {short}")));
            self.close(0.0);
        }
        self.report.begin("machine");
        self.report.add("goes_off", Outcome::Failed(short));
        self.report.end(0.0, why);
    }

    fn start(&mut self, number: usize) {
        self.report.begin(&self.plan.spec.jobs[number].name);
        self.running = Some(Running { number, lines: Lines::default(), output: Vec::new() });
    }

    fn output(&mut self, bytes: &[u8], is_stdout: bool) {
        let Some(running) = &mut self.running else { return };
        if self.verbose {
            print!("{}", String::from_utf8_lossy(bytes));
        }
        let room = OUTPUT_KEPT.saturating_sub(running.output.len());
        running.output.extend_from_slice(&bytes[..bytes.len().min(room)]);
        if self.plan.kinds[running.number] == Kind::TestProgram && is_stdout {
            for line in running.lines.add(bytes) {
                if let Some((test, outcome)) = libtest::outcome(&line) {
                    self.report.add(test, outcome);
                }
            }
        }
    }

    fn ended(&mut self, how: &End, seconds: f64) {
        let Some(running) = &self.running else { return };
        let good = *how == End::Exited(0);
        match (self.plan.kinds[running.number], self.report.of_job()) {
            (Kind::Command, _) if good => self.report.add("all", Outcome::Passed),
            (Kind::TestProgram, (0, _)) if good => {
                self.report.add("all", Outcome::Failed("it ran no test".into()));
            }
            (Kind::TestProgram, (_, 0)) if good => {}
            // Its failed tests say it.
            (Kind::TestProgram, (_, 1..)) if matches!(how, End::Exited(_)) => {}
            _ => self.report.add("all", Outcome::Failed(how.to_string())),
        }
        self.close(seconds);
    }

    fn close(&mut self, seconds: f64) {
        if let Some(running) = self.running.take() {
            self.report.end(seconds, String::from_utf8_lossy(&running.output).into_owned());
        }
    }
}
