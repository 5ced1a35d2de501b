//! The only user of the ring and the counters: count, reserve, fill, submit; or count the loss.

use core::arch::asm;

use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use tcpstate_common::{
    Accept, TimeWait,
    counters::{SLOTS, transition_slot},
    event::AF_INET,
    wire::{Addrs6, Head, With},
};

use crate::{
    maps::{COUNTERS, LOST, RING, switch},
    process::Process,
};

/// How often a transition of the same kind on the same CPU looks whether the reader is to be woken.
const LOOK_EACH: u64 = 32;

/// Where the addresses are a part of their own.
const NO_ADDRS: [[u8; 4]; 2] = [[0; 4]; 2];

/// A transition that is counted; to be sent.
pub struct Counted {
    slot: *mut u64,
}

/// Counts the transition.
#[inline(always)]
pub fn count(from: u32, to: u32) -> Option<Counted> {
    // Element 0 of an array is always there; to ask is for the verifier.
    let counters = COUNTERS.get_ptr_mut(0)?.cast::<u64>();
    // SAFETY: the slot is below SLOTS, the number of u64 behind the pointer.
    let slot = unsafe { counters.add(bounded(transition_slot(from, to))) };
    add_one(slot);
    Some(Counted { slot })
}

impl Counted {
    /// Sends the record with as few parts as say everything. `head` makes the first of the loss count and the addresses of
    /// IPv4: those that are given where `addrs6` is none, else nothing.
    #[inline(always)]
    pub fn send(
        self,
        family: u16,
        caller: Option<Process>,
        addrs4: impl Fn() -> [[u8; 4]; 2],
        addrs6: impl Fn() -> Addrs6,
        head: impl Fn(u32, [[u8; 4]; 2]) -> Head,
    ) {
        // The kernel wants to know the size of what it reserves when it loads the program: hence four times.
        match (family == AF_INET, caller) {
            (true, None) => self.push(|lost| head(lost, addrs4())),
            (true, Some(by)) => self.push(|lost| With(head(lost, addrs4()), by.caller())),
            (false, None) => self.push(|lost| With(head(lost, NO_ADDRS), addrs6())),
            (false, Some(by)) => {
                self.push(|lost| With(With(head(lost, NO_ADDRS), addrs6()), by.caller()));
            }
        }
    }

    #[inline(always)]
    fn push<T: 'static>(self, fill: impl FnOnce(u32) -> T) {
        // SAFETY: it lies in a map element, which lives as long as the program.
        send(fill, || wake_up(unsafe { self.slot.read() }));
    }
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
