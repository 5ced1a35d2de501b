//! Which transitions a stream shows. Each filter is declared once, here: its flag, its help, its parameter in a
//! query, what it matches.
//!
//! Pure. Which network namespaces are traced at all is the kernel side's; here a stream is only narrowed to one.

mod value;

use std::fmt::Display;
use std::str::FromStr;

use clap::Args;

pub use value::{
    ContainerPrefix, Glob, Inode, Netns, Network, Ownership, Pid, Ports, Span, State, ValueError,
};

use crate::model::{Family, NetnsSelection, Role, Transition};

/// Values of one filter are alternatives; different filters must all hold. What is unknown matches no filter on it.
#[derive(Args, Clone, Debug, Default, PartialEq)]
pub struct Filter {
    /// State on either side of the transition, in any common spelling
    #[arg(short, long, value_name = "STATE,…", value_delimiter = ',')]
    state: Vec<State>,

    /// State that was left
    #[arg(long, value_name = "STATE,…", value_delimiter = ',')]
    from: Vec<State>,

    /// State that was entered
    #[arg(long, value_name = "STATE,…", value_delimiter = ',')]
    to: Vec<State>,

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

    /// At least so long in the state that was left
    #[arg(long, value_name = "DURATION")]
    min_dwell: Option<Span>,
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

impl Filter {
    #[must_use]
    pub fn matches(&self, t: &Transition) -> bool {
        let process = t.owner.map(|owner| owner.process);
        let family = match t.family {
            Family::Ipv4 => self.ipv4 || !self.ipv6,
            Family::Ipv6 => self.ipv6 || !self.ipv4,
        };
        family
            && holds(&self.state, |s| s.matches(t.from) || s.matches(t.to))
            && holds(&self.from, |s| s.matches(t.from))
            && holds(&self.to, |s| s.matches(t.to))
            && holds_of(&self.port, [t.local.port, t.remote.port], Ports::matches)
            && holds_of(&self.lport, [t.local.port], Ports::matches)
            && holds_of(&self.rport, [t.remote.port], Ports::matches)
            && holds_of(&self.addr, [t.local.addr, t.remote.addr], Network::matches)
            && holds_of(&self.laddr, [t.local.addr], Network::matches)
            && holds_of(&self.raddr, [t.remote.addr], Network::matches)
            && holds_of(&self.pid, [process], |pid, process| pid.0 == process.pid)
            && holds_of(
                &self.comm,
                [process.and_then(|process| process.comm)],
                |glob, comm| glob.matches(&comm),
            )
            && holds_of(
                &self.container,
                [t.container.as_deref()],
                ContainerPrefix::matches,
            )
            && self.owner.is_none_or(|owner| match owner {
                Ownership::None => t.owner.is_none(),
                Ownership::Known => t.owner.is_some(),
            })
            && self.role.is_none_or(|role| t.role == Some(role))
            && self.min_dwell.is_none_or(|Span(min)| {
                t.dwell_ns
                    .is_some_and(|dwell| u128::from(dwell) >= min.as_nanos())
            })
    }

    /// Each filter by the name of its flag and of its query parameter.
    fn fields(&mut self) -> [(&'static str, &mut dyn Field); 17] {
        [
            ("state", &mut self.state),
            ("from", &mut self.from),
            ("to", &mut self.to),
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
            ("min-dwell", &mut self.min_dwell),
        ]
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
        self.netns
            .is_none_or(|Inode(inode)| transition.netns == Some(inode))
            && self.filter.matches(transition)
    }

    /// What the stream covers, where `traced` is covered at all.
    #[must_use]
    pub fn covers(&self, traced: NetnsSelection) -> NetnsSelection {
        self.netns
            .map_or(traced, |Inode(inode)| NetnsSelection::One(inode))
    }

    /// Reads a URL's query, without its `?`: parameters are named like the flags.
    ///
    /// # Errors
    /// One line about the parameter that is unknown or whose value can't be taken.
    pub fn from_query(query: &str) -> Result<Self, ValueError> {
        let mut read = Self::default();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let mut fields = read.fields();
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

    /// The query that [`from_query`](Self::from_query) reads back.
    #[must_use]
    pub fn to_query(&self) -> String {
        let mut written = form_urlencoded::Serializer::new(String::new());
        for (name, field) in self.clone().fields() {
            if let Some(value) = field.value() {
                written.append_pair(name, &value);
            }
        }
        written.finish()
    }

    fn fields(&mut self) -> Vec<(&'static str, &mut dyn Field)> {
        let mut fields = Vec::from(self.filter.fields());
        fields.push(("raw", &mut self.raw));
        fields.push(("netns", &mut self.netns));
        fields
    }
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
