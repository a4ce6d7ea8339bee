use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use llguidance::{ParserFactory, toktrie::InferenceCapabilities};
use longhaul_text::Tokenizer;

use crate::cache::{Cache, CacheStats};
use crate::error::GrammarError;
use crate::limits::Limits;
use crate::matcher::Grammar;
use crate::source::Source;
use crate::vocabulary;

/// Stack of a compilation. The library recurses over rules and schemas, whose number is bounded by [`Limits`]; this is more
/// than it needs for as many as may be. Only what is used of it takes memory.
const STACK_BYTES: usize = 256 << 20;

/// Compiles grammars for one model.
pub struct Compiler {
    factory: ParserFactory,
    rows: usize,
    limits: Limits,
    cache: Cache,
}

impl Compiler {
    /// `rows` is the number of ids that the model has logits for; `end_tokens` are those that end a text.
    ///
    /// # Errors
    /// A model whose texts do not end.
    pub fn new(
        tokenizer: &Tokenizer,
        rows: usize,
        end_tokens: &[u32],
        limits: Limits,
    ) -> Result<Self, GrammarError> {
        let build = || {
            let environment = vocabulary::environment(tokenizer, rows, end_tokens)?;
            let slices = llguidance::earley::SlicedBiasComputer::general_slices();
            ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
                .map_err(|e| GrammarError::Vocabulary(crate::error::reason(&e)))
        };
        let gave_up =
            |_| Err(GrammarError::Vocabulary("the grammar library gave up on its vocabulary".into()));
        let mut factory = catch_unwind(AssertUnwindSafe(build)).unwrap_or_else(gave_up)?;
        factory.quiet();
        *factory.limits_mut() = limits.parser();
        Ok(Self { factory, rows, limits, cache: Cache::new(&limits) })
    }

    /// Compiles a source, or finds it compiled. Blocks for as long as it takes.
    ///
    /// # Errors
    /// [`GrammarError`]: a source outside of the limits, or one that is no grammar.
    pub fn compile(&self, source: &Source) -> Result<Grammar, GrammarError> {
        let grammar = source.grammar(&self.limits)?;
        let key = source.digest();
        if let Some(found) = self.cache.get(&key) {
            return Ok(found);
        }
        let compile = || {
            let parser = self.factory.create_parser(grammar).map_err(|e| GrammarError::library(&e))?;
            Grammar::new(parser, self.rows, source.bytes(), self.limits.lexer_states)
        };
        let gave_up = || GrammarError::invalid("the grammar library gave up on it; simplify it");
        let compiled = thread::scope(|scope| {
            let thread = thread::Builder::new()
                .name("longhaul-grammar".into())
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, || {
                    catch_unwind(AssertUnwindSafe(compile)).unwrap_or_else(|_| Err(gave_up()))
                })
                .map_err(|e| GrammarError::Vocabulary(format!("no thread to compile on: {e}")))?;
            thread.join().unwrap_or_else(|_| Err(gave_up()))
        })?;
        self.cache.insert(key, compiled.clone());
        Ok(compiled)
    }

    /// What the cache has done and holds.
    pub fn cache(&self) -> CacheStats {
        self.cache.stats()
    }
}
