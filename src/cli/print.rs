//! Writing to stdout: text as it comes, JSON where a script reads.

use felid::{Error, Result};
use std::io::Write;

/// Write text to stdout at once.
pub fn text(s: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(s.as_bytes()).and_then(|()| out.flush()).map_err(stdout_error)
}

/// Write a line to stdout.
pub fn line(s: &str) -> Result<()> {
    text(&format!("{s}\n"))
}

/// Write a value to stdout as JSON.
pub fn json(value: &impl serde::Serialize) -> Result<()> {
    line(&serde_json::to_string_pretty(value).map_err(|e| Error::Config(e.to_string()))?)
}

/// Write a value to stdout as one line of JSON.
pub fn json_line(value: &impl serde::Serialize) -> Result<()> {
    line(&serde_json::to_string(value).map_err(|e| Error::Config(e.to_string()))?)
}

fn stdout_error(source: std::io::Error) -> Error {
    Error::Io { action: "write to", path: "stdout".into(), source }
}

/// Write a line to stderr: statistics and errors. Whoever closed stderr does not want them.
pub fn note(s: &str) {
    let _ = writeln!(std::io::stderr(), "{s}");
}

/// Text from elsewhere (paths, names in files) as one line.
pub fn one_line(s: &str) -> String {
    s.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// Bytes for people.
pub fn bytes(n: usize) -> String {
    const UNITS: [&str; 4] = ["B", "KiB", "MiB", "GiB"];
    let (mut x, mut unit) = (n as f64, 0);
    while x >= 1024.0 && unit < 3 {
        x /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{x:.1} {}", UNITS[unit]) }
}
