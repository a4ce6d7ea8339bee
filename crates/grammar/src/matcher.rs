use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use llguidance::TokenParser;

use crate::error::{GrammarError, reason};

/// Bytes of a lexer's state, and of a grammar beside its source and lexer: estimates, so that the bytes of a cache have a bound.
const STATE_BYTES: usize = 2 << 10;
const GRAMMAR_BYTES: usize = 64 << 10;

/// Bytes that a byte of source becomes.
const EXPANSION: usize = 16;

/// A compiled grammar. Cloning shares it.
#[derive(Clone)]
pub struct Grammar(Arc<Inner>);

struct Inner {
    /// As it was compiled.
    pristine: Mutex<TokenParser>,
    /// What texts begin from. They share its lexer, which learns states as they go on.
    shared: Mutex<TokenParser>,
    /// Set when the shared lexer is not to be used for another text.
    spent: Arc<AtomicBool>,
    /// What a text may begin with.
    first: Arc<[u32]>,
    source_bytes: usize,
    states: usize,
}

/// A state is whole after every statement, so a panic elsewhere does not spoil it.
fn lock(parser: &Mutex<TokenParser>) -> MutexGuard<'_, TokenParser> {
    parser.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Grammar {
    /// Takes a parser, and looks at its first mask.
    ///
    /// # Errors
    /// A grammar that no text follows, or whose first mask exceeds the budget.
    pub(crate) fn new(
        parser: TokenParser,
        rows: usize,
        source_bytes: usize,
        states: usize,
    ) -> Result<Self, GrammarError> {
        let pristine = parser.deep_clone();
        let mut matcher = Matcher {
            matcher: llguidance::Matcher::new(Ok(parser.clone())),
            mask: Vec::new(),
            words: rows.div_ceil(32),
            fresh: None,
            spent: Arc::default(),
        };
        let first = matcher.compute().map_err(GrammarError::Invalid)?.into();
        Ok(Self(Arc::new(Inner {
            pristine: Mutex::new(pristine),
            shared: Mutex::new(parser),
            spent: Arc::default(),
            first,
            source_bytes,
            states,
        })))
    }

    /// A matcher at the beginning of a text.
    pub fn matcher(&self) -> Matcher {
        let inner = &*self.0;
        let mut shared = lock(&inner.shared);
        // A lexer that is nearly full, or that a failure has left in an unknown state, would fail texts that did nothing
        // wrong: they get a new one.
        if inner.spent.swap(false, Ordering::AcqRel)
            || shared.parser.lexer_stats().num_states > inner.states / 2
        {
            *shared = lock(&inner.pristine).deep_clone();
        }
        Matcher {
            matcher: llguidance::Matcher::new(Ok(shared.clone())),
            mask: Vec::new(),
            words: inner.first.len(),
            fresh: Some(Arc::clone(&inner.first)),
            spent: Arc::clone(&inner.spent),
        }
    }

    /// Bytes that it takes, estimated.
    pub fn bytes(&self) -> usize {
        let states = if self.0.spent.load(Ordering::Acquire) {
            self.0.states
        } else {
            lock(&self.0.shared).parser.lexer_stats().num_states
        };
        GRAMMAR_BYTES + self.0.source_bytes * EXPANSION + states * STATE_BYTES + self.0.first.len() * 4
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").field("source_bytes", &self.0.source_bytes).finish_non_exhaustive()
    }
}

/// Follows one text through its grammar.
pub struct Matcher {
    matcher: llguidance::Matcher,
    mask: Vec<u32>,
    words: usize,
    /// The mask of a text that has not begun.
    fresh: Option<Arc<[u32]>>,
    spent: Arc<AtomicBool>,
}

impl Matcher {
    /// The ids that may come next: bit `id % 32` of word `id / 32`. The end tokens are among them exactly where the text may
    /// end.
    ///
    /// # Errors
    /// Nothing may follow, or the mask exceeds its budget.
    pub fn allowed(&mut self) -> Result<&[u32], String> {
        match &self.fresh {
            Some(mask) => {
                self.mask.clear();
                self.mask.extend_from_slice(mask);
                Ok(&self.mask)
            }
            None => self.compute(),
        }
    }

    fn compute(&mut self) -> Result<&[u32], String> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| self.failed(&e))?;
        self.mask.clear();
        self.mask.extend(mask.as_slice().iter().take(self.words));
        self.mask.resize(self.words, 0);
        Ok(&self.mask)
    }

    /// Takes the id that was drawn.
    ///
    /// # Errors
    /// The id may not follow.
    pub fn accept(&mut self, id: u32) -> Result<(), String> {
        self.fresh = None;
        self.matcher.consume_token(id).map_err(|e| self.failed(&e))
    }

    fn failed(&self, error: &impl fmt::Display) -> String {
        self.spent.store(true, Ordering::Release);
        reason(error)
    }
}
