//! tcpstate: the user side.
