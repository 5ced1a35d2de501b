//! What is known of a process beyond what the kernel's record says: the container it runs in, and its name
//! where the record lacks it.

mod comm;
mod container;
mod lookup;

pub use comm::comm_of;
pub use lookup::Containers;
