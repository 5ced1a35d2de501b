//! The kernel's TCP states, by number. Spelling on input and colours on output are the user side's.

/// A TCP state as the kernel numbers it (`include/net/tcp_states.h`).
///
/// A number that this version does not know is kept, not refused: a newer kernel may add states.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TcpState(u8);

impl TcpState {
    pub const ESTABLISHED: Self = Self(1);
    pub const SYN_SENT: Self = Self(2);
    pub const SYN_RECV: Self = Self(3);
    pub const FIN_WAIT1: Self = Self(4);
    pub const FIN_WAIT2: Self = Self(5);
    pub const TIME_WAIT: Self = Self(6);
    pub const CLOSE: Self = Self(7);
    pub const CLOSE_WAIT: Self = Self(8);
    pub const LAST_ACK: Self = Self(9);
    pub const LISTEN: Self = Self(10);
    pub const CLOSING: Self = Self(11);
    /// A half-open request: no full socket yet. Never in an event, only in dumps.
    pub const NEW_SYN_RECV: Self = Self(12);

    /// Every state with a name, in the kernel's order.
    pub const ALL: [Self; 12] = [
        Self::ESTABLISHED,
        Self::SYN_SENT,
        Self::SYN_RECV,
        Self::FIN_WAIT1,
        Self::FIN_WAIT2,
        Self::TIME_WAIT,
        Self::CLOSE,
        Self::CLOSE_WAIT,
        Self::LAST_ACK,
        Self::LISTEN,
        Self::CLOSING,
        Self::NEW_SYN_RECV,
    ];

    #[must_use]
    pub const fn from_kernel(number: u8) -> Self {
        Self(number)
    }

    /// The kernel's number.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The kernel's name, or `None` for a number that has none here.
    #[must_use]
    pub const fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            1 => "ESTABLISHED",
            2 => "SYN_SENT",
            3 => "SYN_RECV",
            4 => "FIN_WAIT1",
            5 => "FIN_WAIT2",
            6 => "TIME_WAIT",
            7 => "CLOSE",
            8 => "CLOSE_WAIT",
            9 => "LAST_ACK",
            10 => "LISTEN",
            11 => "CLOSING",
            12 => "NEW_SYN_RECV",
            _ => return None,
        })
    }
}

impl core::fmt::Display for TcpState {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None => write!(f, "STATE_{}", self.0),
        }
    }
}

impl core::fmt::Debug for TcpState {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}
