//! What the runs on several kernels say, as tables: kernels across. For a terminal, and for the page in docs.

use super::{FALLBACKS, Run};
use crate::libtest::Verdict;

pub struct Table {
    head: Vec<String>,
    rows: Vec<(String, Vec<String>)>,
    /// What numbers in the cells refer to, from 1 on.
    notes: Vec<String>,
}

impl Table {
    /// Which way is taken where.
    pub fn of_ways(runs: &[Run], head: Vec<String>) -> Self {
        let taken: Vec<_> = runs.iter().map(|run| run.ways.taken()).collect();
        let rows = taken.first().into_iter().flatten().enumerate();
        let rows = rows.map(|(row, (what, _))| {
            let cells = taken.iter().map(|ways| ways[row].1.to_owned());
            ((*what).to_owned(), cells.collect())
        });
        Self {
            head,
            rows: rows.collect(),
            notes: Vec::new(),
        }
    }

    /// Tests down.
    pub fn of_tests(runs: &[Run], head: Vec<String>) -> Self {
        let mut names: Vec<&str> = Vec::new();
        for (name, _) in runs.iter().flat_map(|run| &run.report.tests) {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        let mut notes = Vec::new();
        let rows = names.into_iter().map(|name| {
            let cells = runs.iter().map(|run| cell(run, name, &mut notes));
            (name.to_owned(), cells.collect())
        });
        Self {
            head,
            rows: rows.collect(),
            notes,
        }
    }

    pub fn row(&mut self, name: &str, cells: impl Iterator<Item = &'static str>) {
        self.rows
            .push((name.to_owned(), cells.map(str::to_owned).collect()));
    }

    pub fn text(&self) -> String {
        let first = self.rows.iter().map(|(name, _)| name.len());
        let first = first.max().unwrap_or_default();
        let widths: Vec<usize> = (0..self.head.len())
            .map(|column| {
                let cells = self.rows.iter().map(|(_, cells)| cells[column].len());
                cells
                    .chain([self.head[column].len()])
                    .max()
                    .unwrap_or_default()
            })
            .collect();
        let mut text = String::new();
        let mut line = |name: &str, cells: &[String]| {
            let mut line = format!("{name:first$}");
            for (cell, width) in cells.iter().zip(&widths) {
                line += &format!("  {cell:width$}");
            }
            text += line.trim_end();
            text.push('\n');
        };
        line("", &self.head);
        for (name, cells) in &self.rows {
            line(name, cells);
        }
        for (number, note) in (1..).zip(&self.notes) {
            text += &format!("{number}: {note}\n");
        }
        text
    }

    pub fn markdown(&self) -> String {
        let line = |name: &str, cells: &[String]| format!("| {name} | {} |\n", cells.join(" | "));
        let mut text = line("", &self.head);
        text += &line("---", &vec!["---".to_owned(); self.head.len()]);
        for (name, cells) in &self.rows {
            text += &line(name, cells);
        }
        if !self.notes.is_empty() {
            text.push('\n');
        }
        for (number, note) in (1..).zip(&self.notes) {
            text += &format!("{number}. {note}\n");
        }
        text
    }
}

fn cell(run: &Run, name: &str, notes: &mut Vec<String>) -> String {
    let mut noted = |word: &str, reason: &str| {
        let known = notes.iter().position(|note| note == reason);
        let at = known.unwrap_or_else(|| {
            notes.push(reason.to_owned());
            notes.len() - 1
        });
        format!("{word} ({})", at + 1)
    };
    match run.report.tests.iter().find(|(test, _)| test == name) {
        Some((_, Verdict::Passed)) => "pass".to_owned(),
        Some((_, Verdict::Failed)) => "FAIL".to_owned(),
        Some((_, Verdict::Ignored(reason))) => noted("ignored", reason),
        Some((_, Verdict::NotApplicable(reason))) => {
            noted("n/a", &format!("not applicable: {reason}"))
        }
        None if name.starts_with(FALLBACKS) && !run.tries_fallbacks => {
            noted("-", "not tried here, but with --whole")
        }
        None => "no run".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libtest::Report;
    use crate::vm::ways::tests::ways;

    fn run(output: &str, tries_fallbacks: bool) -> Run {
        Run {
            ways: ways(&["tp_btf", "socket_cookie"], &[]),
            report: Report::read(output),
            tries_fallbacks,
            ..Run::default()
        }
    }

    fn runs() -> [Run; 3] {
        [
            run(
                "test loads ... ok\ntest closes ... FAILED\n\n---- loads stdout ----\n\
                 not applicable: no fentry\n\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\n",
                false,
            ),
            run("test loads ... ok\ntest without::all ... ok\n", true),
            run("test measures ... ignored, takes long\n", false),
        ]
    }

    fn head() -> Vec<String> {
        ["5.10.0-36-amd64", "6.12", "7.2"]
            .map(str::to_owned)
            .to_vec()
    }

    #[test]
    fn the_table_shows_what_did_not_run_and_why() {
        let mut table = Table::of_tests(&runs(), head());
        table.row("result", ["FAIL", "pass", "pass"].into_iter());
        let expected = [
            "              5.10.0-36-amd64  6.12    7.2",
            "loads         n/a (1)          pass    no run",
            "closes        FAIL             no run  no run",
            "without::all  - (2)            pass    - (2)",
            "measures      no run           no run  ignored (3)",
            "result        FAIL             pass    pass",
            "1: not applicable: no fentry",
            "2: not tried here, but with --whole",
            "3: takes long",
        ];
        assert_eq!(table.text().lines().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn pages_have_the_same_table() {
        let table = Table::of_ways(&runs(), head());
        let text = table.markdown();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "|  | 5.10.0-36-amd64 | 6.12 | 7.2 |");
        assert_eq!(lines[1], "| --- | --- | --- | --- |");
        assert_eq!(lines[2], "| transitions | tp_btf | tp_btf | tp_btf |");
        let tests = Table::of_tests(&runs(), head()).markdown();
        assert!(tests.ends_with("no run | ignored (3) |\n\n1. not applicable: no fentry\n2. not tried here, but with --whole\n3. takes long\n"));
    }
}
