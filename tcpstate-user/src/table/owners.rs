//! Whose a socket is, where no transition tells: accepts; what sweeps tell is `sweep`'s.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use tcpstate_common::{Accept, TcpState};

use super::{Change, Dwell, Identity, Place, Socket, Table};
use crate::model::{Comm, Evidence, Owner, OwnerSource, Process, Role};

/// An owner, with the container that it runs in: one of its own for as many sockets as have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owned {
    pub owner: Owner,
    pub container: Option<Arc<str>>,
}

/// Owners that sockets have or had, so that each is there once: one process can have 100,000 sockets.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The last of each name and container.
    known: FxHashMap<(u32, u64, OwnerSource), Arc<Owned>>,
    /// More than so many, and those that nobody has any more are forgotten.
    most: usize,
}

impl Shared {
    pub(super) fn share(&mut self, owned: Owned) -> Arc<Owned> {
        let Owner { process, source } = owned.owner;
        let key = (process.pid, process.start_ns, source);
        if let Some(known) = self.known.get(&key).filter(|known| ***known == owned) {
            return Arc::clone(known);
        }
        let shared = Arc::new(owned);
        self.known.insert(key, Arc::clone(&shared));
        shared
    }

    fn forget(&mut self) {
        const FEW: usize = 64;
        if self.known.len() > self.most {
            self.known.retain(|_, known| Arc::strong_count(known) > 1);
            self.most = FEW + 2 * self.known.len();
            self.known.shrink_to(self.most);
        }
    }

    /// The owner of a listener as that of a connection, until it is accepted.
    pub(super) fn as_listener(&mut self, listener: &Owned) -> Arc<Owned> {
        self.share(Owned {
            owner: Owner {
                source: OwnerSource::Listener,
                ..listener.owner
            },
            container: listener.container.clone(),
        })
    }
}

#[derive(Debug, Default)]
pub(super) struct Owners {
    /// Events tell of accepts.
    accepts: bool,
    /// Accepts of sockets that are not in the table yet, by the socket's key: a connection can be taken from its
    /// listener's queue before its own second event, and before the first dump is there.
    early: FxHashMap<u64, (u64, Arc<Owned>)>,
    /// A connection came whose holder no event told.
    wanting: bool,
    pub(super) shared: Shared,
}

impl Owners {
    pub(super) fn flush(&mut self, before_ns: u64) {
        self.early.retain(|_, (time_ns, _)| *time_ns >= before_ns);
        self.shared.forget();
    }

    /// When a connection that is new to the table was accepted, and by whom. An accept before `since_ns` was of another
    /// socket, which had the same address.
    pub(super) fn accepted_early(&mut self, key: u64, since_ns: u64) -> Option<(u64, Arc<Owned>)> {
        if self.early.is_empty() {
            // Mostly, and this is asked at each event.
            return None;
        }
        let accept = self.early.remove(&key)?;
        (accept.0 >= since_ns).then_some(accept)
    }

    /// To be called when a socket is a connection now. Where accepts are seen, one that was taken from a listener's queue
    /// is told, and until then nobody holds it.
    pub(super) fn established(&mut self, socket: &Socket) {
        let told = self.accepts && socket.role == Some(Role::Passive);
        let known = |owner: Owner| owner.source != OwnerSource::Listener;
        self.wanting |= !told && !socket.owner().is_some_and(known);
    }
}

impl Table {
    /// From now on events tell of accepts, so a connection that nobody accepted is one that waits for that.
    pub fn sees_accepts(&mut self) {
        self.owners.accepts = true;
    }

    /// Whether connections came, since this was last asked, that only a sweep finds a holder of.
    pub fn wants_sweep(&mut self) -> bool {
        std::mem::take(&mut self.owners.wanting)
    }

    /// Takes an accept, in the order of the ring.
    pub fn accepted(
        &mut self,
        event: &Accept,
        container: Option<&Arc<str>>,
        mut sink: impl FnMut(&Change<'_>),
    ) {
        let key = match self.identity {
            Identity::Cookie => event.cookie,
            Identity::Address | Identity::Ends => event.sk,
        };
        let owner = Owner {
            process: Process {
                pid: event.tgid,
                start_ns: event.start_ns,
                comm: Some(Comm::from_kernel(event.comm)),
            },
            source: OwnerSource::Accept,
        };
        let owned = self.owners.shared.share(Owned {
            owner,
            container: container.cloned(),
        });
        match self.full.get_mut(key) {
            Some(full) if full.socket.state != TcpState::LISTEN => {
                full.accepted_ns = event.time_ns;
                give(&mut full.socket, owned, event.time_ns, &mut sink);
            }
            _ => {
                self.owners.early.insert(key, (event.time_ns, owned));
            }
        }
    }

    /// Who listens for `child`, if there can be no doubt, as its owner until it is accepted.
    pub(super) fn listening(&mut self, child: &Socket) -> Option<Arc<Owned>> {
        let listener = self.full.listener_of(child)?;
        Some(self.owners.shared.as_listener(listener))
    }
}

/// Sets the owner, and tells it where that changes where the socket is counted, or how its owner is known.
pub(super) fn give(
    socket: &mut Socket,
    owned: Arc<Owned>,
    time_ns: u64,
    sink: &mut impl FnMut(&Change<'_>),
) {
    let before = Place::of(socket);
    socket.owned = Some(owned);
    let after = Place::of(socket);
    if before != after {
        sink(&Change {
            time_ns,
            socket,
            kernel: None,
            shown: None,
            dwell: Dwell::None,
            evidence: Evidence::Snapshot,
            end: None,
            before: Some(before),
            after: Some(after),
        });
    }
}
