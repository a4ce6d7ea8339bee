//! Logs: events as lines of text or as one JSON object a line, written by a thread of their own.
//!
//! Whoever logs never waits: a line for which there is no room — nobody reads the other end — is dropped and counted. Without a
//! log that was installed, events go nowhere.

use std::fmt::{Display, Write as _};
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use longhaul_text::civil_date;
use serde_json::{Map, Value};

/// Lines that may wait for the reader of the log.
const WAITING_LINES: usize = 8192;

/// How long the end of the process waits for the log's reader.
const FLUSH_TIME: Duration = Duration::from_secs(1);

/// The log of the process.
static LOG: OnceLock<(LogOptions, Lines)> = OnceLock::new();

/// How important an event is, or the least important that is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing is shown.
    Off,
    /// Something failed.
    Error,
    /// Something may fail, or is not as it was asked for.
    Warn,
    /// What operators want to know.
    Info,
    /// What they want to know when they look for something.
    Debug,
    /// All.
    Trace,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Off => "OFF",
            Self::Error => "ERROR",
            Self::Warn => "WARN",
            Self::Info => "INFO",
            Self::Debug => "DEBUG",
            Self::Trace => "TRACE",
        }
    }
}

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// Time, level, message, `key=value`.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What is logged, and how.
#[derive(Debug, Clone, Copy)]
pub struct LogOptions {
    /// How lines look.
    pub format: LogFormat,
    /// Events of at least this importance.
    pub level: Level,
    /// The same for the record that there is of every request; [`Level::Info`] and beyond show them.
    pub requests: Level,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { format: LogFormat::Text, level: Level::Info, requests: Level::Info }
    }
}

/// A log that is being written. Dropping it writes what waits, if somebody reads.
#[derive(Debug)]
pub struct Log(Lines);

enum Message {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

/// The way to the thread that writes.
#[derive(Debug, Clone)]
struct Lines {
    sender: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

impl Log {
    /// Sends the events of the whole process to `sink`, from now on.
    ///
    /// # Errors
    /// There is no thread left, or events go somewhere else already.
    pub fn install(options: LogOptions, sink: impl Write + Send + 'static) -> io::Result<Self> {
        let (sender, lines) = sync_channel(WAITING_LINES);
        let dropped = Arc::<AtomicU64>::default();
        let failed = Arc::clone(&dropped);
        thread::Builder::new().name("longhaul-log".into()).spawn(move || write(&lines, sink, &failed))?;
        let lines = Lines { sender, dropped };
        LOG.set((options, lines.clone()))
            .map_err(|_| io::Error::other("events go to another log already"))?;
        Ok(Self(lines))
    }

    /// Lines that were dropped so far; the count goes on.
    pub fn dropped(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.0.dropped)
    }

    /// Waits until everything logged so far is written, or a second if nobody reads.
    pub fn flush(&self) {
        let (done, flushed) = sync_channel(1);
        if self.0.sender.try_send(Message::Flush(done)).is_ok() {
            let _ = flushed.recv_timeout(FLUSH_TIME);
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Logs what operators want to know.
pub fn info(message: impl Display) {
    event(Level::Info, message, []);
}

/// Logs what may fail, or is not as it was asked for.
pub fn warn(message: impl Display) {
    event(Level::Warn, message, []);
}

/// Logs that something failed.
pub fn error(message: impl Display) {
    event(Level::Error, message, []);
}

/// Logs an event with fields; those that are null are left out.
pub(crate) fn event<const N: usize>(level: Level, message: impl Display, fields: [(&'static str, Value); N]) {
    if let Some((options, lines)) = LOG.get()
        && level <= options.level
    {
        lines.send(line(options.format, SystemTime::now(), level, &message.to_string(), fields));
    }
}

/// Logs the record of a request.
pub(crate) fn request<const N: usize>(level: Level, fields: [(&'static str, Value); N]) {
    if let Some((options, lines)) = LOG.get()
        && level <= options.requests
    {
        lines.send(line(options.format, SystemTime::now(), level, "request", fields));
    }
}

fn line<const N: usize>(
    format: LogFormat,
    now: SystemTime,
    level: Level,
    message: &str,
    fields: [(&'static str, Value); N],
) -> Vec<u8> {
    let fields = fields.into_iter().filter(|(_, value)| !value.is_null());
    let mut text = match format {
        LogFormat::Text => {
            let mut text = format!("{} {} {}", timestamp(now), level.name(), harmless(message, usize::MAX));
            for (name, value) in fields {
                // Strings are quoted, as in JSON.
                let _ = write!(text, " {name}={value}");
            }
            text
        }
        LogFormat::Json => {
            let head = [
                ("timestamp", Value::from(timestamp(now))),
                ("level", Value::from(level.name())),
                ("message", Value::from(message)),
            ];
            let object: Map<String, Value> =
                head.into_iter().chain(fields).map(|(name, value)| (name.to_owned(), value)).collect();
            Value::Object(object).to_string()
        }
    };
    text.push('\n');
    text.into_bytes()
}

/// `2026-11-29T00:41:07.123Z`
fn timestamp(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, date, _) = civil_date(days);
    format!(
        "{year:04}-{month:02}-{date:02}T{:02}:{:02}:{:02}.{:03}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_millis()
    )
}

fn write(lines: &Receiver<Message>, mut sink: impl Write, failed: &AtomicU64) {
    while let Ok(message) = lines.recv() {
        match message {
            Message::Line(line) => {
                if sink.write_all(&line).is_err() {
                    failed.fetch_add(1, Ordering::Relaxed);
                }
            }
            Message::Flush(done) => {
                let _ = sink.flush();
                let _ = done.try_send(());
            }
        }
    }
}

impl Lines {
    fn send(&self, line: Vec<u8>) {
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            self.sender.try_send(Message::Line(line))
        {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A client's text in a line of the log: at most `limit` characters, and none that could break the line or move a terminal's
/// cursor.
pub(crate) fn harmless(text: &str, limit: usize) -> String {
    let mut out = String::with_capacity(text.len().min(limit));
    let mut characters = text.chars();
    for c in characters.by_ref().take(limit) {
        if c.is_control()
            || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    if characters.next().is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_sends_stays_in_its_line() {
        assert_eq!(harmless("plain, ümlaut and 日本", 100), "plain, ümlaut and 日本");
        assert_eq!(harmless("a\r\n{\"level\":\"ERROR\"}", 100), "a\\u{d}\\u{a}{\"level\":\"ERROR\"}");
        assert_eq!(harmless("\u{1b}[2J\0\u{2028}\u{202e}", 100), "\\u{1b}[2J\\u{0}\\u{2028}\\u{202e}");
        assert_eq!(harmless("日本語", 2), "日本…");
        assert_eq!(harmless("日本", 2), "日本");
    }

    #[test]
    fn lines_say_when_and_what() {
        for (seconds, date) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(seconds)), date);
        }
        let now = UNIX_EPOCH + Duration::from_millis(1_795_912_867_123);
        let text = |format| {
            let fields = [("id", Value::from("a\"\n")), ("tokens", Value::from(3)), ("key", Value::Null)];
            String::from_utf8(line(format, now, Level::Warn, "it\nis", fields)).unwrap()
        };
        assert_eq!(
            text(LogFormat::Text),
            "2026-11-29T00:41:07.123Z WARN it\\u{a}is id=\"a\\\"\\n\" tokens=3\n"
        );
        assert_eq!(
            text(LogFormat::Json),
            "{\"timestamp\":\"2026-11-29T00:41:07.123Z\",\"level\":\"WARN\",\"message\":\"it\\nis\",\"id\":\"a\\\"\\n\",\"tokens\":3}\n"
        );
    }

    #[test]
    fn a_reader_that_stands_still_costs_lines_and_no_time() {
        /// Never returns from a write until it is told.
        struct Blocked(Receiver<()>);
        impl Write for Blocked {
            fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
                let _ = self.0.recv();
                Ok(buf.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (release, blocked) = sync_channel::<()>(0);
        let (sender, lines) = sync_channel(4);
        let failed = AtomicU64::new(0);
        thread::scope(|scope| {
            let failed = &failed;
            scope.spawn(move || write(&lines, Blocked(blocked), failed));
            let log = Lines { sender, dropped: Arc::default() };
            for _ in 0..100 {
                log.send(b"line\n".to_vec());
            }
            // Four wait, and one is in the writer's hands, if it was that quick.
            let dropped = log.dropped.load(Ordering::Relaxed);
            assert!((95..=96).contains(&dropped), "{dropped}");
            drop(release);
            drop(log);
        });
        assert_eq!(failed.load(Ordering::Relaxed), 0);
    }
}
