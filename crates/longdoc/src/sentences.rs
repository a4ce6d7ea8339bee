//! Sentence boundaries, by punctuation and layout; no model, no language setting, linear time.

use std::ops::Range;

/// Longest sentence in bytes: longer ones (tables, minified text, text without punctuation) are cut at a space.
pub(crate) const MAX_SENTENCE: usize = 1000;

/// The sentences of `text` in order: byte ranges without the white space around them. Every visible character is in
/// exactly one.
///
/// A sentence ends after `.`, `!`, `?` or `…` (with the quotes and brackets that close there) before white space, unless
/// the point belongs to an abbreviation, an initial or a list number; after `。`, `！` or `？`; at an empty line; and at the
/// end of a line where the next one starts a heading, list item or table row, or where this one is a heading or row.
pub(crate) fn sentences(text: &str) -> Vec<Range<usize>> {
    let bytes = text.as_bytes();
    let mut out = Vec::new();
    let mut start: Option<usize> = None;
    // Where the current sentence could be cut if it gets too long.
    let mut space: Option<usize> = None;
    let mut at = 0;
    while let Some(c) = text.get(at..).and_then(|rest| rest.chars().next()) {
        let next = at + c.len_utf8();
        let Some(from) = start else {
            if !c.is_whitespace() {
                (start, space) = (Some(at), None);
                continue;
            }
            at = next;
            continue;
        };
        let mut end = None;
        match c {
            '.' | '!' | '?' | '…' => {
                let closed = skip_closing(text, next);
                let before_space =
                    text.get(closed..).and_then(|r| r.chars().next()).is_none_or(char::is_whitespace);
                let point = c == '.' && closed == next;
                if before_space && !(point && is_abbreviation(text, from, at)) {
                    end = Some(closed);
                }
            }
            '。' | '！' | '？' | '｡' | '．' => end = Some(skip_closing(text, next)),
            '\n' if ends_block(bytes, from, at) => end = Some(at),
            _ if c.is_whitespace() => space = Some(at),
            _ => {}
        }
        if end.is_none() && next - from > MAX_SENTENCE {
            end = Some(space.filter(|&s| s > from).unwrap_or(next));
        }
        match end {
            Some(end) => {
                out.push(from..from + text.get(from..end).unwrap_or_default().trim_end().len());
                start = None;
                at = end;
            }
            None => at = next,
        }
    }
    if let Some(from) = start {
        out.push(from..text.trim_end().len());
    }
    out
}

/// The end of the closing quotes, brackets, emphasis marks and further stops at `at`.
fn skip_closing(text: &str, at: usize) -> usize {
    let rest = text.get(at..).unwrap_or_default();
    let closing = |c: char| {
        matches!(
            c,
            '.' | '!'
                | '?'
                | '…'
                | '"'
                | '\''
                | ')'
                | ']'
                | '}'
                | '”'
                | '’'
                | '»'
                | '*'
                | '_'
                | '」'
                | '』'
                | '）'
                | '】'
                | '》'
        )
    };
    at + rest.len() - rest.trim_start_matches(closing).len()
}

/// Whether the point at `at` of a sentence from `from` belongs to `Mr.`, `J.`, `e.g.` or the `3.` of a list.
fn is_abbreviation(text: &str, from: usize, at: usize) -> bool {
    const KNOWN: [&str; 22] = [
        "approx", "cf", "co", "dr", "ed", "eq", "etc", "fig", "figs", "jr", "messrs", "mr", "mrs", "ms",
        "no", "nos", "pp", "prof", "sec", "sr", "st", "vs",
    ];
    let before = text.get(from..at).unwrap_or_default();
    let word = before
        .rsplit(|c: char| c.is_whitespace() || matches!(c, '(' | '[' | '"' | '“' | '_' | '—'))
        .next()
        .unwrap_or(before);
    let mut letters = word.chars();
    match (letters.next(), letters.next()) {
        // A list number starts its line and sentence.
        (Some(d), _) if d.is_ascii_digit() => before.len() <= 3 && word.bytes().all(|b| b.is_ascii_digit()),
        (Some(l), None) => l.is_uppercase() && l != 'I',
        _ => {
            word.contains('.') && word.len() <= 5 && word.chars().all(|c| c.is_alphabetic() || c == '.')
                || word.len() <= 6
                    && KNOWN.binary_search(&word.to_ascii_lowercase().as_str()).is_ok()
                    && !is_plain_word(word)
        }
    }
}

/// `no` and `ed` and the like are words of their own in lower case.
fn is_plain_word(word: &str) -> bool {
    matches!(word, "no" | "ed" | "co" | "ms" | "sec")
}

/// Whether the line that ends at the newline at `at` ends its sentence.
fn ends_block(bytes: &[u8], from: usize, at: usize) -> bool {
    // Spaces and a carriage return may stand on an empty line.
    let rest = bytes.get(at + 1..).unwrap_or_default();
    let indent = rest.iter().take_while(|b| matches!(b, b' ' | b'\t' | b'\r')).count();
    let starts_block = match rest.get(indent..).unwrap_or_default() {
        [] | [b'\n', ..] | [b'#' | b'|' | b'>', ..] | [b'-' | b'*' | b'+', b' ', ..] => true,
        digits => {
            let n = digits.iter().take_while(|b| b.is_ascii_digit()).count();
            (1..=3).contains(&n) && matches!(digits.get(n..), Some([b'.' | b')', b' ', ..]))
        }
    };
    // A heading or row ends with its line; only the first line of a sentence can be one.
    starts_block
        || matches!(bytes.get(from), Some(b'#' | b'|'))
            && !bytes.get(from..at).unwrap_or_default().contains(&b'\n')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(text: &str) -> Vec<&str> {
        sentences(text).into_iter().map(|r| &text[r]).collect()
    }

    #[test]
    fn ends_at_punctuation() {
        assert_eq!(
            split("One. Two!  \"Three?\" he said… Four (five.) Six"),
            ["One.", "Two!", "\"Three?\"", "he said…", "Four (five.)", "Six"]
        );
    }

    #[test]
    fn does_not_end_at_abbreviations_numbers_and_initials() {
        assert_eq!(
            split("Mr. Bennet paid 3.50 to J. Smith, e.g. today. Yes."),
            ["Mr. Bennet paid 3.50 to J. Smith, e.g. today.", "Yes."]
        );
        assert_eq!(split("He said no. Then it was I. End."), ["He said no.", "Then it was I.", "End."]);
        assert_eq!(split("The code is 48213. Next."), ["The code is 48213.", "Next."]);
    }

    #[test]
    fn ends_at_layout() {
        let text = "# Title\nSome text\nover lines\n\nPara two\n- item one\n- item two\n| a | b |\n| c | d |\n1. first\n2. second";
        assert_eq!(
            split(text),
            [
                "# Title",
                "Some text\nover lines",
                "Para two",
                "- item one",
                "- item two",
                "| a | b |",
                "| c | d |",
                "1. first",
                "2. second"
            ]
        );
        assert_eq!(split("a\r\n\r\nb"), ["a", "b"]);
    }

    #[test]
    fn ends_at_full_width_punctuation() {
        assert_eq!(
            split("秘密代码是12345。他说：“好！”然后走了。"),
            ["秘密代码是12345。", "他说：“好！”", "然后走了。"]
        );
    }

    #[test]
    fn cuts_long_lines() {
        let text = "word ".repeat(1000);
        let parts = sentences(&text);
        assert!(parts.len() >= 5);
        assert!(parts.iter().all(|r| r.len() <= MAX_SENTENCE && text[r.clone()].ends_with("word")));
        let solid = "é".repeat(3000);
        assert!(sentences(&solid).iter().all(|r| r.len() <= MAX_SENTENCE + 4));
    }

    proptest! {
        /// Every visible character is in exactly one sentence, and sentences are in order.
        #[test]
        fn covers_the_text(text in "[a-z.!? \n\"#|。你é-]{0,200}") {
            let parts = sentences(&text);
            let mut end = 0;
            for range in &parts {
                prop_assert!(range.start >= end && range.start < range.end);
                prop_assert!(text[end..range.start].trim().is_empty());
                prop_assert!(!text[range.clone()].starts_with(char::is_whitespace));
                end = range.end;
            }
            prop_assert!(text[end..].trim().is_empty());
        }
    }
}
