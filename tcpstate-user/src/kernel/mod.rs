//! The running kernel: the only folder that knows aya and netlink.
//!
//! [`load`] attaches the eBPF program, `optional` those that a kernel may lack, [`ring`] hands on their records, [`info`]
//! what the kernel counts; [`btf`] and [`tracepoint`] read the layouts that the programs depend on, and [`capability`]
//! explains refusals. [`snapshot`] dumps sockets, in each namespace that [`netns`] finds. What any of it means is not
//! decided here.

pub mod btf;
pub mod capability;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
pub mod info;
pub mod load;
pub mod netns;
mod optional;
pub mod ring;
pub mod snapshot;
pub mod tracepoint;

pub use capability::StartError;
pub use info::{Counters, RunStats, jiffy_ns};
pub use load::{Netns, Options, Path, Session};
pub use ring::{Drained, RingSize};
