//! Why a connection ended, and who closed first.

use super::name::named;

named! {
    pub enum End ("end") {
        LocalClose = "local_close",
        RemoteClose = "remote_close",
        /// Both sides sent their FIN before they had the other's.
        SimultaneousClose = "simultaneous_close",
        ResetReceived = "reset_received",
        /// SO_LINGER 0, unread data, a listener closed over it, `ss -K`.
        ResetSent = "reset_sent",
        Refused = "refused",
        Timeout = "timeout",
        Unreachable = "unreachable",
        /// A connect that its own side gave up.
        Aborted = "aborted",
        Unknown = "unknown",
    }
}
