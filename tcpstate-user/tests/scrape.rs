//! A real Prometheus (Debian's package) scrapes the daemon, and a query over what it stored gives what is known to be so.

#[path = "live/sys.rs"]
#[expect(dead_code, reason = "shared with the live tests, which use more of it")]
mod sys;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

const DAEMON: u16 = 10975;
const PROMETHEUS: u16 = 9090;

/// Ends with the test, whatever became of it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(command: &mut Command, help: &str) -> Running {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    Running(child.unwrap_or_else(|error| panic!("{command:?}: {error}; {help}")))
}

/// The body of an answer with status 200.
fn get(port: u16, path: &str) -> Option<String> {
    let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()?;
    write!(connection, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.contains(" 200 ").then(|| body.to_owned())
}

/// The single value that the query gives now.
fn query(query: &str) -> Option<f64> {
    let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let answer = get(PROMETHEUS, &format!("/api/v1/query?query={encoded}"))?;
    let answer: Value = serde_json::from_str(&answer).ok()?;
    let results = answer["data"]["result"].as_array()?;
    let [result] = &results[..] else { return None };
    result["value"][1].as_str()?.parse().ok()
}

fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_query_finds_who_leaks_close_wait() {
    let test = || {
        sys::new_namespace().expect("network namespaces need root");
        let folder = TempDir::new().expect("a folder");
        let path = |name: &str| folder.path().join(name).display().to_string();
        let _daemon = start(
            Command::new(env!("CARGO_BIN_EXE_tcpstate")).args([
                "daemon",
                "--netns=self",
                &format!("--socket={}", path("socket")),
            ]),
            "cargo builds it",
        );
        until("the daemon is ready", || get(DAEMON, "/-/ready"));
        let config = format!(
            "global: {{scrape_interval: 1s}}\n\
             scrape_configs: [{{job_name: tcpstate, static_configs: [{{targets: ['127.0.0.1:{DAEMON}']}}]}}]\n"
        );
        fs::write(path("config.yml"), config).expect("the configuration");
        let _prometheus = start(
            Command::new("prometheus").args([
                &format!("--config.file={}", path("config.yml")),
                &format!("--storage.tsdb.path={}", path("data")),
                &format!("--web.listen-address=127.0.0.1:{PROMETHEUS}"),
            ]),
            "`apt-get install prometheus` brings it",
        );

        // Three connections that their clients closed and the server, which is this process, did not.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let address = listener.local_addr().expect("an address");
        let leaked: Vec<TcpStream> = (0..3)
            .map(|_| {
                let client = TcpStream::connect(address).expect("connected");
                let (server, _) = listener.accept().expect("accepted");
                drop(client);
                server
            })
            .collect();
        let comm = fs::read_to_string("/proc/self/comm").expect("/proc is mounted");
        let comm = comm.trim();
        let expect = |expression: &str, value: f64| {
            until(&format!("{expression} is {value}"), || {
                (query(expression)? == value).then_some(())
            });
        };
        expect("up{job=\"tcpstate\"}", 1.0);
        expect(
            &format!("tcpstate_process_sockets{{comm=\"{comm}\",state=\"close_wait\"}}"),
            3.0,
        );
        expect("sum(tcpstate_process_sockets{state=\"close_wait\"})", 3.0);
        // The queries are this process' too, but active.
        let accepted = format!("tcpstate_connections_total{{comm=\"{comm}\",role=\"passive\"}}");
        expect(&accepted, 3.0);
        drop(leaked);
        expect(
            &format!("tcpstate_process_sockets{{comm=\"{comm}\",state=\"close_wait\"}}"),
            0.0,
        );
    };
    // The namespace is the thread's, and so are the programs started by it.
    thread::spawn(test)
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}
