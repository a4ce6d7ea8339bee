//! Documents: reading text, Markdown and PDF files into UTF-8, told apart by content, not by name.
//!
//! Invariant: a [`Document`] that was read by this module has text without byte-order mark and without white space at
//! its end, and at least one visible character.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::{LongdocError, Result, pdf};

/// Most bytes of a document's file.
pub const MAX_FILE_BYTES: u64 = 256 << 20;
/// Most bytes of a document's text: some 16 million tokens, beyond every context.
pub const MAX_TEXT_BYTES: u64 = 64 << 20;

/// PDF readers accept the header anywhere in the first 1,024 bytes (ISO 32000-1, annex H, note 13).
const PDF_HEADER_WITHIN: usize = 1024;

/// A named text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// File name, or the path where two files of one call have the same name.
    pub name: String,
    /// Its text; byte ranges in a [`crate::Passage`] refer to it.
    pub text: String,
}

impl Document {
    /// Reads one file.
    ///
    /// # Errors
    /// A missing file, a directory, one that cannot be read or is larger than [`MAX_FILE_BYTES`], and those of
    /// [`Document::from_bytes`].
    pub fn load(path: &Path) -> Result<Self> {
        let name = file_name(path);
        Self::from_bytes(&name, &read(path, &name, MAX_FILE_BYTES)?)
    }

    /// Reads several files; files with the same name are named by their paths.
    ///
    /// # Errors
    /// The first file's that fails; see [`Document::load`].
    pub fn load_all(paths: &[PathBuf]) -> Result<Vec<Self>> {
        let mut uses: HashMap<String, usize> = HashMap::new();
        for path in paths {
            *uses.entry(file_name(path)).or_default() += 1;
        }
        paths
            .iter()
            .map(|path| {
                let mut document = Self::load(path)?;
                if uses.get(&document.name).is_some_and(|&n| n > 1) {
                    document.name = path.display().to_string();
                }
                Ok(document)
            })
            .collect()
    }

    /// A document from the bytes of a file: PDF when it starts like one, UTF-8 text or Markdown otherwise. `name` is
    /// used in titles and messages.
    ///
    /// # Errors
    /// Not UTF-8 (with the first wrong byte), binary, empty, too large; a PDF that is encrypted, broken or without
    /// text layer.
    pub fn from_bytes(name: &str, bytes: &[u8]) -> Result<Self> {
        let text = if is_pdf(bytes) {
            pdf::text(name, bytes, MAX_TEXT_BYTES)?
        } else {
            if bytes.len() as u64 > MAX_TEXT_BYTES {
                return Err(LongdocError::TooLarge {
                    name: name.into(),
                    what: "text",
                    limit: MAX_TEXT_BYTES,
                });
            }
            utf8(name, bytes)?.to_owned()
        };
        let text = text.trim_end();
        if text.trim_start().is_empty() {
            return Err(LongdocError::Empty { name: name.into() });
        }
        Ok(Self { name: name.into(), text: text.to_owned() })
    }
}

/// The last part of a path, or all of it where there is none.
fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

fn read(path: &Path, name: &str, limit: u64) -> Result<Vec<u8>> {
    let io = |source: std::io::Error| match source.kind() {
        ErrorKind::NotFound => LongdocError::NotFound { path: path.into() },
        ErrorKind::IsADirectory => LongdocError::IsDirectory { path: path.into() },
        _ => LongdocError::Io { path: path.into(), action: "cannot read", source },
    };
    // Opening a directory succeeds on Unix and fails with "permission denied" on Windows.
    if path.is_dir() {
        return Err(LongdocError::IsDirectory { path: path.into() });
    }
    let mut bytes = Vec::new();
    // The limit holds for pipes and devices too, which have no size.
    File::open(path).map_err(io)?.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > limit {
        return Err(LongdocError::TooLarge { name: name.into(), what: "file", limit });
    }
    Ok(bytes)
}

fn is_pdf(bytes: &[u8]) -> bool {
    let head = bytes.get(..PDF_HEADER_WITHIN.min(bytes.len())).unwrap_or(bytes);
    // Text about PDF may hold the header too: in front of a real one there is no running text, at most a few bytes of
    // a mail or print header, and what follows is a version number.
    head.windows(8)
        .position(|w| w.starts_with(b"%PDF-") && w.get(5).is_some_and(u8::is_ascii_digit))
        .is_some_and(|at| {
            at == 0 || bytes.windows(5).rev().take(PDF_HEADER_WITHIN * 2).any(|w| w == b"%%EOF")
        })
}

fn utf8<'a>(name: &str, bytes: &'a [u8]) -> Result<&'a str> {
    if let Some(what) = known_binary(bytes) {
        return Err(LongdocError::Binary { name: name.into(), what: what.into() });
    }
    let not_utf8 = |offset: usize, hint| {
        let line = 1 + bytes.iter().take(offset).filter(|&&b| b == b'\n').count();
        let byte = bytes.get(offset).copied().unwrap_or_default();
        LongdocError::NotUtf8 { name: name.into(), offset, line, byte, hint }
    };
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(not_utf8(0, "it is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`"));
    }
    if let Some(at) = bytes.iter().position(|&b| b == 0) {
        return Err(LongdocError::Binary { name: name.into(), what: format!("byte {at} is NUL") });
    }
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let hint = if e.error_len().is_none() {
            "the file ends inside a character; is it complete?"
        } else {
            "convert it, for example with `iconv -f WINDOWS-1252 -t UTF-8`"
        };
        not_utf8(e.valid_up_to(), hint)
    })?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
}

/// Files that users take for documents, by their first bytes.
fn known_binary(bytes: &[u8]) -> Option<&'static str> {
    const KINDS: [(&[u8], &str); 9] = [
        (b"PK\x03\x04", "a ZIP container such as docx, odt or epub"),
        (b"\xd0\xcf\x11\xe0", "an old Office document"),
        (b"{\\rtf", "rich text (RTF)"),
        (b"\x1f\x8b", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x89PNG", "a PNG picture"),
        (b"\xff\xd8\xff", "a JPEG picture"),
        (b"GIF8", "a GIF picture"),
        (b"\x7fELF", "a program"),
    ];
    KINDS.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, what)| *what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(bytes: &[u8]) -> Result<Document> {
        Document::from_bytes("d.txt", bytes)
    }

    #[test]
    fn reads_text_and_drops_bom_and_trailing_white_space() {
        let document = load("\u{feff}Grüße\r\n  und 你好 \n\n".as_bytes()).unwrap();
        assert_eq!(document.text, "Grüße\r\n  und 你好");
        assert_eq!(document.name, "d.txt");
    }

    #[test]
    fn names_the_first_byte_that_is_not_utf8() {
        let error = load(b"one\ntw\xf6 three").unwrap_err();
        assert!(matches!(error, LongdocError::NotUtf8 { offset: 6, line: 2, byte: 0xf6, .. }), "{error}");
        assert!(error.to_string().contains("byte 6 (line 2) is 0xf6"), "{error}");
        let error = load("abc é".as_bytes().split_last().unwrap().1).unwrap_err();
        assert!(error.to_string().contains("ends inside a character"), "{error}");
        let error = load(b"\xff\xfeh\0i\0").unwrap_err();
        assert!(error.to_string().contains("UTF-16"), "{error}");
    }

    #[test]
    fn refuses_binary_and_empty_files() {
        assert!(
            matches!(load(b"PK\x03\x04rest"), Err(LongdocError::Binary { what, .. }) if what.contains("docx"))
        );
        assert!(matches!(load(b"ab\0cd"), Err(LongdocError::Binary { what, .. }) if what.contains("byte 2")));
        assert!(matches!(load(b""), Err(LongdocError::Empty { .. })));
        assert!(matches!(load(b"\xef\xbb\xbf \n\t\n"), Err(LongdocError::Empty { .. })));
    }

    #[test]
    fn tells_paths_apart() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing.txt");
        assert!(matches!(Document::load(&missing), Err(LongdocError::NotFound { path }) if path == missing));
        assert!(matches!(Document::load(dir.path()), Err(LongdocError::IsDirectory { .. })));
        let large = dir.path().join("large.txt");
        std::fs::write(&large, "0123456789").unwrap();
        assert!(matches!(read(&large, "large.txt", 9), Err(LongdocError::TooLarge { limit: 9, .. })));
        assert_eq!(read(&large, "large.txt", 10).unwrap().len(), 10);
    }

    #[test]
    fn equal_file_names_become_paths() {
        let dir = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for (folder, file) in [("a", "notes.txt"), ("b", "notes.txt"), ("b", "other.txt")] {
            std::fs::create_dir_all(dir.path().join(folder)).unwrap();
            let path = dir.path().join(folder).join(file);
            std::fs::write(&path, "text").unwrap();
            paths.push(path);
        }
        let names: Vec<_> = Document::load_all(&paths).unwrap().into_iter().map(|d| d.name).collect();
        assert_eq!(names[0], paths[0].display().to_string());
        assert_eq!(names[1], paths[1].display().to_string());
        assert_eq!(names[2], "other.txt");
    }

    #[test]
    fn text_about_pdf_is_text() {
        assert_eq!(load(b"A file starts with %PDF-1.7, then come objects.").unwrap().text.len(), 47);
        assert!(is_pdf(b"%PDF-1.7\n"));
        assert!(is_pdf(b"junk\n%PDF-1.4\n1 0 obj endobj trailer\n%%EOF\n"));
        assert!(!is_pdf(b"%PDF"));
    }
}
