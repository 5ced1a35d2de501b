//! What glibc's allocator keeps of the memory that we freed. Nothing to do with musl's, which gives it back by itself.

use std::time::{Duration, Instant};

use tokio::time::{MissedTickBehavior, interval};

/// Often enough that a burst does not count for long.
const PERIOD: Duration = Duration::from_secs(10);

/// Has all threads allocate from one heap, before there are any. Else glibc gives them up to eight for each processor;
/// but most of what we allocate goes from one thread to another, and what is free in one heap is of no use to the others.
pub fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer, and no other thread allocates yet.
    unsafe {
        // A refusal costs memory, nothing else.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Returns to the system what is free. glibc does so at the heap's end alone, where something is mostly in use.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer, and locks what it works on.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Does so for as long as it is polled: else the daemon keeps what its largest burst took, such as the full queues of
/// streams that nobody reads.
pub async fn keep_giving_back() {
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let begun = Instant::now();
        give_back();
        // Who allocates waits for it meanwhile.
        tracing::debug!("gave back memory in {:?}", begun.elapsed());
    }
}
