//! The only folder that knows aya and netlink.

pub mod netns;
pub mod snapshot;
