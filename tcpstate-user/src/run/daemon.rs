//! `tcpstate daemon`: a tracer, and what serves it.
use crate::cli::Attach;
use crate::config::DaemonConfig;
pub fn run(_: &DaemonConfig, _: Option<Attach>) -> anyhow::Result<()> {
    anyhow::bail!("later")
}
