//! Which transitions a stream shows, and which sockets a list. Each filter is declared once, here: its flag, its help, its parameter in a
//! query, what it matches.
//!
//! Pure. Which network namespaces are traced at all is the kernel side's; here what is shown is only narrowed to one.

mod value;

use std::fmt::Display;
use std::str::FromStr;

use clap::Args;

pub use value::{
    ContainerPrefix, Glob, Inode, Netns, Network, Ownership, Pid, Ports, Span, State, ValueError,
};

use crate::model::{Endpoint, Family, Listed, NetnsSelection, Owner, Role, TcpState, Transition};

/// What is asked of a socket, whatever is shown of it.
///
/// Values of one filter are alternatives; different filters must all hold. What is unknown matches no filter on it.
#[derive(Args, Clone, Debug, Default, PartialEq)]
pub struct SocketFilter {
    /// State, in any common spelling; of a transition, either side
    #[arg(short, long, value_name = "STATE,…", value_delimiter = ',')]
    state: Vec<State>,

    /// Port of either end
    #[arg(short = 'P', long, value_name = "PORT|LO-HI,…", value_delimiter = ',')]
    port: Vec<Ports>,

    /// Local port
    #[arg(short = 'L', long, value_name = "PORT|LO-HI,…", value_delimiter = ',')]
    lport: Vec<Ports>,

    /// Remote port
    #[arg(short = 'D', long, value_name = "PORT|LO-HI,…", value_delimiter = ',')]
    rport: Vec<Ports>,

    /// Address of either end
    #[arg(short, long, value_name = "IP|CIDR,…", value_delimiter = ',')]
    addr: Vec<Network>,

    /// Local address
    #[arg(long, value_name = "IP|CIDR,…", value_delimiter = ',')]
    laddr: Vec<Network>,

    /// Remote address
    #[arg(long, value_name = "IP|CIDR,…", value_delimiter = ',')]
    raddr: Vec<Network>,

    /// IPv4 only, with the IPv4 peers of dual-stack sockets; -4 -6 is both
    #[arg(short = '4', long)]
    ipv4: bool,

    /// IPv6 only
    #[arg(short = '6', long)]
    ipv6: bool,

    /// Process id of the owner
    #[arg(short, long, value_name = "PID,…", value_delimiter = ',')]
    pid: Vec<Pid>,

    /// Command name of the owner; `*` and `?` are wildcards
    #[arg(long, value_name = "GLOB,…", value_delimiter = ',')]
    comm: Vec<Glob>,

    /// Container of the owner, by the beginning of its id
    #[arg(long, value_name = "ID-PREFIX,…", value_delimiter = ',')]
    container: Vec<ContainerPrefix>,

    /// Sockets without an owner, or with one
    #[arg(long, value_name = "none|known")]
    owner: Option<Ownership>,

    /// Who opened the connection: this side (active) or the other (passive)
    #[arg(long, value_name = "active|passive")]
    role: Option<Role>,
}

/// Which transitions.
#[derive(Args, Clone, Debug, Default, PartialEq)]
pub struct Filter {
    #[command(flatten)]
    socket: SocketFilter,

    /// State that was left
    #[arg(long, value_name = "STATE,…", value_delimiter = ',')]
    from: Vec<State>,

    /// State that was entered
    #[arg(long, value_name = "STATE,…", value_delimiter = ',')]
    to: Vec<State>,

    /// At least so long in the state that was left
    #[arg(long, value_name = "DURATION")]
    min_dwell: Option<Span>,
}

/// Which sockets of those that exist.
#[derive(Args, Clone, Debug, Default, PartialEq)]
pub struct ListFilter {
    #[command(flatten)]
    socket: SocketFilter,

    /// At least so long in its state, as far as is known
    #[arg(long, value_name = "DURATION")]
    min_age: Option<Span>,
}

/// What a socket filter looks at.
struct Facts<'a> {
    states: &'a [TcpState],
    family: Family,
    local: Endpoint,
    remote: Endpoint,
    role: Option<Role>,
    owner: Option<Owner>,
    container: Option<&'a str>,
}

fn holds<T>(filters: &[T], matches: impl FnMut(&T) -> bool) -> bool {
    filters.is_empty() || filters.iter().any(matches)
}

fn holds_of<T, V: Copy>(
    filters: &[T],
    values: impl IntoIterator<Item = Option<V>> + Clone,
    matches: impl Fn(&T, V) -> bool,
) -> bool {
    holds(filters, |filter| {
        let mut known = values.clone().into_iter().flatten();
        known.any(|value| matches(filter, value))
    })
}

fn lasted(ns: u64, Span(min): Span) -> bool {
    u128::from(ns) >= min.as_nanos()
}

impl SocketFilter {
    fn matches(&self, facts: &Facts<'_>) -> bool {
        let (local, remote) = (facts.local, facts.remote);
        let process = facts.owner.map(|owner| owner.process);
        let family = match facts.family {
            Family::Ipv4 => self.ipv4 || !self.ipv6,
            Family::Ipv6 => self.ipv6 || !self.ipv4,
        };
        family
            && holds(&self.state, |s| {
                facts.states.iter().any(|&state| s.matches(state))
            })
            && holds_of(&self.port, [local.port, remote.port], Ports::matches)
            && holds_of(&self.lport, [local.port], Ports::matches)
            && holds_of(&self.rport, [remote.port], Ports::matches)
            && holds_of(&self.addr, [local.addr, remote.addr], Network::matches)
            && holds_of(&self.laddr, [local.addr], Network::matches)
            && holds_of(&self.raddr, [remote.addr], Network::matches)
            && holds_of(&self.pid, [process], |pid, process| pid.0 == process.pid)
            && holds_of(
                &self.comm,
                [process.and_then(|process| process.comm)],
                |glob, comm| glob.matches(&comm),
            )
            && holds_of(&self.container, [facts.container], ContainerPrefix::matches)
            && self.owner.is_none_or(|owner| match owner {
                Ownership::None => facts.owner.is_none(),
                Ownership::Known => facts.owner.is_some(),
            })
            && self.role.is_none_or(|role| facts.role == Some(role))
    }

    /// Each filter by the name of its flag and of its query parameter.
    fn fields(&mut self) -> Fields<'_> {
        vec![
            ("state", &mut self.state),
            ("port", &mut self.port),
            ("lport", &mut self.lport),
            ("rport", &mut self.rport),
            ("addr", &mut self.addr),
            ("laddr", &mut self.laddr),
            ("raddr", &mut self.raddr),
            ("ipv4", &mut self.ipv4),
            ("ipv6", &mut self.ipv6),
            ("pid", &mut self.pid),
            ("comm", &mut self.comm),
            ("container", &mut self.container),
            ("owner", &mut self.owner),
            ("role", &mut self.role),
        ]
    }
}

impl Filter {
    #[must_use]
    pub fn matches(&self, t: &Transition) -> bool {
        let facts = Facts {
            states: &[t.from, t.to],
            family: t.family,
            local: t.local,
            remote: t.remote,
            role: t.role,
            owner: t.owner,
            container: t.container.as_deref(),
        };
        self.socket.matches(&facts)
            && holds(&self.from, |s| s.matches(t.from))
            && holds(&self.to, |s| s.matches(t.to))
            && self
                .min_dwell
                .is_none_or(|min| t.dwell_ns.is_some_and(|dwell| lasted(dwell, min)))
    }

    fn fields(&mut self) -> Fields<'_> {
        let mut fields = self.socket.fields();
        fields.push(("from", &mut self.from));
        fields.push(("to", &mut self.to));
        fields.push(("min-dwell", &mut self.min_dwell));
        fields
    }
}

impl ListFilter {
    #[must_use]
    pub fn matches(&self, row: &Listed) -> bool {
        let facts = Facts {
            states: &[row.state],
            family: row.family,
            local: row.local,
            remote: row.remote,
            role: row.role,
            owner: row.owner,
            container: row.container.as_deref(),
        };
        self.socket.matches(&facts) && self.min_age.is_none_or(|min| lasted(row.age_ns, min))
    }

    fn fields(&mut self) -> Fields<'_> {
        let mut fields = self.socket.fields();
        fields.push(("min-age", &mut self.min_age));
        fields
    }
}

/// Which sockets a reader wants listed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selection {
    pub filter: ListFilter,
    /// One network namespace, by inode; `None` for all that are traced.
    pub netns: Option<Inode>,
}

impl Selection {
    #[must_use]
    pub fn matches(&self, row: &Listed) -> bool {
        in_netns(self.netns, row.netns) && self.filter.matches(row)
    }

    /// As [`Subscription::from_query`].
    ///
    /// # Errors
    /// The same.
    pub fn from_query(query: &str) -> Result<Self, ValueError> {
        read_query(query, Self::fields)
    }

    /// The query that [`from_query`](Self::from_query) reads back.
    #[must_use]
    pub fn to_query(&self) -> String {
        write_query(self.clone().fields())
    }

    fn fields(&mut self) -> Fields<'_> {
        let mut fields = self.filter.fields();
        fields.push(("netns", &mut self.netns));
        fields
    }
}

/// What one reader of a stream wants to see.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Subscription {
    pub filter: Filter,
    /// The kernel's own transitions, nothing inferred.
    pub raw: bool,
    /// One network namespace, by inode; `None` for all that are traced.
    pub netns: Option<Inode>,
}

impl Subscription {
    #[must_use]
    pub fn matches(&self, transition: &Transition) -> bool {
        in_netns(self.netns, transition.netns) && self.filter.matches(transition)
    }

    /// Reads a URL's query, without its `?`: parameters are named like the flags.
    ///
    /// # Errors
    /// One line about the parameter that is unknown or whose value can't be taken.
    pub fn from_query(query: &str) -> Result<Self, ValueError> {
        read_query(query, Self::fields)
    }

    /// The query that [`from_query`](Self::from_query) reads back.
    #[must_use]
    pub fn to_query(&self) -> String {
        write_query(self.clone().fields())
    }

    fn fields(&mut self) -> Fields<'_> {
        let mut fields = self.filter.fields();
        fields.push(("raw", &mut self.raw));
        fields.push(("netns", &mut self.netns));
        fields
    }
}

fn in_netns(asked: Option<Inode>, netns: Option<u32>) -> bool {
    asked.is_none_or(|Inode(inode)| netns == Some(inode))
}

/// What `asked` covers, where `traced` is covered at all.
#[must_use]
pub fn covered(asked: Option<Inode>, traced: NetnsSelection) -> NetnsSelection {
    asked.map_or(traced, |Inode(inode)| NetnsSelection::One(inode))
}

/// By the names of the query's parameters.
type Fields<'a> = Vec<(&'static str, &'a mut dyn Field)>;

fn read_query<T: Default>(
    query: &str,
    fields_of: fn(&mut T) -> Fields<'_>,
) -> Result<T, ValueError> {
    let mut read = T::default();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let mut fields = fields_of(&mut read);
        let Some((_, field)) = fields.iter_mut().find(|(known, _)| *known == name) else {
            let known: Vec<_> = fields.iter().map(|(name, _)| *name).collect();
            let known = known.join(", ");
            let name = name.escape_debug();
            return Err(ValueError(format!(
                "unknown parameter `{name}`; known: {known}"
            )));
        };
        field
            .add(&value)
            .map_err(|error| ValueError(format!("{name}: {error}")))?;
    }
    Ok(read)
}

fn write_query(fields: Fields<'_>) -> String {
    let mut written = form_urlencoded::Serializer::new(String::new());
    for (name, field) in fields {
        if let Some(value) = field.value() {
            written.append_pair(name, &value);
        }
    }
    written.finish()
}

/// How a field is given and shown in a query.
trait Field {
    fn add(&mut self, value: &str) -> Result<(), ValueError>;

    /// `None` if it was not given.
    fn value(&self) -> Option<String>;
}

impl<T: FromStr<Err = ValueError> + Display> Field for Vec<T> {
    fn add(&mut self, value: &str) -> Result<(), ValueError> {
        for value in value.split(',') {
            self.push(value.parse()?);
        }
        Ok(())
    }

    fn value(&self) -> Option<String> {
        let values: Vec<_> = self.iter().map(ToString::to_string).collect();
        (!values.is_empty()).then(|| values.join(","))
    }
}

impl<T: FromStr<Err: Display> + Display> Field for Option<T> {
    fn add(&mut self, value: &str) -> Result<(), ValueError> {
        if self.is_some() {
            return Err(ValueError("given twice; expected one value".to_owned()));
        }
        let given = value.parse();
        *self = Some(given.map_err(|error: T::Err| ValueError(error.to_string()))?);
        Ok(())
    }

    fn value(&self) -> Option<String> {
        self.as_ref().map(ToString::to_string)
    }
}

impl Field for bool {
    fn add(&mut self, value: &str) -> Result<(), ValueError> {
        *self = match value {
            "" | "true" => true,
            "false" => false,
            _ => {
                let value = value.escape_debug();
                return Err(ValueError(format!("`{value}` is neither true nor false")));
            }
        };
        Ok(())
    }

    fn value(&self) -> Option<String> {
        self.then(|| "true".to_owned())
    }
}

#[cfg(test)]
mod tests;
