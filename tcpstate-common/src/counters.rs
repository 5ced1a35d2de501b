//! Index of the kernel's per-CPU counters: totals that hold even when events are lost.

/// States have numbers below this; a higher one counts as [`UNKNOWN_STATE`].
pub const STATES: usize = 16;
/// No state of the kernel has the number 0.
pub const UNKNOWN_STATE: usize = 0;

/// Transitions by (from, to): slots 0 to 255.
#[must_use]
pub const fn transition_slot(from: u32, to: u32) -> usize {
    slot_of(from) * STATES + slot_of(to)
}

const fn slot_of(state: u32) -> usize {
    if (state as usize) < STATES {
        state as usize
    } else {
        UNKNOWN_STATE
    }
}

/// Number of slots of a CPU.
pub const SLOTS: usize = STATES * STATES;

/// The one-element array map that counts lost records, on all CPUs together: each record carries its value
/// ([`crate::SetState::lost`]), so it can't be per CPU. It is written only when something is lost.
pub const LOST: &str = "LOST";
