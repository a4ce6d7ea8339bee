//! What goes to stdout. Progress and logs go to stderr.

use std::fmt::Display;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde::Serialize;

/// Writes a line to stdout.
pub fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()
}

/// Writes without a line end, at once: for streaming.
pub fn piece(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes a value as one line of JSON.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    Ok(line(&serde_json::to_string(value)?)?)
}

/// Longest time that a message to stderr is worth.
const TELL_TIME: Duration = Duration::from_secs(1);

/// Writes a line to stderr if it takes one: neither a disk that is full nor a reader that sleeps is a reason to fail, or to
/// wait for longer than a moment. While it takes nothing, lines are lost.
pub fn tell(text: impl Display) {
    static IS_STUCK: AtomicBool = AtomicBool::new(false);
    if IS_STUCK.load(Ordering::Acquire) {
        return;
    }
    let line = format!("{text}\n");
    let (done, written) = mpsc::channel();
    let write = move || {
        let _ = io::stderr().write_all(line.as_bytes());
        let _ = done.send(());
        IS_STUCK.store(false, Ordering::Release);
    };
    let writer = thread::Builder::new().name("longhaul-stderr".into()).spawn(write);
    if writer.is_ok() && written.recv_timeout(TELL_TIME).is_err() {
        IS_STUCK.store(true, Ordering::Release);
        // It may have been written meanwhile.
        if written.try_recv().is_ok() {
            IS_STUCK.store(false, Ordering::Release);
        }
    }
}

/// `12288` as `12,288`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Bytes with a binary unit, one decimal.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Lines of equally many cells, the first column to the left, the others to the right.
pub fn table(lines: &[Vec<String>]) -> io::Result<()> {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |c: usize| lines.iter().filter_map(|l| l.get(c)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|c| width(c).unwrap_or(0)).collect();
    for cells in lines {
        let cells = cells.iter().zip(&widths).enumerate().map(|(c, (cell, &width))| {
            if c == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        line(cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(72_706_203_648), "72,706,203,648");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(145_412_407_296), "135.4 GiB");
    }
}
