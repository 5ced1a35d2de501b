//! Whose a socket is, beyond what its own events tell.

use rustc_hash::{FxHashMap, FxHashSet};

use super::*;

#[test]
fn the_gauges_follow_an_owner_that_has_another_name_now() {
    let mut watched = run(
        Identity::Cookie,
        &[
            by(event(1, 1, CLOSE, SYN_SENT), 10, "old"),
            by(event(2, 2, CLOSE, SYN_SENT), 10, "old"),
            event(3, 2, SYN_SENT, ESTABLISHED),
            by(event(4, 2, ESTABLISHED, FIN_WAIT1), 10, "old"),
            event(5, 2, FIN_WAIT1, FIN_WAIT2),
            with(event(6, 2, FIN_WAIT2, CLOSE), |event| {
                event.flags |= FLAG_DONE
            }),
            by(event(7, 3, CLOSE, SYN_SENT), 11, "other"),
            // Without BTF the start is not known: the pid may be anybody's by now.
            with(by(event(8, 4, CLOSE, SYN_SENT), 12, "old"), |event| {
                event.start_ns = 0
            }),
        ],
    );
    assert_eq!(
        watched.table.owners(),
        FxHashSet::from_iter([(10, 10), (11, 11)])
    );
    let told = watched.seen.len();
    let new = Comm::from_bytes(b"new");
    // A later process has the pid 11.
    let names = FxHashMap::from_iter([((10, 10), new), ((11, 99), new), ((12, 0), new)]);
    watched.take(|table, sink| table.rename_owners(&names, 9 * MS, sink));
    watched.take(|table, sink| table.rename_owners(&names, 10 * MS, sink));
    let gauge = |state, comm: &str| {
        let comm = Some(Comm::from_bytes(comm.as_bytes()));
        watched
            .gauges
            .get(&(state, comm))
            .copied()
            .unwrap_or_default()
    };
    assert_eq!([gauge(SYN_SENT, "new"), gauge(TIME_WAIT, "new")], [1, 1]);
    assert_eq!([gauge(SYN_SENT, "old"), gauge(TIME_WAIT, "old")], [1, 0]);
    assert_eq!(gauge(SYN_SENT, "other"), 1);
    // Each is told once, and no stream shows it.
    let renamed = &watched.seen[told..];
    assert_eq!(renamed.len(), 2);
    assert!(
        renamed
            .iter()
            .all(|seen| seen.shown.is_none() && seen.kernel.is_none())
    );
}
