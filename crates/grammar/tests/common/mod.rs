//! Texts by random walks through masks.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::path::Path;

use longhaul_grammar::{Compiler, GrammarError, Limits, Matcher, Source};
use longhaul_text::Tokenizer;

/// Rows of the made-up model beyond its tokenizer.
pub const PADDING: usize = 7;

pub fn tokenizer() -> Tokenizer {
    Tokenizer::from_file(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo/tokenizer.json"))
        .unwrap()
}

pub fn end_token(tokenizer: &Tokenizer) -> u32 {
    tokenizer.special_id("<|im_end|>").unwrap()
}

pub struct World {
    pub tokenizer: Tokenizer,
    pub compiler: Compiler,
    pub end: u32,
}

impl World {
    pub fn new(limits: Limits) -> Self {
        let tokenizer = tokenizer();
        let end = end_token(&tokenizer);
        let compiler = Compiler::new(&tokenizer, tokenizer.vocab_size() + PADDING, &[end], limits).unwrap();
        Self { tokenizer, compiler, end }
    }

    pub fn matcher(&self, source: &Source) -> Result<Matcher, GrammarError> {
        self.compiler.compile(source).map(|grammar| grammar.matcher())
    }

    /// The ids of a mask, which has none of those that are no tokens, nor a special one but the end.
    pub fn ids(&self, mask: &[u32]) -> Vec<u32> {
        assert_eq!(mask.len(), (self.tokenizer.vocab_size() + PADDING).div_ceil(32));
        let ids: Vec<u32> =
            (0..mask.len() as u32 * 32).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
        for id in &ids {
            assert!((*id as usize) < self.tokenizer.vocab_size(), "{id} is no token");
            assert!(*id == self.end || !self.tokenizer.is_special(*id), "{id} is special");
        }
        ids
    }

    /// Draws a text of at most `steps` tokens; `at_end` sees the text wherever it may end. From half of the steps on, the text
    /// is drawn to its end.
    pub fn walk(&self, source: &Source, seed: u64, steps: usize, mut at_end: impl FnMut(&str)) -> Walk {
        let mut matcher = self.matcher(source).unwrap_or_else(|e| panic!("{source:?}: {e}"));
        let mut random = Random::new(seed);
        let mut bytes = Vec::new();
        for step in 0..steps {
            let mask =
                matcher.allowed().unwrap_or_else(|e| panic!("{source:?} after {:?}: {e}", lossy(&bytes)));
            let mut ids = self.ids(mask);
            let ends = ids.contains(&self.end);
            if ends {
                at_end(std::str::from_utf8(&bytes).unwrap());
            }
            let hurry = step >= steps / 2;
            if ends && (hurry || ids.len() == 1 || random.below(4) == 0) {
                return Walk { text: lossy(&bytes), ended: true, tokens: step };
            }
            ids.retain(|id| *id != self.end);
            if hurry {
                let closes = |id: &u32| {
                    let token = self.tokenizer.token_bytes(*id);
                    token.first().is_some_and(|b| b"\"}])>0tfn.".contains(b))
                };
                let closing: Vec<u32> = ids.iter().copied().filter(closes).collect();
                if !closing.is_empty() && random.below(8) > 0 {
                    ids = closing;
                }
            }
            let id = ids[random.below(ids.len())];
            matcher.accept(id).unwrap_or_else(|e| panic!("{source:?} after {:?}: {e}", lossy(&bytes)));
            bytes.extend_from_slice(&self.tokenizer.token_bytes(id));
        }
        Walk { text: lossy(&bytes), ended: false, tokens: steps }
    }

    /// Whether a text, cut in the tokenizer's own way, follows a grammar to its end.
    pub fn accepts(&self, source: &Source, text: &str) -> bool {
        let mut matcher = self.matcher(source).unwrap_or_else(|e| panic!("{source:?}: {e}"));
        for id in self.tokenizer.encode(text, longhaul_text::SpecialTokens::AsText).unwrap() {
            if !self.ids(matcher.allowed().unwrap()).contains(&id) {
                return false;
            }
            matcher.accept(id).unwrap();
        }
        matcher.allowed().is_ok_and(|mask| self.ids(mask).contains(&self.end))
    }
}

pub struct Walk {
    pub text: String,
    pub ended: bool,
    pub tokens: usize,
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A generator of numbers that are the same on every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n
    }
}
