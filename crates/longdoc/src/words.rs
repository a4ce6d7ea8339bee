//! Words of a text as search terms: case-folded, numbers kept whole, scripts without spaces as pairs of characters.

/// What a term is, which decides how much it says about the place it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Holds a digit: 48213, 3.14, A100.
    Number,
    /// Starts with a capital letter.
    Name,
    /// Any other word, or a pair of ideographs.
    Word,
    /// A function word: it is everywhere and says nothing.
    Stop,
}

/// Calls `f` with every term of `text`, in order. `12,345` gives `12345`, `3.14` stays whole, `London's` gives `london`
/// and `s`, `秘密代码` gives `秘密`, `密代`, `代码`.
pub(crate) fn for_each_term(text: &str, mut f: impl FnMut(&str, Kind)) {
    let mut term = String::new();
    let mut chars = text.char_indices().peekable();
    while let Some((_, c)) = chars.next() {
        if is_unspaced(c) {
            let (mut previous, mut alone) = (c, true);
            while let Some(&(_, next)) = chars.peek() {
                if !is_unspaced(next) {
                    break;
                }
                chars.next();
                term.clear();
                term.extend([previous, next]);
                f(&term, Kind::Word);
                (previous, alone) = (next, false);
            }
            if alone {
                term.clear();
                term.push(previous);
                f(&term, Kind::Word);
            }
            continue;
        }
        if !c.is_alphanumeric() {
            continue;
        }
        term.clear();
        let (capital, mut digits, mut last) = (c.is_uppercase(), c.is_numeric(), c);
        term.extend(c.to_lowercase());
        while let Some(&(at, next)) = chars.peek() {
            if (next.is_alphanumeric() || is_combining(next)) && !is_unspaced(next) {
                term.extend(next.to_lowercase());
            } else if matches!(next, '.' | ',') && last.is_ascii_digit() && digit_follows(text, at + 1) {
                // A comma between digits groups thousands, a point starts decimals.
                if next == '.' {
                    term.push('.');
                }
            } else {
                break;
            }
            digits |= next.is_numeric();
            last = next;
            chars.next();
        }
        let kind = if digits {
            Kind::Number
        } else if is_stop_word(&term) {
            Kind::Stop
        } else if capital {
            Kind::Name
        } else {
            Kind::Word
        };
        f(&term, kind);
    }
}

fn digit_follows(text: &str, at: usize) -> bool {
    text.as_bytes().get(at).is_some_and(u8::is_ascii_digit)
}

/// Marks that follow their letter, as in decomposed (NFD) text.
fn is_combining(c: char) -> bool {
    matches!(c, '\u{300}'..='\u{36f}' | '\u{591}'..='\u{5c7}' | '\u{64b}'..='\u{65f}' | '\u{900}'..='\u{903}' | '\u{93a}'..='\u{94f}')
}

/// Scripts that are written without spaces between words, and Hangul, whose particles hang on to them.
fn is_unspaced(c: char) -> bool {
    matches!(u32::from(c),
        0x0E00..=0x0EFF | 0x1000..=0x109F | 0x1780..=0x17FF       // Thai, Lao, Burmese, Khmer
        | 0x3005..=0x3007 | 0x3040..=0x30FF | 0x31F0..=0x31FF     // kana
        | 0x3400..=0x4DBF | 0x4E00..=0x9FFF | 0xF900..=0xFAFF     // ideographs
        | 0xAC00..=0xD7AF | 0xFF66..=0xFF9F | 0x20000..=0x3FFFF) // Hangul, half-width kana, rare ideographs
}

/// English function words; in other languages the document frequency does this work. Sorted.
const STOP_WORDS: [&str; 88] = [
    "a", "about", "all", "also", "an", "and", "any", "are", "as", "at", "be", "been", "but", "by", "can",
    "could", "did", "do", "does", "for", "from", "had", "has", "have", "he", "her", "his", "how", "i", "if",
    "in", "into", "is", "it", "its", "may", "me", "more", "my", "no", "not", "of", "on", "one", "only", "or",
    "other", "our", "out", "s", "she", "should", "so", "some", "such", "t", "than", "that", "the", "their",
    "them", "then", "there", "these", "they", "this", "those", "to", "up", "us", "was", "we", "were", "what",
    "when", "where", "which", "who", "whom", "whose", "why", "will", "with", "would", "yes", "you", "your",
    "yours",
];

fn is_stop_word(term: &str) -> bool {
    STOP_WORDS.binary_search(&term).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(text: &str) -> Vec<(String, Kind)> {
        let mut out = Vec::new();
        for_each_term(text, |t, k| out.push((t.to_owned(), k)));
        out
    }

    fn words(text: &str) -> Vec<String> {
        terms(text).into_iter().map(|(t, _)| t).collect()
    }

    #[test]
    fn stop_words_are_sorted() {
        assert!(STOP_WORDS.is_sorted());
    }

    #[test]
    fn splits_words_and_tells_kinds() {
        use Kind::{Name, Number, Stop, Word};
        let expected =
            [("the", Stop), ("code", Word), ("of", Stop), ("oslo", Name), ("is", Stop), ("48213", Number)];
        let found = terms("The code of Oslo is 48213.");
        assert_eq!(found, expected.map(|(t, k)| (t.to_owned(), k)));
        assert_eq!(words("Größe ÉCOLE e\u{301}te\u{301}"), ["größe", "école", "e\u{301}te\u{301}"]);
    }

    #[test]
    fn numbers_stay_whole() {
        assert_eq!(words("12,345 and 3.14, 7. A100"), ["12345", "and", "3.14", "7", "a100"]);
    }

    #[test]
    fn unspaced_scripts_become_pairs() {
        assert_eq!(words("秘密代码是12345。"), ["秘密", "密代", "代码", "码是", "12345"]);
        assert_eq!(words("我 x"), ["我", "x"]);
        assert_eq!(words("東京tower"), ["東京", "tower"]);
    }
}
