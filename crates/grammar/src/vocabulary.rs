//! A model's tokens as the library takes them.

use std::sync::Arc;

use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use longhaul_text::Tokenizer;

use crate::error::GrammarError;

/// Longest token that is drawn while a grammar is followed; longer ones would not fit the library's tree.
const MAX_TOKEN_BYTES: usize = 512;

/// Knows each token's bytes. Masks allow any way to cut a text into tokens: the model, which has learned its own, chooses.
struct Vocabulary {
    trie: TokTrie,
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, s: &[u8]) -> Vec<TokenId> {
        self.trie.greedy_tokenize(s)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// `rows` is the number of ids that the model has logits for; those beyond the tokenizer's are never allowed.
///
/// # Errors
/// A model whose texts do not end.
pub(crate) fn environment(
    tokenizer: &Tokenizer,
    rows: usize,
    end_tokens: &[u32],
) -> Result<TokEnv, GrammarError> {
    let ends: Vec<u32> = end_tokens.iter().copied().filter(|id| (*id as usize) < rows).collect();
    let Some(first) = ends.first() else {
        return Err(GrammarError::Vocabulary("it has no end-of-sequence token".into()));
    };
    let size =
        u32::try_from(rows).map_err(|_| GrammarError::Vocabulary("its vocabulary is too large".into()))?;
    let words: Vec<Vec<u8>> = (0..size)
        .map(|id| {
            let bytes = tokenizer.token_bytes(id);
            if bytes.is_empty() || bytes.len() > MAX_TOKEN_BYTES {
                Vec::new()
            } else if tokenizer.is_special(id) {
                // The library's mark: no text matches it, only a grammar that names the token.
                [&[TokTrie::SPECIAL_TOKEN_MARKER], &*bytes].concat()
            } else {
                bytes.into_owned()
            }
        })
        .collect();
    let trie = TokTrie::from(&TokRxInfo::new(size, *first), &words).with_eos_tokens(&ends);
    Ok(Arc::new(Vocabulary { trie }))
}
