//! docs/kernel-support.md: what a run of all tests on all kernels found, kept for users. Written by no other hand.

use std::fs;

use anyhow::{Context, Result, bail};

use super::Run;
use super::table::Table;
use crate::host;

const PAGE: &str = "docs/kernel-support.md";
/// What stands below names the kernels' releases and the tests, which change with each update.
const TESTS: &str = "## Tests\n";

const HEAD: &str = "\
# Kernels

Which ways tcpstate takes on which kernel, as `tcpstate check` said it on Debian's. On yours it says the same of yours. \
`cargo xtask vm` writes this page, from a run of all live tests on all of these kernels, random campaigns cut short.

";

const WAYS: &str = "
- **transitions**: what sees them. `tp_btf` reads the socket itself (BTF, 5.9). Without the cookie (5.12) a socket is known by \
its address in the kernel. The classic `tracepoint` is what is left without BTF; it tells neither network namespace nor uid \
nor, mostly, why a connection ended.
- **TIME_WAIT**: by `fentry` its beginning and end are seen, and those of an orphan's FIN_WAIT2. Otherwise they are `inferred` \
from the transition before, and the end is seen by dumps.
- **accepts**: by `fexit` who accepts a connection is seen at once. Otherwise a `sweep` finds who holds it.
- **dumps**: what reads all sockets: `inet_diag`, and `iter/tcp` where events have no cookie, since it tells addresses.
- **sweeps**: what finds the holders of sockets: `iter/task_file`, or the files below `/proc/PID/fd`, which takes longer. On the \
classic tracepoint there are none.

Each way is also tried where the kernel has a better one: the tests `without::…` below.
";

/// # Errors
/// What it said of the kernels was no longer so: it is written, and to be looked at.
pub fn keep(runs: &[Run]) -> Result<()> {
    let file = host::root().join(PAGE);
    let before = fs::read_to_string(&file).unwrap_or_default();
    let now = page(runs);
    fs::write(&file, &now).with_context(|| format!("can't write {PAGE}"))?;
    if for_users(&before) != for_users(&now) {
        bail!(
            "{PAGE} said something else of these kernels; it is written anew, look at it and commit it"
        );
    }
    Ok(())
}

fn for_users(page: &str) -> &str {
    page.split_once(TESTS).map_or(page, |(above, _)| above)
}

fn page(runs: &[Run]) -> String {
    let series = || runs.iter().map(|run| run.series.clone()).collect();
    let mut page = HEAD.to_owned();
    page += &Table::of_ways(runs, series()).markdown();
    page += WAYS;
    page += "\n## What they lack\n\n";
    let mut complete = Vec::new();
    for run in runs {
        let mut lacks = run.ways.missing().peekable();
        if lacks.peek().is_none() {
            complete.push(run.series.as_str());
        }
        for lack in lacks {
            page += &format!(
                "- {} has no `{}` ({}): {}.\n",
                run.series, lack.feature, lack.reason, lack.lost
            );
        }
    }
    if !complete.is_empty() {
        page += &format!("- Nothing: {}.\n", complete.join(", "));
    }
    page += &format!("\n{TESTS}\n");
    let kernels: Vec<&str> = runs.iter().map(|run| run.kernel.as_str()).collect();
    page += &format!("On {}.\n\n", kernels.join(", "));
    page += &Table::of_tests(runs, series()).markdown();
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libtest::Report;
    use crate::vm::ways::tests::ways;

    #[test]
    fn users_are_told_what_a_kernel_lacks() {
        let all = [
            "tp_btf",
            "socket_cookie",
            "time_wait_fentry",
            "accept_fexit",
            "task_file_iter",
        ];
        let run = |series: &str, ways| Run {
            series: series.to_owned(),
            kernel: format!("{series}.3-amd64"),
            ways,
            report: Report::read("test loads ... ok\n"),
            ..Run::default()
        };
        let page = page(&[
            run("5.10", ways(&["tp_btf", "tcp_iter"], &["socket_cookie"])),
            run("6.12", ways(&all, &[])),
        ]);
        for line in [
            "|  | 5.10 | 6.12 |",
            "| transitions | tp_btf, no cookie | tp_btf |",
            "- 5.10 has no `socket_cookie` (no socket_cookie): something.",
            "- Nothing: 6.12.",
            "On 5.10.3-amd64, 6.12.3-amd64.",
            "| loads | pass | pass |",
        ] {
            assert!(
                page.lines().any(|it| it == line),
                "{line:?} is not in {page}"
            );
        }
        assert!(!for_users(&page).contains("loads"));
        assert!(for_users(&page).contains("Nothing"));
    }
}
