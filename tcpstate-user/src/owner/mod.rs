//! What is known of a process beyond what the kernel's record says: the container it runs in.

mod container;
mod lookup;

pub use lookup::Containers;
