//! The command line as users meet it: the helps as a whole, and one clear line with status 2 for what can't be.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

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
    golden!("help-list", stdout(&["list", "--help"]));
    golden!("help-daemon", stdout(&["daemon", "--help"]));
    golden!("help-check", stdout(&["check", "--help"]));
}

#[test]
fn short_help_is_the_same() {
    for command in ["watch", "list", "daemon", "check"] {
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
    let line = stderr.lines().next().unwrap_or_default();
    let line = line.strip_prefix("tcpstate: ").expect(line);
    line.to_owned()
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
            "error: invalid value '10' for '--duration <DURATION>': `10` is no duration; expected a \
             number and its unit, such as 10ms, 1.5s or 2h",
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
            &["watch", "-c", "-1"],
            "error: invalid value '-1' for '--count <N>': `-1` is no count; expected 1 or more",
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
        (&["top"], "error: unrecognized subcommand 'top'"),
        (
            &["daemon", "--ring-size", "4MB"],
            "error: invalid value '4MB' for '--ring-size <BYTES|KiB|MiB>': `4MB` is no size; expected bytes, KiB or \
             MiB, such as 4MiB",
        ),
        (
            &["daemon", "--ring-size", "5000"],
            "error: invalid value '5000' for '--ring-size <BYTES|KiB|MiB>': `5000` is no ring size; expected a power \
             of two from 4096 (a page) to 1GiB; the nearest are 4096 and 8192",
        ),
        (
            &["daemon", "--ring-size", "0"],
            "error: invalid value '0' for '--ring-size <BYTES|KiB|MiB>': `0` is no ring size; expected a power of two \
             from 4096 (a page) to 1GiB; the nearest is 4096",
        ),
        (
            &["daemon", "--ring-size", "2048MiB"],
            "error: invalid value '2048MiB' for '--ring-size <BYTES|KiB|MiB>': `2048MiB` is no ring size; expected a \
             power of two from 4096 (a page) to 1GiB; the nearest is 1073741824",
        ),
        (
            &["watch", "--ring-size", "1"],
            "error: invalid value '1' for '--ring-size <RING_SIZE>': `1` is no ring size; expected a power of two from \
             4096 (a page) to 1GiB; the nearest is 4096",
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
            &["daemon", "--max-comms", "-1"],
            "error: invalid value '-1' for '--max-comms <N>': `-1` is no number of names; expected 1 or more, such \
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
        (
            &["daemon", "--config", "/dev/zero"],
            "error: config file /dev/zero is no regular file; expected one with TOML",
        ),
        (
            &["daemon", "--config", "/"],
            "error: config file / is no regular file; expected one with TOML",
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

/// A pipe that nobody writes, which would be waited for, and a file without an end to speak of.
#[test]
fn a_config_file_that_can_not_be_one_is_not_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipe = folder.path().join("pipe");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0)
        .expect("a pipe");
    let pipe = pipe.to_str().expect("text");
    assert_eq!(
        refused(&["daemon", "--config", pipe]),
        format!("error: config file {pipe} is no regular file; expected one with TOML")
    );
    let long = folder.path().join("long");
    let file = std::fs::File::create(&long).expect("a file");
    file.set_len(1 << 40).expect("a hole");
    let long = long.to_str().expect("text");
    assert_eq!(
        refused(&["daemon", "--config", long]),
        format!("error: config file {long} is too long; expected 1048576 bytes at most")
    );
}

/// Status 1, and its line without `tcpstate: error: `.
fn failed(mut command: Command) -> String {
    let assert = command.timeout(Duration::from_secs(20)).assert().code(1);
    let said = String::from_utf8(assert.get_output().stderr.clone()).expect("text");
    assert_eq!(said.lines().count(), 1, "{said}");
    let line = said.trim_end().strip_prefix("tcpstate: error: ");
    line.expect(&said).to_owned()
}

/// Wherever the limit is hit.
#[test]
fn a_limit_of_open_files_is_named() {
    for limit in [4, 6, 12, 16] {
        let mut command = Command::new("sh");
        let binary = assert_cmd::cargo::cargo_bin("tcpstate");
        let limited = format!("ulimit -n {limit}; exec \"$0\" watch --socket /");
        command.args(["-c", &limited]).arg(binary);
        let said = failed(command);
        let line = format!(
            "can't start the runtime: the limit of {limit} open files is used up; raise it with `ulimit -n`, or \
             LimitNOFILE= of a systemd unit"
        );
        assert_eq!(said, line);
    }
}

#[test]
fn a_socket_that_is_none_or_nobodys_is_told_as_that() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_str().expect("text");
    assert_eq!(
        failed(tcpstate(&["watch", "--socket", path])),
        format!("{path} is no socket; expected the one that `tcpstate daemon` serves")
    );
    let dead = folder.path().join("dead");
    drop(UnixListener::bind(&dead).expect("a socket"));
    let path = dead.to_str().expect("text");
    assert_eq!(
        failed(tcpstate(&["watch", "--socket", path])),
        format!("nobody serves the socket {path}; start `tcpstate daemon`, or leave out --socket")
    );
}

/// A daemon that is stopped: its kernel takes connections, and nothing else happens.
#[test]
fn a_daemon_that_does_not_answer_is_not_waited_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("s");
    let _listener = UnixListener::bind(&path).expect("a socket");
    let path = path.to_str().expect("text");
    let line = |time| {
        format!("the daemon at {path} does not answer within {time}; `--direct` traces without it")
    };
    let begun = Instant::now();
    let hurried = failed(tcpstate(&["watch", "--socket", path, "-d", "300ms"]));
    assert_eq!(hurried, line("300ms"));
    assert!(begun.elapsed() < Duration::from_secs(3));
    assert_eq!(failed(tcpstate(&["watch", "--socket", path])), line("5s"));
}

/// One that answers, sends something, and is gone or silent then.
#[test]
fn a_daemon_that_goes_away_is_one_clear_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).expect("a socket");
    let path = path.to_str().expect("text");
    let start = "{\"type\":\"start\",\"schema\":1,\"seq\":0,\"time\":\"2026-11-20T23:10:11.123456789Z\",\
                 \"host\":\"h\",\"boot_id\":\"b\",\"version\":\"v\",\"source\":\"daemon\",\"netns\":\"all\"}\n";
    let chunk = format!("{:x}\r\n{start}\r\n", start.len());
    let answer = |chunk: &str| {
        let (mut stream, _) = listener.accept().expect("a connection");
        let request = BufReader::new(&stream).lines().map_while(Result::ok);
        request.take_while(|line| !line.is_empty()).for_each(drop);
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}"
        )
        .expect("sent");
        stream
    };
    thread::scope(|scope| {
        let watch = |time: &'static [&str]| {
            let args = [&["watch", "-q", "--socket", path], time].concat();
            scope.spawn(move || failed(tcpstate(&args)))
        };
        let cut = watch(&[]);
        drop(answer(&chunk));
        assert_eq!(
            cut.join().expect("it ends"),
            format!("the daemon at {path} went away in mid-stream")
        );
        let silent = watch(&["-d", "300ms"]);
        let stream = answer("");
        assert_eq!(
            silent.join().expect("it ends"),
            format!(
                "the daemon at {path} does not answer within 300ms; `--direct` traces without it"
            )
        );
        drop(stream);
        let ended = watch(&[]);
        drop(answer(&format!("{chunk}0\r\n\r\n")));
        assert_eq!(
            ended.join().expect("it ends"),
            format!("the daemon at {path} ended the stream")
        );
    });
    // Once the stream has begun, silence is nothing wrong.
    let stopped = thread::scope(|scope| {
        let args = ["watch", "-q", "--socket", path, "-d", "300ms"];
        let watch = scope.spawn(move || tcpstate(&args).timeout(Duration::from_secs(20)).assert());
        let stream = answer(&chunk);
        let stopped = watch.join().expect("it ends");
        drop(stream);
        stopped
    });
    assert_eq!(stopped.success().get_output().stderr, b"");
}
