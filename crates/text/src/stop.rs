//! Stop strings over a stream of text pieces.
//!
//! One Knuth-Morris-Pratt automaton for each stop string reads every byte once, so a match across piece borders
//! costs nothing extra and no text is searched twice. An automaton's state is the length of the longest suffix of
//! the text that is a prefix of its stop string, which is also the number of bytes that must be held back.

use crate::TextError;

/// Most stop strings in one matcher.
pub const MAX_STOPS: usize = 16;

/// Most bytes in one stop string.
pub const MAX_STOP_BYTES: usize = 1024;

/// Ends a text at the first occurrence of a stop string and never lets a part of that occurrence out.
///
/// The occurrence that is complete first wins, whatever the pieces; of several that end at the same byte, the
/// longest. The emitted text therefore depends only on the concatenation of the pieces.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Automaton>,
    /// Text that is a proper prefix of some stop string, not emitted yet.
    held: String,
    stopped: Option<usize>,
}

/// What one piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that is safe to emit.
    pub text: String,
    /// Index of the stop string that ended the text, when one has. Stays set in all later outcomes.
    pub stopped: Option<usize>,
}

impl StopMatcher {
    /// A matcher for `stops`, which may be empty.
    ///
    /// # Errors
    /// [`TextError::Stop`] for an empty stop string, one longer than [`MAX_STOP_BYTES`], or more than [`MAX_STOPS`].
    pub fn new(stops: Vec<String>) -> Result<Self, TextError> {
        if stops.len() > MAX_STOPS {
            let message = format!("{} stop strings given, at most {MAX_STOPS} are allowed", stops.len());
            return Err(TextError::Stop { index: None, message });
        }
        for (index, stop) in stops.iter().enumerate() {
            let message = match stop.len() {
                0 => "the stop string is empty and would match everywhere; leave it out".to_owned(),
                1..=MAX_STOP_BYTES => continue,
                n => format!("the stop string has {n} bytes, at most {MAX_STOP_BYTES} are allowed"),
            };
            return Err(TextError::Stop { index: Some(index), message });
        }
        let stops = stops.into_iter().map(|stop| Automaton::new(stop.into_bytes())).collect();
        Ok(Self { stops, held: String::new(), stopped: None })
    }

    /// Takes the next piece of text. After a stop, further pieces are ignored.
    pub fn push(&mut self, piece: &str) -> StopOutcome {
        if self.stopped.is_some() {
            return StopOutcome { text: String::new(), stopped: self.stopped };
        }
        if self.stops.is_empty() {
            return StopOutcome { text: piece.to_owned(), stopped: None };
        }
        let before = self.held.len();
        self.held.push_str(piece);
        for (i, &byte) in piece.as_bytes().iter().enumerate() {
            let mut longest: Option<(usize, usize)> = None;
            for (index, stop) in self.stops.iter_mut().enumerate() {
                if stop.step(byte) && longest.is_none_or(|(len, _)| stop.len() > len) {
                    longest = Some((stop.len(), index));
                }
            }
            if let Some((len, index)) = longest {
                self.stopped = Some(index);
                self.held.truncate((before + i + 1).saturating_sub(len));
                return StopOutcome { text: std::mem::take(&mut self.held), stopped: self.stopped };
            }
        }
        // A state counts bytes from the first byte of a stop string, so the cut is at a character's start.
        let hold = self.stops.iter().map(|stop| stop.state).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len().saturating_sub(hold));
        StopOutcome { text: std::mem::replace(&mut self.held, rest), stopped: None }
    }

    /// Ends the text and returns what was held back; nothing when a stop string was found.
    pub fn finish(&mut self) -> String {
        for stop in &mut self.stops {
            stop.state = 0;
        }
        std::mem::take(&mut self.held)
    }

    /// Index of the stop string that ended the text, when one has.
    pub fn stopped(&self) -> Option<usize> {
        self.stopped
    }
}

/// Knuth-Morris-Pratt automaton of one non-empty pattern.
#[derive(Debug, Clone)]
struct Automaton {
    pattern: Vec<u8>,
    /// `failure[i]`: length of the longest proper border of `pattern[..=i]`.
    failure: Vec<usize>,
    /// Length of the longest suffix of the text read so far that is a proper prefix of the pattern.
    state: usize,
}

impl Automaton {
    fn new(pattern: Vec<u8>) -> Self {
        let mut failure = vec![0; pattern.len()];
        let mut border = 0;
        for (i, &byte) in pattern.iter().enumerate().skip(1) {
            border = extend(&pattern, &failure, border, byte);
            if let Some(slot) = failure.get_mut(i) {
                *slot = border;
            }
        }
        Self { pattern, failure, state: 0 }
    }

    fn len(&self) -> usize {
        self.pattern.len()
    }

    /// Reads one byte; true when the pattern ends here. The state is left short of a full match.
    fn step(&mut self, byte: u8) -> bool {
        self.state = extend(&self.pattern, &self.failure, self.state, byte);
        let complete = self.state == self.pattern.len();
        if complete {
            self.state = self.failure.last().copied().unwrap_or(0);
        }
        complete
    }
}

/// The longest border of `pattern[..state] + byte` that is again a prefix of `pattern`.
fn extend(pattern: &[u8], failure: &[usize], mut state: usize, byte: u8) -> usize {
    loop {
        if pattern.get(state) == Some(&byte) {
            return state + 1;
        }
        let Some(previous) = state.checked_sub(1) else { return 0 };
        state = failure.get(previous).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(stops.iter().map(ToString::to_string).collect()).unwrap()
    }

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = matcher(stops);
        let mut text = String::new();
        for piece in pieces {
            text += &matcher.push(piece).text;
        }
        text += &matcher.finish();
        (text, matcher.stopped())
    }

    /// Reads off the definition: the smallest end of any occurrence, then the longest stop string.
    fn naive(stops: &[String], text: &str) -> (String, Option<usize>) {
        for end in 0..=text.len() {
            let ending =
                stops.iter().enumerate().filter(|(_, s)| text.as_bytes()[..end].ends_with(s.as_bytes()));
            if let Some((index, stop)) = ending.max_by_key(|(i, s)| (s.len(), usize::MAX - i)) {
                return (text[..end - stop.len()].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn a_stop_across_pieces_leaks_nothing() {
        let mut m = matcher(&["<|im_end|>"]);
        assert_eq!(m.push("Hello <|im"), StopOutcome { text: "Hello ".into(), stopped: None });
        assert_eq!(m.push("_en"), StopOutcome { text: String::new(), stopped: None });
        assert_eq!(m.push("d|> tail"), StopOutcome { text: String::new(), stopped: Some(0) });
        assert_eq!(m.push("more"), StopOutcome { text: String::new(), stopped: Some(0) });
        assert_eq!(m.finish(), "");
    }

    #[test]
    fn a_false_start_is_released_as_soon_as_it_is_known() {
        let mut m = matcher(&["\n\nUser:"]);
        assert_eq!(m.push("a\n\nUs").text, "a");
        assert_eq!(m.push("a\n").text, "\n\nUsa");
        assert_eq!(m.finish(), "\n");
    }

    #[test]
    fn only_the_longest_possible_prefix_is_held_back() {
        let mut m = matcher(&["aab"]);
        assert_eq!(m.push("aaaa").text, "aa");
        assert_eq!(m.push("b"), StopOutcome { text: String::new(), stopped: Some(0) });
        // The text was "aaaab": "aa" stands before the stop.
    }

    #[test]
    fn characters_of_several_bytes_are_never_cut() {
        assert_eq!(
            run(&["。終"], &["東京は日本の首都です", "。", "終わり"]),
            ("東京は日本の首都です".into(), Some(0))
        );
        // Shares its first two bytes with the held character: the hold works on bytes, the cut is still at a start.
        assert_eq!(run(&["地面"], &["地", "図"]), ("地図".into(), None));
        assert_eq!(run(&["🦀🦀"], &["🦀", "x🦀", "🦀"]), ("🦀x".into(), Some(0)));
    }

    #[test]
    fn the_first_complete_stop_wins_and_the_longest_of_those_that_end_together() {
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]), ("xa".into(), Some(1)));
        assert_eq!(run(&["b", "ab", "b"], &["xa", "b"]), ("x".into(), Some(1)));
        assert_eq!(run(&["b", "b"], &["xb"]), ("x".into(), Some(0)));
    }

    #[test]
    fn no_stops_pass_everything_at_once() {
        let mut m = matcher(&[]);
        assert_eq!(m.push("abc").text, "abc");
        assert_eq!(m.finish(), "");
    }

    #[test]
    fn unusable_lists_are_refused_by_index() {
        let refuse = |stops: Vec<String>| StopMatcher::new(stops).unwrap_err().to_string();
        assert!(refuse(vec!["a".into(), String::new()]).starts_with("stop[1]: the stop string is empty"));
        assert!(refuse(vec!["x".repeat(1025)]).contains("1025 bytes, at most 1024"));
        assert!(refuse(vec!["x".into(); 17]).contains("17 stop strings given, at most 16"));
        StopMatcher::new(vec!["x".repeat(1024); 16]).unwrap();
    }

    /// Few distinct characters, of one to four bytes, so that borders and near misses are common.
    fn alphabet() -> impl Strategy<Value = String> {
        prop::sample::select(vec!["a", "b", "é", "è", "地", "🦀"]).prop_map(str::to_owned)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn any_split_equals_a_search_of_the_whole(
            stops in prop::collection::vec(prop::collection::vec(alphabet(), 1..5).prop_map(|s| s.concat()), 0..4),
            pieces in prop::collection::vec(prop::collection::vec(alphabet(), 0..5).prop_map(|s| s.concat()), 0..8),
        ) {
            let text = pieces.concat();
            let mut matcher = StopMatcher::new(stops.clone()).unwrap();
            let mut emitted = String::new();
            let mut read = 0;
            for piece in &pieces {
                read += piece.len();
                emitted += &matcher.push(piece).text;
                let so_far = naive(&stops, &text[..read]);
                // Nothing is emitted that a later stop could take back, and no more is held than one stop allows.
                prop_assert!(naive(&stops, &text).0.starts_with(&emitted));
                let expected_hold = (1..=so_far.0.len())
                    .rev()
                    .find(|&n| stops.iter().any(|s| n < s.len() && so_far.0.as_bytes().ends_with(&s.as_bytes()[..n])))
                    .unwrap_or(0);
                if so_far.1.is_none() {
                    prop_assert_eq!(so_far.0.len() - emitted.len(), expected_hold);
                }
            }
            emitted += &matcher.finish();
            prop_assert_eq!((emitted, matcher.stopped()), naive(&stops, &text));
        }
    }
}
