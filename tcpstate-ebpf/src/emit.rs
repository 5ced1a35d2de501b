//! The only user of the ring and the counters: count, reserve, fill, submit; or count the loss.

use core::arch::asm;

use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use tcpstate_common::{
    Accept, SetState, TimeWait,
    counters::{SLOTS, transition_slot},
};

use crate::maps::{COUNTERS, LOST, RING, switch};

/// How often a transition of the same kind on the same CPU looks whether the reader is to be woken.
const LOOK_EACH: u64 = 32;

/// Counts the transition, and sends the record that `fill` makes of the loss count.
#[inline(always)]
pub fn transition(from: u32, to: u32, fill: impl FnOnce(u32) -> SetState) {
    // Element 0 of an array is always there; to ask is for the verifier.
    let Some(counters) = COUNTERS.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: the slot is below SLOTS, the number of u64 behind the pointer.
    let slot = unsafe {
        counters
            .cast::<u64>()
            .add(bounded(transition_slot(from, to)))
    };
    add_one(slot);
    // SAFETY: it lies in a map element, which lives as long as the program.
    send(fill, || wake_up(unsafe { slot.read() }));
}

/// Sends the record that `fill` makes of the loss count. The reader's tick finds it.
#[inline(always)]
pub fn accept(fill: impl FnOnce(u32) -> Accept) {
    send(fill, || u64::from(BPF_RB_NO_WAKEUP));
}

/// As [`accept`].
#[inline(always)]
pub fn time_wait(fill: impl FnOnce(u32) -> TimeWait) {
    send(fill, || u64::from(BPF_RB_NO_WAKEUP));
}

/// Where the ring is full, counts the loss.
#[inline(always)]
fn send<T: 'static>(fill: impl FnOnce(u32) -> T, flag: impl FnOnce() -> u64) {
    let Some(lost) = LOST.get_ptr_mut(0) else {
        return;
    };
    let Some(mut entry) = RING.reserve::<T>(0) else {
        add_one(lost);
        return;
    };
    // SAFETY: it lies in a map element, which lives as long as the program.
    entry.write(fill(unsafe { lost.read() } as u32));
    entry.submit(flag());
}

/// Cuts the slot of a transition to its bound once more: the compiler knows the bound, by a check that the verifier
/// can't follow, and would leave out another one in Rust.
#[inline(always)]
fn bounded(slot: usize) -> usize {
    const { assert!(SLOTS.is_power_of_two()) };
    let mut slot = slot;
    // SAFETY: an `and` on a register.
    unsafe {
        asm!("{slot} &= {mask}", slot = inout(reg) slot, mask = const SLOTS - 1, options(pure, nomem, nostack));
    }
    slot
}

/// Atomic also for what is this CPU's own: before 6.1 nothing keeps an interrupt's transition out of the middle of this
/// one (later the kernel skips it, and counts a miss).
#[inline(always)]
fn add_one(counter: *mut u64) {
    // SAFETY: both callers pass a u64 in a map element, changed by this instruction only. `core` offers it for this
    // target neither in `AtomicU64` nor as an intrinsic without the old value, which would be 5.12's.
    unsafe {
        asm!("lock *(u64 *)({counter} + 0) += {one}", counter = in(reg) counter, one = in(reg) 1u64, options(nostack));
    }
}

/// The flag to submit with. The reader has a tick of its own; it is woken only where so much waits that the ring
/// might be full before the next one. To wake it for each record costs microseconds each time.
#[inline(always)]
fn wake_up(count: u64) -> u64 {
    let wake = count.is_multiple_of(LOOK_EACH)
        && RING.query(u64::from(BPF_RB_AVAIL_DATA)) >= u64::from(switch!(wake_bytes));
    u64::from(if wake {
        BPF_RB_FORCE_WAKEUP
    } else {
        BPF_RB_NO_WAKEUP
    })
}
