//! What a needle run does: the grid, the texts, and the checks on both.

use longhaul_engine::LongContext;
use serde::{Deserialize, Serialize};

use super::plan::Fact;
use crate::{LongdocError, Result};

/// A needle-in-a-haystack run: every mode × length × depth × instance is one question to the model.
#[derive(Debug, Clone)]
pub struct NeedleConfig {
    /// Name of the checkpoint, for titles; results of another model are not mixed with this one's.
    pub model: String,
    /// Lengths of the whole prompt in tokens: template, haystack, needle and question, not the answer.
    pub lengths: Vec<usize>,
    /// Where the needle stands, in percent of the haystack's tokens: 0 = before it, 100 = after it.
    pub depths: Vec<f32>,
    /// Long-context modes to compare; each gets the same prompts.
    pub modes: Vec<LongContext>,
    /// Text to hide the needle in; repeated where a prompt needs more.
    pub haystack: String,
    /// Name of the haystack, for titles.
    pub haystack_name: String,
    /// The needle; `{city}` and `{code}` are replaced, differently in every cell.
    pub needle: String,
    /// The question, with the same places.
    pub question: String,
    /// Texts that the answer must contain, all of them, in any case; with the same places.
    pub expect: Vec<String>,
    /// Questions per mode, length and depth, each with its own stretch of the haystack, city and code.
    pub instances: usize,
    /// Decides stretches, cities and codes.
    pub seed: u64,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Ask every question a second time, of the same prompt without the needle.
    pub control: bool,
    /// Tokens of a prefill chunk; `None` = the engine's default.
    pub chunk: Option<usize>,
}

impl Default for NeedleConfig {
    /// Depths in steps of 10 %, one instance, a fact that no model can know. Model, lengths and haystack are empty and
    /// must be given.
    fn default() -> Self {
        Self {
            model: String::new(),
            lengths: Vec::new(),
            depths: (0..=10u8).map(|d| f32::from(d) * 10.0).collect(),
            modes: vec![LongContext::Dca],
            haystack: String::new(),
            haystack_name: "built-in".into(),
            needle: "The secret code of {city} is {code}.".into(),
            question: "What is the secret code of {city}?".into(),
            expect: vec!["{code}".into()],
            instances: 1,
            seed: 0,
            max_tokens: 32,
            control: false,
            chunk: None,
        }
    }
}

/// What decides the result of a cell, beside its place in the grid. Results are only added to a folder whose settings
/// are the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Version of the way prompts are built; changes when the same settings give other prompts.
    pub protocol: u32,
    /// Name of the checkpoint.
    pub model: String,
    /// Name of the haystack.
    pub haystack: String,
    /// Its size.
    pub haystack_bytes: usize,
    /// FNV-1a of its bytes, 64 bits, in hexadecimal.
    pub haystack_hash: String,
    /// Template of the needle.
    pub needle: String,
    /// Template of the question.
    pub question: String,
    /// Templates of what the answer must contain.
    pub expect: Vec<String>,
    /// Seed.
    pub seed: u64,
    /// Most tokens of an answer.
    pub max_tokens: usize,
}

/// The grid of a run, sorted, without duplicates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grid {
    /// Modes, in the order asked for.
    pub modes: Vec<LongContext>,
    /// Tokens of the prompt, ascending.
    pub lengths: Vec<usize>,
    /// Percent, ascending.
    pub depths: Vec<f32>,
    /// Questions per mode, length and depth.
    pub instances: usize,
    /// Whether every question was also asked without the needle.
    pub control: bool,
}

const PROTOCOL: u32 = 1;

impl NeedleConfig {
    /// The part of the configuration that results depend on.
    pub fn settings(&self) -> Settings {
        Settings {
            protocol: PROTOCOL,
            model: self.model.clone(),
            haystack: self.haystack_name.clone(),
            haystack_bytes: self.haystack.len(),
            haystack_hash: format!("{:016x}", fnv1a(self.haystack.as_bytes())),
            needle: self.needle.trim().to_owned(),
            question: self.question.trim().to_owned(),
            expect: self.expect.clone(),
            seed: self.seed,
            max_tokens: self.max_tokens,
        }
    }

    /// Checks the configuration and brings the grid into order.
    ///
    /// # Errors
    /// [`LongdocError::Setting`] naming the field.
    pub fn grid(&self) -> Result<Grid> {
        let setting = |field, message: String| Err(LongdocError::Setting { field, message });
        if self.modes.is_empty() {
            return setting("modes", "none given; expected dca, yarn or none".into());
        }
        if self.lengths.is_empty() || self.lengths.contains(&0) {
            return setting("lengths", "expected one or more lengths of at least 1 token".into());
        }
        if self.depths.is_empty() {
            return setting("depths", "none given; expected percentages such as 0,50,100".into());
        }
        if let Some(bad) = self.depths.iter().find(|d| !(0.0..=100.0).contains(*d)) {
            return setting("depths", format!("{bad} is not a percentage from 0 to 100"));
        }
        if self.instances == 0 {
            return setting("instances", "0 asked for; expected at least 1".into());
        }
        if self.max_tokens == 0 {
            return setting("max_tokens", "0 leaves no room for an answer; expected at least 1".into());
        }
        if self.haystack.trim().is_empty() {
            return setting("haystack", "the text is empty".into());
        }
        for (field, template) in [("needle", &self.needle), ("question", &self.question)]
            .into_iter()
            .chain(self.expect.iter().map(|e| ("expect", e)))
        {
            if template.trim().is_empty() {
                return setting(field, "the text is empty".into());
            }
            if let Some(unknown) = unknown_place(template) {
                return setting(field, format!("{{{unknown}}} is not known; expected {{city}} or {{code}}"));
            }
        }
        if self.expect.is_empty() {
            return setting("expect", "nothing to look for in the answer".into());
        }
        let fact = Fact::fill(self, "Oslo", "12345");
        if let Some(missing) = fact.expected.iter().find(|e| !contains(&fact.needle, e)) {
            return setting("expect", format!("\"{missing}\" is not in the needle \"{}\"", fact.needle));
        }
        if fact.expected.iter().all(|e| contains(&fact.question, e)) {
            let message = format!(
                "the question \"{}\" already says all of it, so every echo would count",
                fact.question
            );
            return setting("expect", message);
        }
        let mut modes = Vec::new();
        for &mode in &self.modes {
            if !modes.contains(&mode) {
                modes.push(mode);
            }
        }
        let mut lengths = self.lengths.clone();
        lengths.sort_unstable();
        lengths.dedup();
        let mut depths = self.depths.clone();
        depths.sort_unstable_by(f32::total_cmp);
        depths.dedup_by_key(|d| depth_key(*d));
        Ok(Grid { modes, lengths, depths, instances: self.instances, control: self.control })
    }
}

/// A depth in thousandths of a percent: depths that print alike are one.
pub(crate) fn depth_key(depth: f32) -> u32 {
    (depth * 1000.0).round() as u32
}

/// Whether `answer` contains `expected` in any case; a number must stand alone, not inside a longer one.
pub(crate) fn contains(answer: &str, expected: &str) -> bool {
    let (answer, expected) = (answer.to_lowercase(), expected.trim().to_lowercase());
    let digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
    let (first, last) = (digit(expected.chars().next()), digit(expected.chars().next_back()));
    answer.match_indices(&expected).any(|(at, found)| {
        let before = answer.get(..at).and_then(|t| t.chars().next_back());
        let after = answer.get(at + found.len()..).and_then(|t| t.chars().next());
        !(first && digit(before) || last && digit(after))
    })
}

/// The first `{name}` that is neither `{city}` nor `{code}`.
fn unknown_place(template: &str) -> Option<&str> {
    template.split('{').skip(1).filter_map(|part| part.split_once('}')).map(|(name, _)| name).find(|name| {
        !name.is_empty()
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && !matches!(*name, "city" | "code")
    })
}

/// FNV-1a, 64 bits: the same on every platform and in every version, which the standard hasher does not promise.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NeedleConfig {
        NeedleConfig { lengths: vec![100], haystack: "Text.".into(), ..NeedleConfig::default() }
    }

    fn refused(change: impl Fn(&mut NeedleConfig)) -> String {
        let mut config = config();
        change(&mut config);
        config.grid().unwrap_err().to_string()
    }

    #[test]
    fn sorts_and_deduplicates() {
        let config = NeedleConfig {
            lengths: vec![300, 100, 300],
            depths: vec![50.0, 0.0, 50.0],
            modes: vec![LongContext::None, LongContext::Dca, LongContext::None],
            ..config()
        };
        let grid = config.grid().unwrap();
        assert_eq!((grid.lengths, grid.depths), (vec![100, 300], vec![0.0, 50.0]));
        assert_eq!(grid.modes, [LongContext::None, LongContext::Dca]);
    }

    #[test]
    fn refuses_what_cannot_work() {
        assert!(refused(|c| c.lengths = vec![]).starts_with("lengths: "));
        assert!(refused(|c| c.depths = vec![f32::NAN]).contains("NaN is not a percentage"));
        assert!(refused(|c| c.depths = vec![101.0]).contains("101"));
        assert!(refused(|c| c.modes = vec![]).starts_with("modes: "));
        assert!(refused(|c| c.instances = 0).starts_with("instances: "));
        assert!(refused(|c| c.haystack = " \n".into()).starts_with("haystack: "));
        assert!(refused(|c| c.needle = "The {town} is {code}.".into()).contains("{town} is not known"));
        assert!(refused(|c| c.expect = vec!["Dolores Park".into()]).contains("is not in the needle"));
        assert!(refused(|c| c.expect = vec!["{city}".into()]).contains("already says all of it"));
    }

    #[test]
    fn numbers_stand_alone_in_answers() {
        assert!(contains("The code is 12345.", "12345"));
        assert!(!contains("The code is 123456.", "12345"));
        assert!(!contains("The code is 012345.", "12345"));
        assert!(contains("99123 45 then 12345", "12345"));
        assert!(contains("sit in DOLORES park.", "Dolores Park"));
        assert!(contains("Übung ÄÖ", "äö"));
    }
}
