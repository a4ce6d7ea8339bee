//! What the prefix cache gives back has the same bits as what is computed.

use longhaul_engine::{Engine, Generate, Loader, LongContext, ModelRef};
use longhaul_server::{BatchOptions, Event, Serving, Submission};

use crate::harness::{endless, next, start};

/// The logits of the first drawn tokens, as bits of the 20 greatest log probabilities, and the cached tokens.
async fn bits(batched: &longhaul_server::Batched, prompt: &[u32]) -> (usize, Vec<Vec<(u32, u32)>>) {
    let submission = Submission { max_tokens: 4, logprobs: Some(20), ..endless(prompt, |_| {}) };
    let mut stream = batched.submit(submission).unwrap();
    let (mut cached, mut rows) = (0, Vec::new());
    while let Some(event) = next(&mut stream).await {
        match event {
            Event::Started { cached_tokens } => cached = cached_tokens,
            Event::Token { token, .. } => {
                let top = token.top.iter().map(|(id, logprob)| (*id, logprob.to_bits()));
                rows.push(top.chain([(token.id, token.logprob.to_bits())]).collect());
            }
            Event::Failed(failure) => panic!("{failure}"),
            Event::Prompt(_) | Event::Finished { .. } => {}
        }
    }
    (cached, rows)
}

#[tokio::test]
async fn a_cached_prefix_of_three_chunks_gives_the_same_bits_under_dual_chunk_attention() {
    let load = || -> Engine {
        Loader { max_model_len: Some(4096), ..Loader::new(ModelRef::Demo) }.load(&mut |_, _| {}).unwrap()
    };
    let engine = load();
    assert_eq!(engine.long_context(), LongContext::Dca);
    // Three whole chunks and a part of the fourth: keys of the same, the previous and earlier chunks.
    let prefix: Vec<u32> =
        (0..3 * engine.trained_window() as u32 + 100).map(|i| (i * 131 + i / 7) % 500).collect();
    let block_size = engine.block_size();
    let cached = start(engine, BatchOptions::default());
    let uncached = start(load(), BatchOptions { no_prefix_cache: true, ..BatchOptions::default() });

    let warm = bits(&cached, &prefix).await;
    assert_eq!(warm.0, 0);
    for question in [&[7, 8, 9][..], &[400; 37], &[3]] {
        let prompt = [&prefix, question].concat();
        let (hits, rows) = bits(&cached, &prompt).await;
        assert_eq!(hits, prefix.len() / block_size * block_size, "all whole blocks of the prefix");
        let (none, computed) = bits(&uncached, &prompt).await;
        assert_eq!((none, rows.len()), (0, 4));
        assert_eq!(rows, computed);
    }
    // The whole prompt again: all but the block of its last token.
    let (hits, rows) = bits(&cached, &prefix).await;
    assert_eq!(hits, (prefix.len() - 1) / block_size * block_size);
    assert_eq!(rows, warm.1);
}
