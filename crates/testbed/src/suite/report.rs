//! The report: a line a test, a closing line, and JUnit's XML.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report as JUnit, TestCase, TestCaseStatus, TestSuite};

/// How a test went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    /// Why.
    Failed(String),
    /// Why.
    Skipped(String),
}

/// All tests of the run, by job.
#[derive(Debug, Default)]
pub struct Report {
    jobs: Vec<Job>,
}

#[derive(Debug)]
struct Job {
    name: String,
    cases: Vec<(String, Outcome)>,
    seconds: f64,
    output: String,
}

impl Report {
    /// The tests that follow are this job's.
    pub fn begin(&mut self, job: &str) {
        self.jobs.push(Job { name: job.into(), cases: Vec::new(), seconds: 0.0, output: String::new() });
    }

    /// Adds a test to the job, and prints its line.
    pub fn add(&mut self, test: &str, outcome: Outcome) {
        let Some(job) = self.jobs.last_mut() else { return };
        let result = match &outcome {
            Outcome::Passed => "ok".to_owned(),
            Outcome::Failed(why) => format!("FAILED ({why})"),
            Outcome::Skipped(why) => format!("skipped ({why})"),
        };
        println!("test {}::{test} ... {result}", job.name);
        job.cases.push((test.to_owned(), outcome));
    }

    /// How many tests of the job there are, and how many failed.
    pub fn of_job(&self) -> (usize, usize) {
        let cases = self.jobs.last().map(|j| j.cases.as_slice()).unwrap_or_default();
        (cases.len(), cases.iter().filter(|(_, o)| matches!(o, Outcome::Failed(_))).count())
    }

    /// The job is over. Prints its output if a test of it failed.
    pub fn end(&mut self, seconds: f64, output: String) {
        let failed = self.of_job().1;
        let Some(job) = self.jobs.last_mut() else { return };
        if failed > 0 {
            println!("---- output of {} ----\n{}\n----", job.name, output.trim_end());
        }
        (job.seconds, job.output) = (seconds, output);
    }

    fn count(&self, which: impl Fn(&Outcome) -> bool) -> usize {
        self.jobs.iter().flat_map(|j| &j.cases).filter(|(_, o)| which(o)).count()
    }

    /// Prints the closing line and says whether the run is good: nothing failed, something passed.
    pub fn close(&self) -> bool {
        let passed = self.count(|o| *o == Outcome::Passed);
        let failed = self.count(|o| matches!(o, Outcome::Failed(_)));
        let skipped = self.count(|o| matches!(o, Outcome::Skipped(_)));
        println!("{passed} passed, {failed} failed, {skipped} skipped");
        failed == 0 && passed > 0
    }

    /// Writes the report as JUnit's XML.
    pub fn write_junit(&self, path: &Path) -> Result<()> {
        let mut junit = JUnit::new("testbed");
        for job in &self.jobs {
            let mut suite = TestSuite::new(job.name.as_str());
            suite.set_time(Duration::from_secs_f64(job.seconds));
            suite.set_system_out(job.output.as_str());
            for (test, outcome) in &job.cases {
                let status = match outcome {
                    Outcome::Passed => TestCaseStatus::success(),
                    Outcome::Failed(why) => {
                        let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                        status.set_message(why.as_str());
                        status
                    }
                    Outcome::Skipped(why) => {
                        let mut status = TestCaseStatus::skipped();
                        status.set_message(why.as_str());
                        status
                    }
                };
                let mut case = TestCase::new(test.as_str(), status);
                case.set_classname(job.name.as_str());
                suite.add_test_case(case);
            }
            junit.add_test_suite(suite);
        }
        let file = std::fs::File::create(path).with_context(|| format!("make {}", path.display()))?;
        junit.serialize(file).with_context(|| format!("write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_counts_and_becomes_xml() {
        let mut report = Report::default();
        report.begin("job");
        report.add("good", Outcome::Passed);
        report.add("left <out>", Outcome::Skipped("no & moon".into()));
        report.end(1.5, "text".into());
        assert!(report.close());
        report.begin("second");
        report.add("bad", Outcome::Failed("why".into()));
        assert_eq!(report.of_job(), (1, 1));
        report.end(0.1, String::new());
        assert!(!report.close());
        let file = tempfile::NamedTempFile::new().unwrap();
        report.write_junit(file.path()).unwrap();
        let xml = std::fs::read_to_string(file.path()).unwrap();
        assert!(xml.contains(r#"name="left &lt;out&gt;""#) && xml.contains("no &amp; moon"), "{xml}");
        assert!(xml.contains(r#"failures="1""#), "{xml}");
    }

    #[test]
    fn a_run_without_a_test_is_not_good() {
        assert!(!Report::default().close());
    }
}
