//! Compiles what requests ask of their answers, away from the reactor and from the step loop.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use longhaul_grammar::{Compiler, GrammarError, Limits};
use tokio::time::timeout;

use crate::error::{ApiError, ApiResult};
use crate::prompt::{TextPool, tokenizer};
use crate::request::Constraint;
use crate::serving::{self, ModelInfo, Serving};

/// Compiled grammars of the model that is served.
#[derive(Clone)]
pub(crate) struct Grammars(Arc<Inner>);

struct Inner {
    /// Its own bound: sources that take long keep each other waiting, and nobody's prompt.
    pool: TextPool,
    time: Duration,
    /// Built for the first request that needs it, over the whole vocabulary.
    compiler: OnceLock<Result<Compiler, GrammarError>>,
}

impl Grammars {
    pub(crate) fn new(at_once: usize, time: Duration) -> Self {
        Self(Arc::new(Inner { pool: TextPool::new(at_once), time, compiler: OnceLock::new() }))
    }

    /// # Errors
    /// A source that is no grammar, or that takes too long.
    pub(crate) async fn compile(
        &self,
        serving: &Arc<dyn Serving>,
        constraint: Option<Constraint>,
    ) -> ApiResult<Option<Arc<dyn serving::Grammar>>> {
        let Some(Constraint { field, source }) = constraint else { return Ok(None) };
        let (this, serving, name) = (self.clone(), Arc::clone(serving), field.clone());
        let work = move || {
            let compiler = this.compiler(serving.model())?;
            compiler.compile(&source).map_err(|error| match error {
                GrammarError::Vocabulary(_) => ApiError::internal(error.to_string()),
                other => ApiError::field(name, other),
            })
        };
        match timeout(self.0.time, self.0.pool.run(work)).await {
            Ok(grammar) => Ok(Some(Arc::new(Compiled(grammar?)))),
            // The work ends alone, in its place in the pool.
            Err(_) => {
                let seconds = self.0.time.as_secs_f64();
                Err(ApiError::field(
                    field,
                    format_args!("took more than {seconds} s to compile; simplify it"),
                ))
            }
        }
    }

    fn compiler(&self, model: &ModelInfo) -> ApiResult<&Compiler> {
        let tokenizer = tokenizer(model)?;
        let build = || Compiler::new(tokenizer, model.vocab_size, &model.end_tokens, Limits::default());
        self.0.compiler.get_or_init(build).as_ref().map_err(|error| ApiError::bad_request(error.to_string()))
    }
}

/// The seam's end of a grammar.
#[derive(Debug)]
struct Compiled(longhaul_grammar::Grammar);

impl serving::Grammar for Compiled {
    fn matcher(&self) -> Box<dyn serving::Matcher> {
        Box::new(Following(self.0.matcher()))
    }
}

struct Following(longhaul_grammar::Matcher);

impl serving::Matcher for Following {
    fn allowed(&mut self) -> Result<&[u32], String> {
        self.0.allowed()
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        self.0.accept(id)
    }
}
