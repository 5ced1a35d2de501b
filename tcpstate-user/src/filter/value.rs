//! The values that filters are given: how each is written, read, and compared.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use tcpstate_common::TcpState;

use crate::model::{Comm, named};

/// A value that can't be taken; one line: the value, what was expected, what would help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(pub String);

fn refuse<T>(value: &str, expected: &str) -> Result<T, ValueError> {
    Err(ValueError(format!(
        "`{}` is {expected}",
        value.escape_debug()
    )))
}

/// A state as users name it: SYN_RECV stands for half-open requests too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State(TcpState);

impl State {
    pub fn matches(self, state: TcpState) -> bool {
        state == self.0 || (self.0 == TcpState::SYN_RECV && state == TcpState::NEW_SYN_RECV)
    }
}

impl FromStr for State {
    type Err = ValueError;

    /// The kernel's names and those of ss, netstat and the RFCs, in any case, with `-`, `_` or nothing between.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let plain: String = text
            .chars()
            .filter(|char| !matches!(char, '-' | '_'))
            .map(|char| char.to_ascii_lowercase())
            .collect();
        Ok(Self(match plain.as_str() {
            "established" | "estab" => TcpState::ESTABLISHED,
            "synsent" => TcpState::SYN_SENT,
            "synrecv" | "synrcv" | "synrcvd" | "synreceived" => TcpState::SYN_RECV,
            "finwait1" => TcpState::FIN_WAIT1,
            "finwait2" => TcpState::FIN_WAIT2,
            "timewait" => TcpState::TIME_WAIT,
            "close" | "closed" | "unconn" | "unconnected" => TcpState::CLOSE,
            "closewait" => TcpState::CLOSE_WAIT,
            "lastack" => TcpState::LAST_ACK,
            "listen" | "listening" => TcpState::LISTEN,
            "closing" => TcpState::CLOSING,
            "newsynrecv" => TcpState::NEW_SYN_RECV,
            _ => {
                let known: Vec<_> = TcpState::ALL
                    .iter()
                    .filter_map(|state| state.name())
                    .collect();
                return refuse(
                    text,
                    &format!("no TCP state; known, in any case: {}", known.join(", ")),
                );
            }
        }))
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A port, or all from one to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports(RangeInclusive<u16>);

impl Ports {
    pub fn matches(&self, port: u16) -> bool {
        self.0.contains(&port)
    }
}

impl FromStr for Ports {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (low, high) = text.split_once('-').unwrap_or((text, text));
        let number = |text: &str| text.parse().ok().filter(|&port: &u16| port != 0);
        match (number(low), number(high)) {
            (Some(low), Some(high)) if low <= high => Ok(Self(low..=high)),
            (Some(low), Some(high)) => refuse(
                text,
                &format!("no range of ports, as {low} is above {high}; try {high}-{low}"),
            ),
            _ => refuse(
                text,
                "no port; expected 1 to 65535, or a range such as 8000-8999",
            ),
        }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (low, high) = (self.0.start(), self.0.end());
        if low == high {
            write!(f, "{low}")
        } else {
            write!(f, "{low}-{high}")
        }
    }
}

/// An address or a network; IPv4 in IPv6's clothes is IPv4, as in every output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network(IpNet);

impl Network {
    pub fn matches(&self, addr: IpAddr) -> bool {
        self.0.contains(&addr)
    }
}

impl FromStr for Network {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const EXPECTED: &str = "no address; expected an IP address or network such as 10.0.0.5, 10.0.0.0/8 or fd00::/8";
        if text.contains('%') {
            return refuse(text, "an address with a zone; leave out what follows the %");
        }
        let net = match text.parse::<IpAddr>() {
            Ok(addr) => IpNet::from(addr),
            Err(_) => match text.parse::<IpNet>() {
                Ok(net) => net.trunc(),
                Err(_) => return refuse(text, EXPECTED),
            },
        };
        Ok(Self(match net {
            IpNet::V6(v6) if v6.prefix_len() >= 96 => v6
                .addr()
                .to_ipv4_mapped()
                .and_then(|v4| Ipv4Net::new(v4, v6.prefix_len() - 96).ok())
                .map_or(net, IpNet::from),
            _ => net,
        }))
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.prefix_len() == self.0.max_prefix_len() {
            self.0.addr().fmt(f)
        } else {
            self.0.fmt(f)
        }
    }
}

/// A thread-group id in the initial pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pid(pub u32);

impl FromStr for Pid {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.parse() {
            Ok(pid) if pid > 0 => Ok(Self(pid)),
            _ => refuse(
                text,
                "no process id; expected a number above 0 (--comm takes names)",
            ),
        }
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A pattern over the bytes of a command name: `*` is any number of bytes, `?` is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob(String);

impl Glob {
    pub fn matches(&self, comm: &Comm) -> bool {
        let (pattern, name) = (self.0.as_bytes(), comm.as_bytes());
        let (mut at_pattern, mut at_name) = (0, 0);
        // Where to try again when the last `*` has to take one byte more.
        let mut retry = None;
        while at_name < name.len() {
            match pattern.get(at_pattern) {
                Some(b'*') => {
                    retry = Some((at_pattern, at_name));
                    at_pattern += 1;
                }
                Some(&byte) if byte == b'?' || byte == name[at_name] => {
                    at_pattern += 1;
                    at_name += 1;
                }
                _ => match retry {
                    Some((star, taken)) => {
                        retry = Some((star, taken + 1));
                        at_pattern = star + 1;
                        at_name = taken + 1;
                    }
                    None => return false,
                },
            }
        }
        pattern[at_pattern..].iter().all(|&byte| byte == b'*')
    }
}

impl FromStr for Glob {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text.is_empty() {
            return refuse(
                text,
                "no name; expected a command name or a pattern such as 'php-fpm*'",
            );
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The beginning of a container's id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPrefix(String);

impl ContainerPrefix {
    pub fn matches(&self, id: &str) -> bool {
        id.starts_with(&self.0)
    }
}

impl FromStr for ContainerPrefix {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let plain = |char: char| char.is_ascii_alphanumeric() || matches!(char, '-' | '_' | '.');
        if text.is_empty() || !text.chars().all(plain) {
            return refuse(
                text,
                "no container id; expected its beginning, as `docker ps` or `crictl ps` prints it",
            );
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for ContainerPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

named! {
    pub enum Ownership ("owner") {
        None = "none",
        Known = "known",
    }
}

/// A length of time with its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let whole = match text.strip_prefix('.') {
            Some(fraction) => &format!("0.{fraction}"),
            None => text,
        };
        let refused = |_| {
            refuse(
                text,
                "no duration; expected a number and its unit, such as 10ms, 1.5s or 2h",
            )
        };
        humantime::parse_duration(whole).map(Self).or_else(refused)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without spaces, so that it stands in a query as it is.
        let shown = humantime::format_duration(self.0).to_string();
        f.write_str(&shown.replace(' ', ""))
    }
}

/// Names a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode(pub u32);

impl FromStr for Inode {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.parse() {
            Ok(inode) if inode > 0 => Ok(Self(inode)),
            _ => refuse(
                text,
                "no network namespace; expected its inode, as `lsns -t net` prints it",
            ),
        }
    }
}

impl fmt::Display for Inode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The network namespaces to cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Netns {
    All,
    /// The one that the program runs in.
    Own,
    Inode(u32),
}

impl FromStr for Netns {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "all" => Ok(Self::All),
            "self" => Ok(Self::Own),
            _ => match text.parse() {
                Ok(inode) if inode > 0 => Ok(Self::Inode(inode)),
                _ => refuse(
                    text,
                    "no network namespace; expected all, self or an inode, as `lsns -t net` prints it",
                ),
            },
        }
    }
}

impl fmt::Display for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Own => f.write_str("self"),
            Self::Inode(inode) => inode.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests;
