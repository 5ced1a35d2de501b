//! The product against the running kernel: real sockets in network namespaces of the tests' own, and the exact
//! lines that `tcpstate watch` must write for them.
//!
//! Self-contained, so that it also runs from an initramfs that holds nothing but this program and the product:
//! no other program is called, and nothing of the product's code judges it. The product is `TCPSTATE_BIN`, or
//! what cargo built. Needs root; a test that can't run fails and says what it needs.

mod attribution;
mod bench;
mod check;
mod clients;
mod clocks;
mod daemon;
mod dumps;
mod dwell;
mod faults;
mod judge;
mod lab;
mod list;
mod model;
mod names;
mod netns;
mod owners;
mod record;
mod scarce;
mod scenarios;
mod six;
mod soak;
mod sockets;
mod stream;
mod sys;
mod timewait;
mod tracer;
mod watch;
mod without;
