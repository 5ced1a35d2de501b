//! `cargo xtask test`: all tests, run one program after the other, and their count. How a test's output is read stands in
//! libtest; the tests on other kernels are vm's.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::build::{self, TestBinary};
use crate::libtest::{Count, Report, Verdict};
use crate::{host, setup};

/// The integration test of tcpstate-user that loads eBPF into the running kernel.
pub const LIVE: &str = "live";
/// Live tests measure the kernel they share, and say where they don't apply.
pub const LIVE_ARGUMENTS: [&str; 2] = ["--test-threads=1", "--show-output"];

pub fn all(filter: Option<&str>) -> Result<()> {
    setup::for_test()?;
    let product = build::release()?;
    let binaries = build::tests("building the tests", &[])?;
    if !binaries.iter().any(is_live) {
        bail!("cargo built no live tests: tcpstate-user/tests/{LIVE} is missing");
    }

    let mut total = Total::default();
    for binary in &binaries {
        let mut command = program(binary, &product, &[])?;
        command.args(filter).current_dir(&binary.package);
        total.add(&title(binary), &mut command)?;
    }
    let mut documented = host::cargo();
    documented.args(["test", "--doc"]);
    if let Some(filter) = filter {
        documented.args(["--", filter]);
    }
    total.add("documentation", &mut documented)?;
    total.end(filter)
}

fn is_live(binary: &TestBinary) -> bool {
    binary.integration && binary.name == LIVE
}

fn title(binary: &TestBinary) -> String {
    let package = binary.package.file_name().unwrap_or_default();
    format!("{} of {}", binary.name, package.to_string_lossy())
}

/// The command that runs a test program: the live one as root, with the product's path, and what else it is to know.
pub fn program(
    binary: &TestBinary,
    product: &Path,
    variables: &[(&str, &OsStr)],
) -> Result<Command> {
    let path = host::path_with_tools()?;
    if !is_live(binary) {
        let mut command = Command::new(&binary.path);
        command
            .env("CARGO_MANIFEST_DIR", &binary.package)
            .env("PATH", path);
        return Ok(command);
    }
    let mut command = host::as_root("the live tests load eBPF");
    command
        .arg(host::assignment("PATH", &path))
        .arg(host::assignment("TCPSTATE_BIN", product.as_os_str()))
        .args(
            variables
                .iter()
                .map(|(name, value)| host::assignment(name, value)),
        )
        .arg(&binary.path)
        .args(LIVE_ARGUMENTS);
    Ok(command)
}

/// Runs a command that does one test, and fails where that did not pass, or there is none.
pub fn one(title: &str, command: &mut Command) -> Result<()> {
    let mut total = Total::default();
    total.add(title, command)?;
    let passed = total.count.passed;
    total.end(None)?;
    if passed != 1 {
        bail!("{passed} tests passed rather than one");
    }
    Ok(())
}

#[derive(Default)]
struct Total {
    count: Count,
    failed: Vec<String>,
    ignored: Vec<String>,
    not_applicable: Vec<String>,
}

impl Total {
    /// Runs a test program, shows its output as it comes, and adds its result.
    fn add(&mut self, title: &str, command: &mut Command) -> Result<()> {
        host::say(&format!("testing {title}"));
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| host::cannot_start(command))?;
        let mut output = String::new();
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            let text = String::from_utf8_lossy(&line);
            print!("{text}");
            output += &text;
            line.clear();
        }
        let status = child.wait()?;

        let report = Report::read(&output);
        let count = report.count(status.success());
        self.count += count;
        if count.failed > 0 && report.counted.failed == 0 {
            self.failed.push(format!(
                "{title}: ended with {status}, and not by a failed test"
            ));
        }
        for (name, verdict) in report.tests {
            match verdict {
                Verdict::Passed => {}
                Verdict::Failed => self.failed.push(format!("{title}: {name}")),
                Verdict::Ignored(reason) => self.ignored.push(format!("{title}: {name} {reason}")),
                Verdict::NotApplicable(reason) => {
                    self.not_applicable
                        .push(format!("{title}: {name}: {reason}"));
                }
            }
        }
        Ok(())
    }

    fn end(self, filter: Option<&str>) -> Result<()> {
        println!();
        for test in &self.ignored {
            println!("ignored: {}", test.trim_end());
        }
        for test in &self.not_applicable {
            println!("not applicable: {test}");
        }
        for test in &self.failed {
            println!("failed: {test}");
        }
        println!("{}", self.count);
        if self.count.failed > 0 {
            bail!("{} of the tests failed", self.count.failed);
        }
        if self.count.passed == 0 {
            match filter {
                Some(filter) => bail!("no test ran: none has {filter:?} in its name"),
                None => bail!("no test ran"),
            }
        }
        Ok(())
    }
}
