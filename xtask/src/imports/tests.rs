use super::*;

/// What the rule says of files, each with its name and text, as `FILE:LINE: WHY`.
fn said_of(files: &[(&str, &str)]) -> Vec<String> {
    let files: Vec<_> = files
        .iter()
        .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
        .collect();
    check(&files)
        .unwrap()
        .iter()
        .map(Broken::to_string)
        .collect()
}

fn said(name: &str, text: &str) -> Vec<String> {
    said_of(&[(name, text)])
}

#[test]
fn the_real_tree_keeps_the_rule() {
    let src = crate::host::root().join("tcpstate-user/src");
    let broken = broken_in(&src).unwrap();
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn arrows_point_down() {
    let fine = "use crate::model::Transition; use crate::{filter::Filter, model};";
    assert!(said("table/mod.rs", fine).is_empty());
    assert!(said("stats.rs", "use crate::table::Table;").is_empty());
    assert!(said("filter.rs", "use crate::model::State;").is_empty());
    assert!(said("run.rs", "use crate::{cli, kernel::Session, export};").is_empty());
    assert!(said("lib.rs", "pub mod kernel; pub use kernel::Session;").is_empty());

    assert_eq!(
        said("table/mod.rs", "\nuse crate::kernel::Session;"),
        ["table/mod.rs:2: table uses kernel, which is not below it"]
    );
    assert_eq!(
        said("model.rs", "fn f(t: &crate::table::Table) {}"),
        ["model.rs:1: model uses table, which is not below it"]
    );
}

#[test]
fn siblings_keep_apart() {
    for (file, text) in [
        ("export/http.rs", "use crate::kernel::Session;"),
        ("table/mod.rs", "use crate::stats::Dwell;"),
        ("model.rs", "use crate::filter::Filter;"),
        ("diagnose.rs", "use crate::stats;"),
    ] {
        assert_eq!(said(file, text).len(), 1, "{file}: {text}");
    }
}

#[test]
fn paths_are_resolved_from_where_they_stand() {
    assert!(said("table/apply.rs", "use super::Table; use self::x::Y;").is_empty());
    assert_eq!(
        said("table/apply.rs", "use super::super::kernel::Session;").len(),
        1
    );
    assert_eq!(
        said(
            "table.rs",
            "mod inner { use super::super::kernel::Session; }"
        )
        .len(),
        1
    );
    assert!(
        said(
            "table.rs",
            "mod kernel { fn f() {} } fn g() { kernel::f() }"
        )
        .is_empty()
    );
    assert_eq!(said("table.rs", "fn f() { crate::run::go() }").len(), 1);
    assert_eq!(said("table.rs", "use crate::run as r;").len(), 1);
    assert_eq!(
        said("table.rs", "fn f() { assert!(crate::run::go()) }").len(),
        1
    );
}

#[test]
fn the_program_uses_the_library_and_nobody_uses_the_program() {
    assert!(
        said(
            "main.rs",
            "use tcpstate_user::{cli, run}; fn main() { run::go() }"
        )
        .is_empty()
    );
    assert_eq!(said("main.rs", "use tcpstate_user::unheard_of;").len(), 1);
    assert_eq!(said("main.rs", "use aya::Ebpf;").len(), 1);
}

#[test]
fn names_that_hide_a_layer_are_refused() {
    assert_eq!(said("table.rs", "use crate::Anything;").len(), 1);
    assert_eq!(said("table.rs", "use crate::*;").len(), 1);
    assert_eq!(said("extra.rs", "").len(), 1);
    assert_eq!(said("table.rs", "#[path = \"../x.rs\"] mod x;").len(), 1);
}

#[test]
fn the_core_is_pure() {
    for text in [
        "use std::time::Instant;",
        "use std::time::{Duration, SystemTime};",
        "use std::time; fn f() { time::Instant::now(); }",
        "use std::time::*;",
        "use std::net::TcpStream;",
        "use std::os::unix::net::UnixStream;",
        "use std::io::Write as _;",
        "use std as s; fn f() { s::fs::read(\"x\"); }",
        "fn f() { ::std::fs::read(\"x\"); }",
        "fn f() -> tokio::time::Instant { todo() }",
        "fn f() { tracing::info!(\"x\"); }",
        "fn f() { println!(\"x\"); }",
        "fn f() { libc::getpid(); }",
        "fn f() { assert!(std::thread::panicking()); }",
        "macro_rules! m { () => { std::fs::read(\"x\") } }",
    ] {
        for file in [
            "model.rs",
            "filter.rs",
            "table/apply.rs",
            "stats.rs",
            "diagnose.rs",
        ] {
            assert_eq!(said(file, text).len(), 1, "{file}: {text}");
        }
        assert!(said("owner.rs", text).is_empty(), "owner.rs: {text}");
    }
    let pure = "use libc::EPIPE; use std::time::Duration; use std::net::{IpAddr, SocketAddr}; use std::fmt;";
    assert!(said("table/apply.rs", pure).is_empty());
}

#[test]
fn only_kernel_knows_aya_and_netlink() {
    for text in [
        "use aya::Ebpf;",
        "use aya_log::EbpfLogger;",
        "use netlink_sys::Socket;",
        "fn f(m: netlink_packet_core::Message) {}",
    ] {
        assert_eq!(said("owner.rs", text).len(), 1, "{text}");
        assert!(said("kernel/load.rs", text).is_empty(), "{text}");
    }
    assert_eq!(said("run.rs", "use aya::Ebpf;").len(), 1);
}

#[test]
fn tests_may_use_anything() {
    let tests = "#[cfg(test)] mod tests { use super::*; use crate::run; use std::fs; }";
    assert!(said("table.rs", tests).is_empty());
    assert!(said("table.rs", "#[cfg(test)] use std::io;").is_empty());
    assert!(
        said_of(&[
            ("table.rs", "#[cfg(test)] mod oracle;"),
            ("table/oracle.rs", "use std::fs;"),
        ])
        .is_empty()
    );
    let properties = "#[cfg(any(test, feature = \"fuzz\"))] use std::fs;";
    assert!(said("table.rs", properties).is_empty());
    assert_eq!(said("table.rs", "#[cfg(not(test))] use std::fs;").len(), 1);
}
