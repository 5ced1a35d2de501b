//! The only user of the ring and of the counters: count, reserve, fill, submit; or count the loss.

use core::arch::asm;

use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use tcpstate_common::{
    SetState,
    counters::{RING_FULL, transition_slot},
};

use crate::maps::{COUNTERS, RING, switch};

/// How often a transition of the same kind on the same CPU looks whether the reader is to be woken.
const LOOK_EACH: u64 = 32;

/// Counts the transition, and sends the record that `fill` makes; where the ring is full, counts the loss.
#[inline(always)]
pub fn emit(from: u32, to: u32, fill: impl FnOnce() -> SetState) {
    let Some(counters) = COUNTERS.get_ptr_mut(0) else {
        return; // Element 0 of an array of one is there: this is for the verifier.
    };
    let count = add_one(counters.cast(), bounded(transition_slot(from, to)));
    let Some(mut entry) = RING.reserve::<SetState>(0) else {
        add_one(counters.cast(), RING_FULL);
        return;
    };
    entry.write(fill());
    entry.submit(wake_up(count));
}

/// The slot of a transition, once more cut to its bound: the compiler, which knows the bound, checks it in a way that the
/// verifier can't follow, and would leave out a check in Rust.
#[inline(always)]
fn bounded(slot: usize) -> usize {
    let mut slot = slot;
    // SAFETY: an `and` on a register.
    unsafe {
        asm!("{slot} &= {mask}", slot = inout(reg) slot, mask = const RING_FULL - 1, options(pure, nomem, nostack))
    };
    slot
}

const _: () = assert!(
    RING_FULL.is_power_of_two(),
    "the transitions' slots are those below it"
);

/// Adds 1 to this CPU's slot and returns about what it is now.
///
/// Atomic, since before 6.1 nothing keeps an interrupt's transition out of the middle of this one (later, the kernel
/// skips it and counts a miss).
#[inline(always)]
fn add_one(counters: *mut u64, slot: usize) -> u64 {
    // SAFETY: `slot` is below SLOTS, the number of u64 behind `counters`: each caller passes one that
    // `tcpstate_common::counters` names.
    unsafe {
        let slot = counters.add(slot);
        // BPF's `lock` addition, which core offers for this target neither in `AtomicU64` nor as a stable intrinsic.
        asm!("lock *(u64 *)({slot} + 0) += {one}", slot = in(reg) slot, one = in(reg) 1u64, options(nostack));
        slot.read()
    }
}

/// The flag to submit with. The reader has a tick of its own; it is woken only where so much waits that the ring
/// might be full before the next one. To wake it for each record costs microseconds each time.
#[inline(always)]
fn wake_up(count: u64) -> u64 {
    let wake = count % LOOK_EACH == 0
        && RING.query(u64::from(BPF_RB_AVAIL_DATA)) >= u64::from(switch!(wake_bytes));
    u64::from(if wake {
        BPF_RB_FORCE_WAKEUP
    } else {
        BPF_RB_NO_WAKEUP
    })
}
