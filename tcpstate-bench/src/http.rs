//! As much of HTTP as a scrape needs, and what a page of metrics says.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

const PATIENCE: Duration = Duration::from_secs(30);

/// The body of an answer with status 200.
pub fn get_unix(socket: &Path, path: &str) -> Result<String> {
    let connection = UnixStream::connect(socket)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    get(connection, path)
}

pub fn get_tcp(address: &str, path: &str) -> Result<String> {
    let connection = TcpStream::connect(address)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    get(connection, path)
}

fn get(mut connection: impl Read + Write, path: &str) -> Result<String> {
    write!(connection, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("an answer without a head")?;
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        _ => bail!("{path} was answered by {:?}", head.lines().next()),
    }
}

/// Series with their values.
pub struct Metrics(Vec<(String, f64)>);

impl Metrics {
    pub fn of(page: &str) -> Result<Self> {
        let lines = page.lines().filter(|line| !line.starts_with('#'));
        let series = lines.map(|line| {
            let (name, value) = line.rsplit_once(' ').context("a line without a value")?;
            Ok((name.to_owned(), value.parse()?))
        });
        Ok(Self(series.collect::<Result<_>>()?))
    }

    /// Over all series of the metric.
    pub fn sum(&self, metric: &str) -> f64 {
        let of_it = self.series(metric);
        of_it.map(|(_, value)| value).sum()
    }

    /// With what stands in braces.
    pub fn series(&self, metric: &str) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().filter_map(move |(name, value)| {
            let labels = name.strip_prefix(metric)?;
            (labels.is_empty() || labels.starts_with('{')).then_some((labels, *value))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_those_of_the_metric_alone() {
        let page = "# HELP a b\na{x=\"1\"} 2\na{x=\"y z\"} 3\nab 4\n";
        let metrics = Metrics::of(page).unwrap();
        assert_eq!(metrics.sum("a"), 5.0);
        assert_eq!(metrics.sum("ab"), 4.0);
        assert_eq!(metrics.series("a").next(), Some(("{x=\"1\"}", 2.0)));
        assert!(Metrics::of("a\n").is_err());
    }
}
