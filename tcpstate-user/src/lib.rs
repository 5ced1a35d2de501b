//! tcpstate's user side: drains the kernel's transitions, keeps a table of sockets, and shows it.
//!
//! Arrows only point down: `run, cli → export, kernel, owner → table, stats → model, filter →
//! tcpstate-common`; `cargo xtask check` holds the rule.

pub mod cli;
pub mod config;
pub mod export;
pub mod filter;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub mod fuzz;
pub mod kernel;
pub mod model;
pub mod owner;
pub mod run;
pub mod stats;
pub mod table;
