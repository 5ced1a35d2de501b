#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tcpstate_user::fuzz::stream(bytes));
