//! Whose a socket is, where no transition tells: accepts; what sweeps tell is `sweep`'s.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use tcpstate_common::{Accept, TcpState};

use super::{Change, Dwell, Identity, Place, Socket, Table};
use crate::model::{Comm, Evidence, Owner, OwnerSource, Process, Role};

/// An owner with the container that it runs in.
pub(super) type Known = (Owner, Option<Arc<str>>);

#[derive(Debug, Default)]
pub(super) struct Owners {
    /// Events tell of accepts.
    accepts: bool,
    /// Accepts of sockets that are not in the table yet, by the socket's key: a connection can be taken from its
    /// listener's queue before its own second event, and before the first dump is there.
    early: FxHashMap<u64, (u64, Known)>,
    /// A connection came whose holder no event told.
    wanting: bool,
}

impl Owners {
    pub(super) fn flush(&mut self, before_ns: u64) {
        self.early.retain(|_, (time_ns, _)| *time_ns >= before_ns);
    }

    /// When a connection that is new to the table was accepted, and by whom. An accept before `since_ns` was of another
    /// socket, which had the same address.
    pub(super) fn accepted_early(&mut self, key: u64, since_ns: u64) -> Option<(u64, Known)> {
        let accept = self.early.remove(&key)?;
        (accept.0 >= since_ns).then_some(accept)
    }

    /// To be called when a socket is a connection now. Where accepts are seen, one that was taken from a listener's queue
    /// is told, and until then nobody holds it.
    pub(super) fn established(&mut self, socket: &Socket) {
        let told = self.accepts && socket.role == Some(Role::Passive);
        let known = |owner: Owner| owner.source != OwnerSource::Listener;
        self.wanting |= !told && !socket.owner.is_some_and(known);
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
        let known = (owner, container.cloned());
        match self.full.get_mut(key) {
            Some(full) if full.socket.state != TcpState::LISTEN => {
                full.accepted_ns = event.time_ns;
                give(&mut full.socket, known, event.time_ns, &mut sink);
            }
            _ => {
                self.owners.early.insert(key, (event.time_ns, known));
            }
        }
    }

    /// Who listens for `child`, if there can be no doubt, as its owner until it is accepted.
    pub(super) fn listening(&self, child: &Socket) -> Option<Known> {
        let listener = self.full.listener_of(child);
        listener.map(|(owner, container)| (as_listener(owner), container))
    }
}

pub(super) fn as_listener(owner: Owner) -> Owner {
    Owner {
        source: OwnerSource::Listener,
        ..owner
    }
}

pub(super) fn own_by(socket: &mut Socket, known: Option<Known>) {
    if let Some((owner, container)) = known {
        socket.owner = Some(owner);
        socket.container = container;
    }
}

/// Sets the owner, and tells it where that changes where the socket is counted, or how its owner is known.
pub(super) fn give(
    socket: &mut Socket,
    known: Known,
    time_ns: u64,
    sink: &mut impl FnMut(&Change<'_>),
) {
    let before = Place::of(socket);
    own_by(socket, Some(known));
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
