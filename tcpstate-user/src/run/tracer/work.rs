//! Work on the whole table, done in parts between which the ring is drained: 100,000 sockets at one go would hold up the
//! thread for longer than the ring has room for.

use super::dumps::{Dump, Swept};
use super::{State, tell};
use crate::kernel::Session;
use crate::run::clock::now_ns;
use crate::run::list::Listing;
use crate::stats::AgeScan;
use crate::table::{Merge, Walk};

/// Records or sockets of one part: a millisecond or two.
const PART: usize = 1024;

/// What is left to do of it is in each.
pub(super) enum Work {
    /// A dump comes into the table.
    Merge(Dump, Box<Merge>),
    /// A sweep does, which came at that time.
    Sweep(Box<Swept>, u64),
    /// Scrapes wait to know how old sockets are.
    Ages(AgeScan, Walk),
    /// The rows of a list.
    List(Box<Listing>, Walk),
}

impl State {
    /// Does a part of what is first.
    pub(super) fn work(&mut self, session: &Session) {
        let Some(work) = self.work.pop_front() else {
            return;
        };
        let offset = self.boot_to_unix_ns;
        let rest = match work {
            Work::Merge(dump, mut merge) => {
                let tell = tell(&mut self.stats, &mut self.streams, offset);
                let merged = self.table.merge(&mut merge, PART, tell);
                if let Some(merged) = merged {
                    self.merged(dump, merge.snapshot(), merged, session);
                    None
                } else {
                    Some(Work::Merge(dump, merge))
                }
            }
            Work::Sweep(mut swept, at_ns) => {
                let tell = tell(&mut self.stats, &mut self.streams, offset);
                if self.table.sweep(&mut swept.sweep, PART, at_ns, tell) {
                    self.taken(*swept, at_ns);
                    None
                } else {
                    Some(Work::Sweep(swept, at_ns))
                }
            }
            Work::Ages(mut scan, mut walk) => {
                scan.part(self.table.stays(&mut walk, PART));
                if walk.is_done() {
                    self.stats.age(scan, offset);
                    self.answer_now(session);
                    None
                } else {
                    Some(Work::Ages(scan, walk))
                }
            }
            Work::List(mut listing, mut walk) => {
                listing.part(self.table.rows(&mut walk, PART, now_ns(), offset));
                if walk.is_done() {
                    listing.finish(self.table.is_incomplete());
                    None
                } else {
                    Some(Work::List(listing, walk))
                }
            }
        };
        if let Some(rest) = rest {
            self.work.push_front(rest);
        }
        self.streams.flush();
    }
}
