//! Which ways tcpstate takes on a kernel, and what it lacks there: by what its own `check` said in the guest.

use serde_json::Value;

/// What a kernel may lack, in the order of the ways that it gives.
const FEATURES: [&str; 6] = [
    "tp_btf",
    "socket_cookie",
    "time_wait_fentry",
    "accept_fexit",
    "tcp_iter",
    "task_file_iter",
];

/// The lines of `check -o json`.
#[derive(Default)]
pub struct Ways(Vec<Value>);

pub struct Missing<'a> {
    pub feature: &'static str,
    pub reason: &'a str,
    pub lost: &'a str,
}

impl Ways {
    /// `lines`: as many of them as could be read.
    pub fn read<'a>(lines: impl Iterator<Item = &'a str>) -> Self {
        Self(
            lines
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect(),
        )
    }

    /// Whether `check` came to its end.
    pub fn are_known(&self) -> bool {
        self.0.last().is_some_and(|line| line["type"] == "verdict")
    }

    fn of(&self, feature: &str) -> Option<&Value> {
        self.0.iter().find(|line| line["feature"] == feature)
    }

    /// What each is done by.
    pub fn taken(&self) -> [(&'static str, &'static str); 5] {
        let uses = |feature| {
            self.of(feature)
                .is_some_and(|line| line["status"] == "in_use")
        };
        let traces = uses("tracing");
        let (btf, cookie) = (uses("tp_btf"), uses("socket_cookie"));
        let ways = [
            (
                "transitions",
                match (btf, cookie) {
                    (true, true) => "tp_btf",
                    (true, false) => "tp_btf, no cookie",
                    (false, _) => "tracepoint",
                },
            ),
            (
                "TIME_WAIT",
                if uses("time_wait_fentry") {
                    "fentry"
                } else {
                    "inferred"
                },
            ),
            (
                "accepts",
                if uses("accept_fexit") {
                    "fexit"
                } else {
                    "sweep"
                },
            ),
            (
                "dumps",
                if uses("tcp_iter") {
                    "iter/tcp"
                } else {
                    "inet_diag"
                },
            ),
            (
                "sweeps",
                match (btf, uses("task_file_iter")) {
                    (true, true) => "iter/task_file",
                    (true, false) => "/proc",
                    (false, _) => "none",
                },
            ),
        ];
        ways.map(|(what, way)| (what, if traces { way } else { "?" }))
    }

    pub fn missing(&self) -> impl Iterator<Item = Missing<'_>> {
        FEATURES.into_iter().filter_map(|feature| {
            let line = self.of(feature)?;
            let text = |field: &str| line[field].as_str().unwrap_or_default();
            (line["status"] == "missing").then(|| Missing {
                feature,
                reason: text("reason"),
                lost: text("lost"),
            })
        })
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// As `check` says it of a kernel with these features, and without the others.
    pub fn ways(in_use: &[&str], missing: &[&str]) -> Ways {
        let line = |status: &'static str| {
            move |feature: &&str| {
                serde_json::json!({
                    "type": "check",
                    "feature": feature,
                    "status": status,
                    "reason": format!("no {feature}"),
                    "lost": "something",
                })
                .to_string()
            }
        };
        let in_use = [&["tracing"], in_use].concat();
        let mut lines: Vec<String> = in_use.iter().map(line("in_use")).collect();
        lines.extend(missing.iter().map(line("missing")));
        lines.push(r#"{"type":"verdict"}"#.to_owned());
        Ways::read(lines.iter().map(String::as_str))
    }

    fn words(ways: &Ways) -> Vec<&'static str> {
        ways.taken().into_iter().map(|(_, way)| way).collect()
    }

    #[test]
    fn ways_follow_from_what_is_in_use() {
        let all = ways(
            &[
                "tp_btf",
                "socket_cookie",
                "time_wait_fentry",
                "accept_fexit",
                "task_file_iter",
            ],
            &[],
        );
        assert_eq!(
            words(&all),
            ["tp_btf", "fentry", "fexit", "inet_diag", "iter/task_file"]
        );
        let old = ways(
            &["tp_btf", "accept_fexit", "tcp_iter"],
            &["socket_cookie", "task_file_iter"],
        );
        assert_eq!(
            words(&old),
            [
                "tp_btf, no cookie",
                "inferred",
                "fexit",
                "iter/tcp",
                "/proc"
            ]
        );
        let missing: Vec<_> = old.missing().map(|it| (it.feature, it.reason)).collect();
        assert_eq!(
            missing,
            [
                ("socket_cookie", "no socket_cookie"),
                ("task_file_iter", "no task_file_iter")
            ]
        );
        let classic = ways(&[], &["tp_btf"]);
        assert_eq!(
            words(&classic),
            ["tracepoint", "inferred", "sweep", "inet_diag", "none"]
        );
    }

    #[test]
    fn what_was_not_said_is_not_known() {
        let cut_short = Ways::read(
            [
                r#"{"type":"check","feature":"tp_btf","status":"in_use"}"#,
                "{\"ty",
            ]
            .into_iter(),
        );
        assert!(!cut_short.are_known());
        assert_eq!(words(&cut_short), ["?"; 5]);
        assert!(ways(&[], &[]).are_known());
    }
}
