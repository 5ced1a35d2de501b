//! The command line as users meet it: the helps as a whole, and one clear line with status 2 for what can't be.

use assert_cmd::Command;

fn tcpstate(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("tcpstate").expect("cargo builds it");
    command.args(args);
    command
}

fn stdout(args: &[&str]) -> String {
    let output = tcpstate(args).assert().success();
    String::from_utf8(output.get_output().stdout.clone()).expect("text")
}

macro_rules! golden {
    ($name:literal, $text:expr) => {
        insta::with_settings!({
            snapshot_path => "golden",
            prepend_module_to_snapshot => false,
            omit_expression => true,
        }, { insta::assert_snapshot!($name, $text) })
    };
}

#[test]
fn help_is_for_newcomers() {
    golden!("help", stdout(&["--help"]));
    golden!("help-watch", stdout(&["watch", "--help"]));
    golden!("help-daemon", stdout(&["daemon", "--help"]));
    golden!("help-check", stdout(&["check", "--help"]));
}

#[test]
fn short_help_is_the_same() {
    for command in ["watch", "daemon", "check"] {
        assert_eq!(stdout(&[command, "-h"]), stdout(&[command, "--help"]));
    }
}

#[test]
fn version_is_everywhere() {
    let version = concat!("tcpstate ", env!("CARGO_PKG_VERSION"));
    for args in [
        &["--version"][..],
        &["-V"],
        &["watch", "--version"],
        &["daemon", "-V"],
    ] {
        let shown = stdout(args);
        assert!(shown.starts_with(version), "{shown}");
    }
}

/// The first line of standard error; the rest, if any, points to the help.
fn refused(args: &[&str]) -> String {
    let assert = tcpstate(args).assert().code(2);
    let output = assert.get_output();
    assert_eq!(output.stdout, b"");
    let stderr = String::from_utf8(output.stderr.clone()).expect("text");
    stderr.lines().next().unwrap_or_default().to_owned()
}

#[test]
fn bad_usage_is_one_clear_line_and_status_2() {
    let state = "known, in any case: ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSE, \
                 CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING, NEW_SYN_RECV";
    let state = format!(
        "error: invalid value 'CLOSED_WAIT' for '--state <STATE,…>': `CLOSED_WAIT` is no TCP state; {state}"
    );
    for (args, line) in [
        (&["watch", "-s", "CLOSED_WAIT"][..], state.as_str()),
        (
            &["watch", "-a", "10.0.0.0/33"],
            "error: invalid value '10.0.0.0/33' for '--addr <IP|CIDR,…>': `10.0.0.0/33` is no address; expected an \
             IP address or network such as 10.0.0.5, 10.0.0.0/8 or fd00::/8",
        ),
        (
            &["watch", "-P", "http"],
            "error: invalid value 'http' for '--port <PORT|LO-HI,…>': `http` is no port; expected 1 to 65535, or a \
             range such as 8000-8999",
        ),
        (
            &["watch", "-d", "10"],
            "error: invalid value '10' for '--duration <DURATION>': `10` is no duration: time unit needed, for \
             example 10sec or 10ms; expected a number and its unit, such as 10ms, 1.5s or 2h",
        ),
        (
            &["watch", "-d", "0s"],
            "error: invalid value '0s' for '--duration <DURATION>': `0s` is too short; expected more than zero, \
             such as 10s",
        ),
        (
            &["watch", "-c", "0"],
            "error: invalid value '0' for '--count <N>': `0` is no count; expected 1 or more",
        ),
        (
            &["watch", "-o", "xml"],
            "error: invalid value 'xml' for '--output <FORMAT>': unknown output format `xml`; known: text, wide, \
             json, csv",
        ),
        (
            &["watch", "--netns", "host"],
            "error: invalid value 'host' for '--netns <all|self|INODE>': `host` is no network namespace; expected \
             all, self or an inode, as `lsns -t net` prints it",
        ),
        (
            &["watch", "--direct", "--socket", "/tmp/s"],
            "error: the argument '--direct' cannot be used with '--socket <PATH>'",
        ),
        (
            &["check", "-o", "csv"],
            "error: invalid value 'csv' for '--output <FORMAT>': unknown output format `csv`; known: text, json",
        ),
        (&["list"], "error: unrecognized subcommand 'list'"),
        (
            &["daemon", "--ring-size", "4MB"],
            "error: invalid value '4MB' for '--ring-size <BYTES|KiB|MiB>': `4MB` is no size; expected bytes, KiB or \
             MiB, such as 4MiB",
        ),
        (
            &["daemon", "--reconcile-interval", "0s"],
            "error: invalid value '0s' for '--reconcile-interval <DURATION>': `0s` is too short; expected more than \
             zero, such as 10s",
        ),
        (
            &["daemon", "--max-comms", "0"],
            "error: invalid value '0' for '--max-comms <N>': `0` is no number of names; expected 1 or more, such \
             as 100",
        ),
        (
            &["daemon", "--web.listen-address", "localhost"],
            "error: invalid value 'localhost' for '--web.listen-address <ADDR:PORT>': `localhost` is no address to \
             listen on; expected ADDR:PORT with a numeric address, :PORT or [::1]:PORT",
        ),
        (
            &["daemon", "--config", "/nonexistent.toml"],
            "error: config file /nonexistent.toml can't be read: No such file or directory (os error 2)",
        ),
    ] {
        assert_eq!(refused(args), line, "{args:?}");
    }
}

#[test]
fn a_config_file_is_named_with_what_is_wrong_in_it() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), "listen = 1\n").expect("write");
    let path = file.path().to_str().expect("text");
    assert_eq!(
        refused(&["daemon", "--config", path]),
        format!(
            "error: config file {path}: unknown key `listen`; known: netns, web.listen-address, web.telemetry-path, \
             socket, ring-size, reconcile-interval, max-comms, log.level, log.format"
        )
    );
}
