//! Finds the listener that a new connection belongs to.

use std::net::IpAddr;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::{Owned, Socket};
use crate::model::Endpoint;

/// Listening sockets by network namespace and port.
#[derive(Debug, Default)]
pub(super) struct Listeners(FxHashMap<(Option<u32>, u16), Vec<Listener>>);

#[derive(Debug)]
struct Listener {
    key: u64,
    addr: Option<IpAddr>,
}

impl Listeners {
    pub(super) fn insert(&mut self, key: u64, netns: Option<u32>, local: Endpoint) {
        if let Some(port) = local.port {
            let addr = local.addr;
            let listeners = self.0.entry((netns, port)).or_default();
            listeners.push(Listener { key, addr });
        }
    }

    pub(super) fn remove(&mut self, key: u64, netns: Option<u32>, local: Endpoint) {
        if let Some(port) = local.port
            && let Some(listeners) = self.0.get_mut(&(netns, port))
        {
            listeners.retain(|listener| listener.key != key);
            if listeners.is_empty() {
                self.0.remove(&(netns, port));
            }
        }
    }

    /// What `known` says of the owner of the listener that took `child`, if there can be no doubt: of several listeners
    /// of one port (SO_REUSEPORT) the kernel takes one that no event names.
    pub(super) fn of<'a>(
        &self,
        child: &Socket,
        known: impl Fn(u64) -> Option<&'a Arc<Owned>>,
    ) -> Option<&'a Arc<Owned>> {
        let listeners = self.0.get(&(child.netns(), child.local.port?))?;
        let mut candidates = listeners
            .iter()
            .filter(|listener| listener.addr == child.local.addr)
            .peekable();
        if candidates.peek().is_some() {
            return the_one(candidates.map(|listener| known(listener.key)));
        }
        the_one(
            listeners
                .iter()
                .filter(|listener| listener.addr.is_some_and(|addr| addr.is_unspecified()))
                .map(|listener| known(listener.key)),
        )
    }
}

fn the_one<'a>(mut owners: impl Iterator<Item = Option<&'a Arc<Owned>>>) -> Option<&'a Arc<Owned>> {
    let first = owners.next()??;
    let process = &first.owner.process;
    owners
        .all(|known| known.is_some_and(|known| known.owner.process.is(process)))
        .then_some(first)
}

#[cfg(test)]
impl Listeners {
    pub(super) fn len(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }
}
