//! Where a download reports to.

use indicatif::{ProgressBar, ProgressStyle};

/// Follows the download of a model, one file after another.
pub trait DownloadProgress {
    /// A request to `url` is about to be made; it may take as long as the system takes to connect.
    fn contacting(&mut self, _url: &str) {}
    /// `file` of `bytes` begins, or begins again after an interruption.
    fn start(&mut self, _file: &str, _bytes: u64) {}
    /// `bytes` more of the current file are on disk.
    fn advance(&mut self, _bytes: u64) {}
    /// The current file is complete.
    fn finish(&mut self) {}
}

/// Reports nothing.
impl DownloadProgress for () {}

/// One progress bar a file on standard error; silent when that is not a terminal.
#[derive(Debug)]
pub struct StderrBar {
    bar: ProgressBar,
}

impl StderrBar {
    /// A bar that shows nothing yet.
    pub fn new() -> Self {
        Self { bar: ProgressBar::hidden() }
    }
}

impl Default for StderrBar {
    fn default() -> Self {
        Self::new()
    }
}

impl DownloadProgress for StderrBar {
    fn start(&mut self, file: &str, bytes: u64) {
        let template = "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})";
        self.bar = ProgressBar::new(bytes).with_message(file.to_owned());
        // The template is constant and valid; the default style is a fair answer if that ever changes.
        self.bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
    }

    fn advance(&mut self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn finish(&mut self) {
        self.bar.finish();
    }
}
