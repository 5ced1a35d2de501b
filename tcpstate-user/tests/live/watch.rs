//! `tcpstate watch` against the running kernel: how it ends, what it says when it can't work or lacks something; the
//! same of the daemon where that is no different.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::daemon::{Daemon, LOOPBACK, bpf_objects, in_namespace, is_there, refused, storm};
use crate::judge::kernel;
use crate::lab::until;
use crate::sockets::Tcp;
use crate::sys;
use crate::tracer::product;
use crate::without::{CLASSIC, NO_COOKIE, WHOLE};

fn tcpstate(arguments: &[&str]) -> Command {
    let mut command = Command::new(product());
    command.args(arguments);
    command
}

/// What it says that can't be done, without `tcpstate: error: `.
fn error(command: &mut Command) -> String {
    let (status, said) = refused(command);
    assert_eq!((status, said.lines().count()), (1, 1), "{said}");
    let line = said.trim_end().strip_prefix("tcpstate: error: ");
    line.unwrap_or_else(|| panic!("{said}")).to_owned()
}

/// A `watch` of the calling thread's namespace, that traces, and what else it says.
fn watch(arguments: &[&str]) -> (Child, impl Iterator<Item = String> + use<>) {
    let mut child = tcpstate(&["watch", "--netns", "self"])
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the product starts");
    let mut said = BufReader::new(child.stderr.take().expect("piped")).lines();
    let begun = said.next().expect("a line").expect("text");
    assert!(begun.starts_with("tracing "), "{begun}");
    (child, said.map_while(Result::ok))
}

fn send(signal: i32, child: &Child) {
    // SAFETY: sends a signal to a child that has not been waited for.
    unsafe { libc::kill(child.id() as i32, signal) };
}

#[test]
fn who_may_not_trace_is_told_all_that_is_missing() {
    in_namespace(|_| {
        let nobody = |arguments| error(tcpstate(arguments).uid(65534).gid(65534));
        assert_eq!(
            nobody(&["watch", "--direct", "--netns", "self"]),
            "no right to load eBPF: CAP_BPF and CAP_PERFMON missing; run as root, or give the program these capabilities"
        );
        for command in [&["watch", "--direct"][..], &["daemon"]] {
            assert_eq!(
                nobody(command),
                "no right to trace all network namespaces: CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN and \
                 CAP_SYS_PTRACE missing; run as root, or give the program these capabilities; `--netns self`, which \
                 is only this one, takes neither CAP_SYS_ADMIN nor CAP_SYS_PTRACE"
            );
        }
        let said = nobody(&["watch", "--direct", "--netns", "1"]);
        assert!(said.contains("no network namespace 1"), "{said}");
    });
}

/// Without the right to a socket, whether anybody serves it makes a difference to what helps.
#[test]
fn who_may_not_use_the_socket_is_told_what_helps() {
    in_namespace(|_| {
        sys::own_mounts().expect("a mount namespace needs root");
        sys::hide("/run", c"mode=755").expect("a folder");
        let nobody = |arguments| error(tcpstate(arguments).uid(65534).gid(65534));
        assert_eq!(
            nobody(&[
                "daemon",
                "--netns",
                "self",
                "--web.listen-address",
                "127.0.0.1:0"
            ]),
            "no right to make the socket /run/tcpstate/tcpstate.sock: its folder must be writable; run as root, or \
             choose another path with --socket"
        );
        fs::create_dir("/run/tcpstate").expect("a folder");
        let socket = "/run/tcpstate/tcpstate.sock";
        let listener = UnixListener::bind(socket).expect("a socket");
        let mode = fs::Permissions::from_mode(0o660);
        fs::set_permissions(socket, mode).expect("ours");
        assert_eq!(
            nobody(&["watch", "--netns", "self"]),
            format!(
                "permission denied on the socket {socket}; join the group that `ls -l` shows for it, or run as root"
            )
        );
        drop(listener);
        assert_eq!(
            nobody(&["watch", "--netns", "self"]),
            format!(
                "nobody seems to serve the socket {socket}, on which permission is denied; start `tcpstate daemon`, \
                 or run as root"
            )
        );
        // Who may trace does so.
        let (status, said) = refused(&mut tcpstate(&["watch", "--netns", "self", "-d", "200ms"]));
        let lines: Vec<&str> = said.lines().collect();
        let warning =
            format!("tcpstate: warning: nobody serves the socket {socket}; tracing directly");
        assert_eq!((status, lines.len(), lines[0]), (0, 2, &*warning), "{said}");
        assert!(lines[1].starts_with("tracing directly "), "{said}");
    });
}

/// A kernel without BTF, or with what we can't read.
#[test]
fn without_btf_the_classic_tracepoint_is_what_is_left() {
    in_namespace(|_| {
        sys::own_mounts().expect("a mount namespace needs root");
        sys::mount_tracefs().expect("tracefs in a mount namespace needs root");
        sys::hide("/sys/kernel/btf", c"mode=755").expect("a folder");
        assert_eq!(
            error(&mut tcpstate(&["watch", "--direct", "--netns", "self"])),
            "one network namespace can't be chosen on the classic tracepoint, which doesn't show it; use --netns all, \
             or a kernel with BTF"
        );
        let (status, said) = refused(&mut tcpstate(&["watch", "--direct", "-d", "200ms"]));
        assert_eq!(status, 0, "{said}");
        assert!(
            said.starts_with("tracing directly (tracepoint), "),
            "{said}"
        );
        fs::write("/sys/kernel/btf/vmlinux", "").expect("a file");
        assert_eq!(
            error(&mut tcpstate(&["watch", "--direct"])),
            "the kernel's BTF is malformed at byte 0"
        );
    });
}

#[test]
fn without_tracefs_the_classic_tracepoint_says_what_it_needs() {
    in_namespace(|_| {
        let classic = || tcpstate(&["watch", "--direct", "--without", CLASSIC]);
        sys::own_mounts().expect("a mount namespace needs root");
        // Where it may be mounted as well.
        sys::hide("/sys/kernel/debug", c"mode=755").expect("a folder");
        sys::hide("/sys/kernel/tracing", c"mode=755").expect("a folder");
        assert_eq!(
            error(&mut classic()),
            "tracefs is not mounted, which the classic tracepoint needs; mount -t tracefs tracefs /sys/kernel/tracing"
        );
        fs::create_dir("/sys/kernel/tracing/events").expect("a folder");
        assert_eq!(
            error(&mut classic()),
            "the kernel has no tracepoint sock:inet_sock_set_state; it needs Linux 4.16 or later with CONFIG_INET"
        );
        sys::hide("/sys/kernel/tracing", c"mode=000").expect("a folder");
        let mut unable = classic();
        // SAFETY: the closure makes system calls only.
        unsafe {
            unable.pre_exec(|| {
                // CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
                for capability in [1, 2] {
                    libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
                }
                Ok(())
            });
        }
        assert_eq!(
            error(&mut unable),
            "tracefs cannot be read, which the classic tracepoint needs: CAP_DAC_READ_SEARCH is missing"
        );
    });
}

#[test]
fn nothing_is_left_after_the_end_of_watch() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        in_namespace(move |_| {
            let (mut child, said) = watch(&["--direct", "--ring-size", "64KiB"]);
            let objects = bpf_objects(child.id());
            for kind in ["prog_id", "map_id"] {
                assert!(
                    objects.iter().any(|object| object.starts_with(kind)),
                    "{objects:?}"
                );
            }
            assert!(objects.iter().all(|object| is_there(object)), "{objects:?}");
            assert!(ring_sizes(child.id()).contains(&65536));
            send(signal, &child);
            let status = child.wait().expect("it ends");
            assert!(status.success(), "{status}");
            assert_eq!(said.collect::<Vec<_>>(), [""; 0]);
            until("the kernel has nothing of it", || {
                !objects.iter().any(|object| is_there(object))
            });
        });
    }
}

/// Of the process' ring buffers, in bytes.
fn ring_sizes(pid: u32) -> Vec<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("the process lives");
    let infos = entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
    let field = |info: &str, name: &str| {
        let value = info.lines().find_map(|line| line.strip_prefix(name))?;
        value.trim().parse::<u64>().ok()
    };
    infos
        .filter(|info| field(info, "map_type:") == Some(27))
        .filter_map(|info| field(&info, "max_entries:"))
        .collect()
}

/// As into `head -1`.
#[test]
fn a_closed_pipe_ends_it_quietly() {
    in_namespace(|_| {
        let (mut child, said) = watch(&["--direct"]);
        let mut header = String::new();
        let mut pipe = BufReader::new(child.stdout.take().expect("piped"));
        pipe.read_line(&mut header).expect("text");
        assert!(header.starts_with("TIME"), "{header}");
        drop(pipe);
        let listener = Tcp::listening(LOOPBACK, 8);
        let mut status = None;
        until("it has seen that nobody reads", || {
            let client = Tcp::connected(listener.local());
            drop((client, listener.accept()));
            status = child.try_wait().expect("our child");
            status.is_some()
        });
        assert!(status.is_some_and(|status| status.success()), "{status:?}");
        assert_eq!(said.collect::<Vec<_>>(), [""; 0]);
    });
}

/// Nobody reads until it has ended: each transition is in the pipe, or told as missing.
#[test]
fn what_a_slow_reader_misses_at_the_end_is_told() {
    in_namespace(|_| slow_reader(&["--direct"]));
    in_namespace(|_| {
        let daemon = Daemon::start(&[]);
        slow_reader(&["--socket", daemon.socket.to_str().expect("text")]);
    });
}

fn slow_reader(source: &[&str]) {
    let begun = Instant::now();
    let (mut child, said) = watch(&[source, &["-o", "json", "--raw", "-d", "2s"]].concat());
    let connections = storm(Duration::from_secs(1));
    let status = child.wait().expect("it ends");
    let took = begun.elapsed();
    assert!(status.success(), "{status}");
    assert!(took < Duration::from_secs(12), "it took {took:?}");
    let mut text = String::new();
    let mut pipe = child.stdout.take().expect("piped");
    pipe.read_to_string(&mut text).expect("text");
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let told: u64 = lines
        .map(|line| match line["type"].as_str() {
            Some("transition") => 1,
            Some("lost") => line["count"].as_u64().expect("a number"),
            _ => 0,
        })
        .sum();
    let said: Vec<String> = said.collect();
    let missing = match &said[..] {
        [line] => line
            .strip_prefix("tcpstate: warning: stdout was not read in time; its end lacks ")
            .and_then(|rest| rest.strip_suffix(" transitions")),
        _ => None,
    };
    let missing = missing.unwrap_or_else(|| panic!("{said:?}"));
    let missing: u64 = missing.parse().expect("a number");
    assert_eq!(told + missing, 6 * connections + 2);
}

/// What the daemon counts of one connection, attached as older kernels would have it.
#[test]
fn the_daemon_counts_however_it_is_attached() {
    for without in [WHOLE, NO_COOKIE, CLASSIC] {
        in_namespace(move |_| {
            let classic = without == CLASSIC;
            if classic {
                sys::mount_tracefs().expect("tracefs in a mount namespace needs root");
            }
            let daemon = Daemon::without(without, &[]);
            let before = daemon.metrics();
            let listener = Tcp::listening(LOOPBACK, 8);
            let client = Tcp::connected(listener.local());
            let server = listener.accept();
            let after = daemon.metrics();
            let grew = |metric: &str| after.sum(metric) - before.sum(metric);
            // The classic tracepoint sees every namespace: then others' sockets are counted too.
            if classic {
                assert!(grew("tcpstate_connections_total") >= 2.0, "{without}");
                assert!(after.state("established") >= 2.0, "{without}");
            } else {
                assert_eq!(grew("tcpstate_connections_total"), 2.0, "{without}");
                // And the daemon's own.
                assert_eq!(after.state("listen"), 2.0, "{without}");
                assert_eq!(after.state("established"), 2.0, "{without}");
            }
            assert_eq!(after.uses("tp_btf"), !classic, "{without}");
            assert_eq!(
                after.uses("socket_cookie"),
                without == WHOLE && kernel() >= (5, 12),
                "{without}"
            );
            drop((client, server, listener));
        });
    }
}
