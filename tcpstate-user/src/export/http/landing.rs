//! The page for people who open the daemon's address; it shows no more than the metrics do.

/// `telemetry_path` holds nothing to escape: the settings take no such path.
pub fn page(telemetry_path: &str) -> String {
    format!(
        r#"<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>tcpstate</title>
<style>
body {{ font-family: sans-serif; margin: 3em auto; max-width: 40em; padding: 0 1em; }}
code {{ background: #8882; padding: 0.1em 0.3em; }}
</style>
</head>
<body>
<h1>tcpstate</h1>
<p>TCP state transitions of this host, traced in the kernel. Version {version}.</p>
<ul>
<li><a href="{telemetry_path}">Metrics</a> for Prometheus</li>
<li><a href="/-/healthy">Health</a>: the daemon runs</li>
<li><a href="/-/ready">Readiness</a>: it knows the sockets that were there before it</li>
</ul>
<p>On the host itself, <code>tcpstate watch</code> follows the transitions as they happen.</p>
</body>
</html>
"#,
        version = env!("CARGO_PKG_VERSION"),
    )
}
