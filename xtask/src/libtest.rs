//! Reads what Rust's test harness prints. Knows nothing of where the tests ran.

use std::ops::AddAssign;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Passed,
    Failed,
    /// With the reason, if one was given.
    Ignored(String),
    /// It ran, and found that the kernel has not what it is about: why.
    NotApplicable(String),
}

/// How a test says that it can't tell anything here. Shown of a test that passed only with `--show-output`.
const NOT_APPLICABLE: &str = "not applicable: ";

/// What one test program, or several in a row, printed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub tests: Vec<(String, Verdict)>,
    /// Sum of the result lines: what the harness itself says.
    pub counted: Count,
    /// Result lines seen. None: the program died, and what it would have said is unknown.
    pub results: usize,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    pub passed: u64,
    pub failed: u64,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl std::fmt::Display for Count {
    /// The line that a reader of the log looks for.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

impl Report {
    pub fn read(output: &str) -> Self {
        let mut report = Self::default();
        // A test whose verdict was pushed to a later line by something that wrote past the harness.
        let mut open: Option<String> = None;
        // Whose output the lines are.
        let mut heard: Option<&str> = None;
        for line in output.lines().map(str::trim_end) {
            if let Some(result) = line.strip_prefix("test result: ") {
                report.counted += Count {
                    passed: number_before(result, " passed"),
                    failed: number_before(result, " failed"),
                };
                report.results += 1;
                (open, heard) = (None, None);
            } else if let Some(name) = line
                .strip_prefix("---- ")
                .and_then(|test| test.strip_suffix(" stdout ----"))
            {
                heard = Some(name);
            } else if let (Some(name), Some(reason)) = (heard, line.strip_prefix(NOT_APPLICABLE)) {
                report.not_applicable(name, reason);
            } else if let Some((name, rest)) = line
                .strip_prefix("test ")
                .and_then(|test| test.split_once(" ... "))
            {
                match verdict(rest) {
                    Some(verdict) => report.tests.push((name.to_owned(), verdict)),
                    None => open = Some(name.to_owned()),
                }
            } else if let Some(name) = line
                .strip_prefix("test ")
                .and_then(|test| test.strip_suffix(" ..."))
            {
                open = Some(name.to_owned());
            } else if let Some(verdict) = verdict(line)
                && let Some(name) = open.take()
            {
                report.tests.push((name, verdict));
            }
        }
        report
    }

    fn not_applicable(&mut self, name: &str, reason: &str) {
        let passed =
            |(test, verdict): &&mut (String, Verdict)| test == name && *verdict == Verdict::Passed;
        if let Some((_, verdict)) = self.tests.iter_mut().find(passed) {
            *verdict = Verdict::NotApplicable(reason.to_owned());
        }
    }

    /// Passed and failed, given whether the program ended well. One that died, or that ended badly without a test to show
    /// for it, is a failure too: a result that is missing is no pass.
    pub fn count(&self, ended_well: bool) -> Count {
        let with = |verdict| self.tests.iter().filter(|(_, v)| *v == verdict).count() as u64;
        let mut count = if self.results > 0 {
            let elsewhere =
                |(_, verdict): &&(String, Verdict)| matches!(verdict, Verdict::NotApplicable(_));
            let others = self.tests.iter().filter(elsewhere).count() as u64;
            Count {
                passed: self.counted.passed - others,
                ..self.counted
            }
        } else {
            Count {
                passed: with(Verdict::Passed),
                failed: with(Verdict::Failed) + 1,
            }
        };
        if !ended_well && count.failed == 0 {
            count.failed = 1;
        }
        count
    }
}

fn verdict(text: &str) -> Option<Verdict> {
    match text {
        "ok" => Some(Verdict::Passed),
        "FAILED" => Some(Verdict::Failed),
        "ignored" => Some(Verdict::Ignored(String::new())),
        _ => text
            .strip_prefix("ignored, ")
            .map(|reason| Verdict::Ignored(reason.to_owned())),
    }
}

/// The number that stands right before `word`.
fn number_before(text: &str, word: &str) -> u64 {
    text.find(word)
        .and_then(|end| text[..end].rsplit(' ').next()?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(name: &str, verdict: Verdict) -> (String, Verdict) {
        (name.to_owned(), verdict)
    }

    const WHOLE: &str = "
running 3 tests
test vm::loads ... ok
test vm::closes ... FAILED
test slow ... ignored, takes an hour

failures:

---- vm::closes stdout ----
thread 'vm::closes' panicked: expected CLOSE
ok

failures:
    vm::closes

test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.02s
";

    #[test]
    fn verdicts_reasons_and_counts_are_read() {
        let report = Report::read(WHOLE);
        assert_eq!(
            report.tests,
            [
                test("vm::loads", Verdict::Passed),
                test("vm::closes", Verdict::Failed),
                test("slow", Verdict::Ignored("takes an hour".to_owned())),
            ]
        );
        assert_eq!(
            report.count(false),
            Count {
                passed: 1,
                failed: 1
            }
        );
    }

    #[test]
    fn results_of_several_programs_add_up() {
        let report = Report::read(&format!(
            "{WHOLE}\ntest result: ok. 20 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n"
        ));
        assert_eq!(report.results, 2);
        assert_eq!(
            report.count(false),
            Count {
                passed: 21,
                failed: 1
            }
        );
    }

    #[test]
    fn a_program_that_dies_counts_as_a_failure() {
        let report = Report::read("running 2 tests\ntest a ... ok\ntest b ... ");
        assert_eq!(report.results, 0);
        assert_eq!(
            report.count(false),
            Count {
                passed: 1,
                failed: 1
            }
        );
        // It may even end with status 0, by calling exit in a test.
        assert_eq!(
            report.count(true),
            Count {
                passed: 1,
                failed: 1
            }
        );
        assert_eq!(
            Report::read("").count(true),
            Count {
                passed: 0,
                failed: 1
            }
        );
    }

    #[test]
    fn a_bad_end_after_a_good_result_counts_as_a_failure() {
        let report = Report::read("test result: ok. 2 passed; 0 failed; 0 ignored\n");
        assert_eq!(
            report.count(true),
            Count {
                passed: 2,
                failed: 0
            }
        );
        assert_eq!(
            report.count(false),
            Count {
                passed: 2,
                failed: 1
            }
        );
    }

    #[test]
    fn a_test_that_does_not_apply_is_no_pass() {
        let report = Report::read(
            "test a ... ok\ntest b ... FAILED\ntest c ... ok\n\nsuccesses:\n\n---- a stdout ----\nlooking\n\
             not applicable: no fentry\n\n\nsuccesses:\n    a\n    c\n\nfailures:\n\n---- b stdout ----\n\
             not applicable: no fexit\nthread 'b' panicked\n\n\nfailures:\n    b\n\n\
             test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n",
        );
        let reason = Verdict::NotApplicable("no fentry".to_owned());
        assert_eq!(
            report.tests,
            [
                test("a", reason),
                test("b", Verdict::Failed),
                test("c", Verdict::Passed)
            ]
        );
        assert_eq!(
            report.count(false),
            Count {
                passed: 1,
                failed: 1
            }
        );
    }

    #[test]
    fn a_serial_console_bends_lines_but_loses_no_verdict() {
        let report =
            Report::read("test a ... [   1.5] kernel message\r\nok\r\ntest b ...\r\nFAILED\r\n");
        assert_eq!(
            report.tests,
            [test("a", Verdict::Passed), test("b", Verdict::Failed)]
        );
    }

    #[test]
    fn a_line_that_only_looks_like_a_test_is_not_one() {
        assert!(Report::read("test the waters\nok\n").tests.is_empty());
    }
}
