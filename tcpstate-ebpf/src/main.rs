//! The kernel side: a record into the ring, and a count, for each TCP state transition.
//!
//! One way of the data: a program of [`set_state`] is called at `sock:inet_sock_set_state`, reads the socket
//! ([`sock`]) and, where it made the call, the process ([`process`]), and hands a record to [`emit`]. What is
//! shared with the user side is in [`maps`]; the record itself is `tcpstate_common::SetState`.
//!
//! Three programs for three kinds of kernel; the loader loads one of them. Beside it, where the kernel takes them,
//! [`accept`] tells who took a connection, [`time_wait`] what becomes of a closed one; asked for it, [`sweep`]
//! lists who holds sockets, and [`sockets`] all there are. Nothing is decided here that the
//! user side could decide: no tables, no filters but protocol and network namespace.

#![feature(asm_experimental_arch)]
#![no_std]
#![no_main]

mod accept;
mod emit;
mod maps;
mod process;
mod set_state;
mod sock;
mod sockets;
mod sweep;
mod time_wait;

/// The helpers that read kernel memory are for GPL-compatible programs only; the kernel looks for this name.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
