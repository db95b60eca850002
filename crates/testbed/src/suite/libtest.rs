//! The output of Rust's test programs, line by line: those of the standard harness, and of
//! libtest-mimic, which writes the names in a column.

use super::report::Outcome;

/// Collects lines out of pieces of output.
#[derive(Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// The lines that `piece` completes.
    pub fn add(&mut self, piece: &[u8]) -> Vec<String> {
        self.partial.extend_from_slice(piece);
        let Some(end) = self.partial.iter().rposition(|b| *b == b'\n') else { return Vec::new() };
        let rest = self.partial.split_off(end + 1);
        let whole = std::mem::replace(&mut self.partial, rest);
        String::from_utf8_lossy(&whole).lines().map(str::to_owned).collect()
    }
}

/// The test and its outcome, if the line tells one.
pub fn outcome(line: &str) -> Option<(&str, Outcome)> {
    let (name, result) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    // `#[should_panic]` tests are marked so.
    let name = name.strip_suffix(" - should panic").unwrap_or(name).trim_end();
    let outcome = match result {
        "ok" => Outcome::Passed,
        "FAILED" => Outcome::Failed("it failed".into()),
        ignored => {
            let reason = ignored.strip_prefix("ignored")?;
            // libtest-mimic puts it in brackets, and aligns the results.
            let bracketed = || reason.strip_prefix(" (")?.strip_suffix(')');
            Outcome::Skipped(reason.strip_prefix(", ").or_else(bracketed).unwrap_or("ignored").to_owned())
        }
    };
    Some((name, outcome))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole() {
        let mut lines = Lines::default();
        assert!(lines.add(b"test a").is_empty());
        assert_eq!(lines.add(b" ... ok\n\ntest b"), ["test a ... ok", ""]);
        assert_eq!(lines.add(b"\n"), ["test b"]);
    }

    #[test]
    fn outcomes_are_told_from_other_lines() {
        assert_eq!(outcome("test a::b ... ok"), Some(("a::b", Outcome::Passed)));
        assert!(matches!(outcome("test a ... FAILED"), Some(("a", Outcome::Failed(_)))));
        assert_eq!(outcome("test a   ... ok"), Some(("a", Outcome::Passed)));
        assert_eq!(outcome("test a - should panic ... ok"), Some(("a", Outcome::Passed)));
        assert_eq!(
            outcome("test a ... ignored, needs a moon"),
            Some(("a", Outcome::Skipped("needs a moon".into())))
        );
        assert_eq!(
            outcome("test a   ... ignored (no moon (yet))"),
            Some(("a", Outcome::Skipped("no moon (yet)".into())))
        );
        assert_eq!(outcome("test result: ok. 3 passed; 0 failed"), None);
        assert_eq!(outcome("running 3 tests"), None);
    }
}
