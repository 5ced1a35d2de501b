//! What is known of a process beyond what the kernel's record says: the container it runs in, its name where the
//! record lacks it, and the sockets that it holds.

mod comm;
mod container;
mod lookup;
mod sweep;

pub use comm::comm_of;
pub use lookup::Containers;
pub use sweep::{by_iterator, by_proc};
