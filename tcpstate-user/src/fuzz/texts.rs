//! Filters, the daemon's file of settings, and the files below `/proc`.

use std::sync::LazyLock;

use axum::http::Uri;

use super::shown;
use crate::config::Settings;
use crate::export::http::fuzz::serves;
use crate::filter::{Selection, Subscription};
use crate::model::{Comm, Line, Listed, Transition};

/// A query that is taken is written as one that says the same, and that can stand in a request.
pub fn filter(bytes: &[u8]) {
    let Ok(query) = std::str::from_utf8(bytes) else {
        return;
    };
    match Subscription::from_query(query) {
        Ok(read) => {
            let written = read.to_query();
            is_a_query(&written);
            let again = Subscription::from_query(&written).expect("it was written by us");
            assert_eq!(again, read);
            assert_eq!(again.matches(&TRANSITION), read.matches(&TRANSITION));
        }
        Err(error) => shown(&error.to_string(), bytes.len()),
    }
    match Selection::from_query(query) {
        Ok(read) => {
            let written = read.to_query();
            is_a_query(&written);
            let again = Selection::from_query(&written).expect("it was written by us");
            assert_eq!(again, read);
            assert_eq!(again.matches(&SOCKET), read.matches(&SOCKET));
        }
        Err(error) => shown(&error.to_string(), bytes.len()),
    }
}

fn is_a_query(written: &str) {
    let uri: Uri = format!("/v1/events?{written}").parse().expect("a target");
    assert_eq!(uri.query(), Some(written));
}

static TRANSITION: LazyLock<Transition> = LazyLock::new(|| {
    let line = r#"{"type":"transition","schema":1,"seq":0,"time":"2026-11-20T23:10:11Z","id":"7.0","cookie":"7",
        "netns":4026531840,"family":"ipv4","local_addr":"10.0.0.5","local_port":8080,"remote_addr":"192.0.2.7",
        "remote_port":50000,"from":"ESTABLISHED","to":"CLOSE_WAIT","dwell_ns":1500000000,"evidence":"tracepoint",
        "role":"passive","pid":4711,"comm":"nginx","uid":33,"container":"8f3c1d2e4b5a","owner_source":"accept",
        "end":null}"#;
    match crate::export::parse_line(line) {
        Ok(Some((_, Line::Transition(transition)))) => transition,
        other => panic!("a transition, not {other:?}"),
    }
});

static SOCKET: LazyLock<Listed> = LazyLock::new(|| {
    let line = r#"{"type":"socket","schema":1,"seq":0,"time":"2026-11-20T23:10:11Z","id":"7.0","cookie":"7",
        "netns":4026531840,"family":"ipv4","local_addr":"10.0.0.5","local_port":8080,"remote_addr":"192.0.2.7",
        "remote_port":50000,"state":"CLOSE_WAIT","since":"2026-11-20T23:10:10Z","age_ns":1000000000,"age_exact":true,
        "role":"passive","pid":4711,"comm":"nginx","uid":33,"container":"8f3c1d2e4b5a","owner_source":"accept",
        "orphan":false,"holders":1,"recv_queue":0,"send_queue":0}"#;
    match crate::export::parse_line(line) {
        Ok(Some((_, Line::Socket(row)))) => row,
        other => panic!("a socket, not {other:?}"),
    }
});

/// What a file sets can be had: its path of the metrics is served. What is wrong with it is said in a line.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    match Settings::from_toml(text) {
        Ok(settings) => {
            assert_eq!(settings.clone().or(Settings::default()), settings);
            assert_eq!(Settings::default().or(settings.clone()), settings);
            let config = settings.with_defaults();
            assert!(!config.listen.is_empty() && !config.reconcile_interval.is_zero());
            assert!(config.ring_size.bytes().is_power_of_two());
            serves(&config.telemetry_path);
        }
        Err(error) => shown(&error.to_string(), bytes.len()),
    }
}

/// Any text of `/proc`, whichever file it should be.
pub fn proc(bytes: &[u8]) {
    crate::owner::fuzz::files(bytes);
    crate::kernel::fuzz::mounts(bytes);
    crate::export::fuzz::unix_sockets(bytes);
    crate::export::http::fuzz::groups(bytes);
    comm(bytes);
}

/// A name is shown harmlessly, and differently from every other.
fn comm(bytes: &[u8]) {
    let comm = Comm::from_bytes(bytes);
    let name = comm.to_string();
    shown(&name, comm.as_bytes().len());
    assert_eq!(Comm::from_escaped(&name), comm);
    // What claims to be a name that was shown.
    let claimed = Comm::from_escaped(&String::from_utf8_lossy(bytes));
    shown(&claimed.to_string(), 16);
    assert_eq!(Comm::from_escaped(&claimed.to_string()), claimed);
}
