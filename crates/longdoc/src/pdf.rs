//! The text layer of a PDF, through `pdf-extract`.
//!
//! PDFs come from strangers and the reader panics on many broken ones, so it runs on a thread of its own: a panic ends
//! that thread and becomes an error, deep nesting has a large stack, and the text is cut off at a limit, so that a small
//! file cannot unpack into all of the memory.

use std::cell::Cell;
use std::io::{self, Write};
use std::sync::Once;

use pdf_extract::{Document as Pdf, OutputError, PlainTextOutput, output_doc_page};

use crate::{LongdocError, Result};

/// Nested objects and form resources recurse in the reader.
const STACK_BYTES: usize = 64 << 20;

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// The text of all pages, an empty line between them, at most `limit` bytes.
pub(crate) fn text(name: &str, bytes: &[u8], limit: u64) -> Result<String> {
    silence_reader_panics();
    let failed = |message: String| LongdocError::Pdf { name: name.into(), page: None, message };
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("pdf".into())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, || {
                QUIET.set(true);
                extract(name, bytes, limit)
            })
            .map_err(|e| failed(format!("no thread to read it: {e}")))?
            .join()
            .unwrap_or_else(|panic| {
                Err(failed(format!("the reader gave up ({})", panic_text(panic.as_ref()))))
            })
    })
}

fn extract(name: &str, bytes: &[u8], limit: u64) -> Result<String> {
    let failed = |page, message: String| LongdocError::Pdf { name: name.into(), page, message };
    let mut pdf = Pdf::load_mem(bytes).map_err(|e| failed(None, e.to_string()))?;
    // Many PDFs are encrypted with the empty user password, which every reader tries.
    if pdf.is_encrypted() && pdf.decrypt("").is_err() {
        return Err(LongdocError::PdfEncrypted { name: name.into() });
    }
    let pages: Vec<u32> = pdf.get_pages().into_keys().collect();
    if pages.is_empty() {
        return Err(failed(None, "it has no pages".into()));
    }
    let mut output =
        Limited { bytes: Vec::new(), limit: usize::try_from(limit).unwrap_or(usize::MAX), full: false };
    for &page in &pages {
        let result = {
            let writer: &mut dyn Write = &mut output;
            output_doc_page(&pdf, &mut PlainTextOutput::new(writer), page)
        };
        if output.full {
            return Err(LongdocError::TooLarge { name: name.into(), what: "text", limit });
        }
        result.map_err(|e| failed(Some(page), message(&e)))?;
        output.bytes.extend_from_slice(b"\n\n");
    }
    let text = tidy(&String::from_utf8_lossy(&output.bytes));
    if text.is_empty() {
        return Err(LongdocError::PdfWithoutText { name: name.into(), pages: pages.len() });
    }
    Ok(text)
}

fn message(error: &OutputError) -> String {
    match error {
        OutputError::PdfError(e) => e.to_string(),
        other => other.to_string(),
    }
}

/// Drops white space at the ends of lines, and keeps one empty line where the reader leaves many.
fn tidy(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut empty = 0usize;
    for line in text.lines() {
        let line = line.trim_end();
        if line.is_empty() {
            empty += 1;
            continue;
        }
        if !out.is_empty() {
            out.push_str(if empty > 0 { "\n\n" } else { "\n" });
        }
        empty = 0;
        out.push_str(line);
    }
    out
}

/// A buffer that refuses to grow beyond its limit.
struct Limited {
    bytes: Vec<u8>,
    limit: usize,
    full: bool,
}

impl Write for Limited {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.len() > self.limit.saturating_sub(self.bytes.len()) {
            self.full = true;
            return Err(io::Error::other("the text is too large"));
        }
        self.bytes.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "without a reason".into());
    // Some of the reader's panics print whole objects.
    text.chars().take(200).collect()
}

/// Keeps the panics of reader threads, which become errors, out of stderr; all others go to the hook in force.
fn silence_reader_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.try_with(Cell::get).unwrap_or(false) {
                previous(info);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A PDF of the given content streams, one a page, with Helvetica as /F1 and a correct xref table.
    pub(crate) fn pdf(pages: &[&str]) -> Vec<u8> {
        let kids: Vec<String> = (0..pages.len()).map(|i| format!("{} 0 R", 4 + 2 * i)).collect();
        let mut objects = vec![
            "<< /Type /Catalog /Pages 2 0 R >>".to_owned(),
            format!("<< /Type /Pages /Kids [{}] /Count {} >>", kids.join(" "), pages.len()),
            "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>".to_owned(),
        ];
        for (i, content) in pages.iter().enumerate() {
            objects.push(format!(
                "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {} 0 R /Resources << /Font << /F1 3 \
                 0 R >> >> >>",
                5 + 2 * i
            ));
            objects.push(format!("<< /Length {} >>\nstream\n{content}\nendstream", content.len()));
        }
        let mut file = b"%PDF-1.4\n".to_vec();
        let mut offsets = Vec::new();
        for (i, object) in objects.iter().enumerate() {
            offsets.push(file.len());
            file.extend_from_slice(format!("{} 0 obj\n{object}\nendobj\n", i + 1).as_bytes());
        }
        let xref = file.len();
        file.extend_from_slice(format!("xref\n0 {}\n0000000000 65535 f \n", objects.len() + 1).as_bytes());
        for offset in offsets {
            file.extend_from_slice(format!("{offset:010} 00000 n \n").as_bytes());
        }
        file.extend_from_slice(
            format!("trailer\n<< /Size {} /Root 1 0 R >>\nstartxref\n{xref}\n%%EOF\n", objects.len() + 1)
                .as_bytes(),
        );
        file
    }

    fn line(y: usize, text: &str) -> String {
        format!("BT /F1 12 Tf 72 {y} Td ({text}) Tj ET\n")
    }

    #[test]
    fn reads_the_text_of_all_pages() {
        let first = line(700, "The secret code of Oslo is 48213.") + &line(686, "Second line.");
        let file = pdf(&[&first, &line(700, "Page two.")]);
        let document = crate::Document::from_bytes("report", &file).unwrap();
        assert_eq!(document.text, "The secret code of Oslo is 48213.\nSecond line.\n\nPage two.");
    }

    #[test]
    fn a_pdf_without_text_says_so() {
        let error = text("scan.pdf", &pdf(&["0 0 100 100 re f", ""]), 1000).unwrap_err();
        assert!(matches!(error, LongdocError::PdfWithoutText { pages: 2, .. }), "{error}");
    }

    #[test]
    fn the_text_is_limited() {
        let error = text("bomb.pdf", &pdf(&[&line(700, "0123456789").repeat(20)]), 100).unwrap_err();
        assert!(matches!(error, LongdocError::TooLarge { what: "text", limit: 100, .. }), "{error}");
    }

    #[test]
    fn broken_files_are_errors_whatever_is_broken() {
        let good = pdf(&[&line(700, "Hello."), &line(700, "World.")]);
        assert!(text("cut.pdf", &good[..good.len() / 2], 1000).is_err());
        assert!(text("head.pdf", b"%PDF-1.7\n", 1000).is_err());
        // A font that is not there, an operator with too few operands: the reader panics on some of these.
        for content in ["BT /F9 12 Tf (x) Tj ET", "BT /F1 Tf (x) Tj ET", "Q Q Q cm", "BT (x) Tj ET", "/X Do"]
        {
            if let Err(error) = text("odd.pdf", &pdf(&[content]), 1000) {
                assert!(error.to_string().starts_with("odd.pdf: "), "{error}");
            }
        }
        // Every byte of the file damaged in turn: never a panic, never a hang.
        for at in (0..good.len()).step_by(7) {
            let mut bad = good.clone();
            bad[at] ^= 0x15;
            let _ = text("bad.pdf", &bad, 1000);
        }
    }

    #[test]
    fn a_panic_of_the_reader_is_an_error() {
        // pdf-extract looks the font up with a panicking accessor.
        let error = text("font.pdf", &pdf(&["BT /F9 12 Tf (x) Tj ET"]), 1000).unwrap_err();
        assert!(matches!(error, LongdocError::Pdf { .. }), "{error}");
    }

    #[test]
    fn tidy_keeps_paragraphs() {
        assert_eq!(tidy("\n\n a  \nb\n\n\n\nc \n"), " a\nb\n\nc");
    }
}
