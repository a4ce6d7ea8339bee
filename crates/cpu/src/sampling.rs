//! Drawing tokens: the reference for every device's sampler.

use longhaul_backend::{Error, Result, Sampled, SamplingRow, uniform};

/// Draws one token from a row of logits.
pub(crate) fn sample(logits: &[f32], row: &SamplingRow<'_>, index: usize) -> Result<Sampled> {
    if logits.iter().any(|l| !l.is_finite()) {
        return Err(Error::NotFinite { row: index });
    }
    row.check(logits.len(), index)?;
    let id = choose(logits, row).ok_or(Error::NothingAllowed { row: index })?;
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    let logit = logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
    Ok(Sampled { id, logprob: (f64::from(logit - max) - sum.ln()) as f32 })
}

/// The token that the rules of `row` draw; `None` when they allow none.
fn choose(logits: &[f32], row: &SamplingRow<'_>) -> Option<u32> {
    let scores = scores(logits, row);
    let best = argmax(&scores);
    if scores.get(best as usize).is_none_or(|score| *score == f32::NEG_INFINITY) {
        return None;
    }
    Some(if row.temperature == 0.0 { best } else { draw(&scores, row) })
}

/// Logits after penalties, bias, banned ids and mask. Only ids that must not be drawn are infinite.
fn scores(logits: &[f32], row: &SamplingRow<'_>) -> Vec<f32> {
    let mut scores = logits.to_vec();
    for seen in row.seen {
        let Some(score) = scores.get_mut(seen.id as usize) else { continue };
        // Hugging Face's rule: towards less likely, whatever the sign.
        *score = if *score > 0.0 { *score / row.repetition_penalty } else { *score * row.repetition_penalty };
        *score = (*score - row.penalty(seen)).clamp(f32::MIN, f32::MAX);
    }
    for (id, bias) in row.bias {
        if let Some(score) = scores.get_mut(*id as usize) {
            *score = (*score + bias).clamp(f32::MIN, f32::MAX);
        }
    }
    for &id in row.banned {
        if let Some(score) = scores.get_mut(id as usize) {
            *score = f32::NEG_INFINITY;
        }
    }
    if row.allowed.is_some() {
        for (id, score) in scores.iter_mut().enumerate() {
            if !row.allows(id as u32) {
                *score = f32::NEG_INFINITY;
            }
        }
    }
    scores
}

/// The largest score; the lowest id on a tie.
fn argmax(scores: &[f32]) -> u32 {
    let mut best = 0;
    for (id, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = id;
        }
    }
    best as u32
}

fn draw(scores: &[f32], row: &SamplingRow<'_>) -> u32 {
    // Candidates from likely to unlikely; the lower id first among equals.
    let order = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
    let mut candidates: Vec<u32> = (0..scores.len() as u32).collect();
    let k = if row.top_k == 0 { candidates.len() } else { (row.top_k as usize).min(candidates.len()) };
    if k < candidates.len() {
        candidates.select_nth_unstable_by(k, order);
        candidates.truncate(k);
    }
    candidates.sort_unstable_by(order);
    let Some(&first) = candidates.first() else { return 0 };
    let top = scores[first as usize];
    let weight = |id: &u32| f64::from((scores[*id as usize] - top) / row.temperature).exp();
    let weights: Vec<f64> = candidates.iter().map(weight).collect();

    // top-p: the smallest prefix that reaches the mass, at least one token.
    let mut kept = candidates.len();
    if row.top_p < 1.0 {
        let wanted = f64::from(row.top_p) * weights.iter().sum::<f64>();
        let mut mass = 0.0;
        for (n, w) in weights.iter().enumerate() {
            mass += w;
            if mass >= wanted {
                kept = n + 1;
                break;
            }
        }
    }
    // min-p: relative to the most likely token, whose weight is 1.
    if row.min_p > 0.0 {
        kept = kept.min(weights.iter().take_while(|w| **w >= f64::from(row.min_p)).count()).max(1);
    }
    let weights = &weights[..kept];
    let mut left = f64::from(uniform(row.seed, row.position)) * weights.iter().sum::<f64>();
    for (id, w) in candidates.iter().zip(weights) {
        if left < *w {
            return *id;
        }
        left -= w;
    }
    candidates[kept - 1]
}

#[cfg(test)]
mod tests {
    use super::*;
    use longhaul_backend::SeenToken;

    fn row() -> SamplingRow<'static> {
        SamplingRow { temperature: 1.0, seed: 7, ..SamplingRow::default() }
    }

    fn frequencies(logits: &[f32], row: &SamplingRow) -> Vec<f64> {
        let draws = 20_000;
        let mut counts = vec![0usize; logits.len()];
        for position in 0..draws {
            let drawn = sample(logits, &SamplingRow { position, ..row.clone() }, 0).unwrap();
            counts[drawn.id as usize] += 1;
        }
        counts.into_iter().map(|c| c as f64 / draws as f64).collect()
    }

    fn close(frequencies: &[f64], expected: &[f64]) {
        for (f, e) in frequencies.iter().zip(expected) {
            // Five standard deviations of 20,000 draws.
            assert!(
                (f - e).abs() <= 5.0 * (e * (1.0 - e) / 20_000.0).sqrt() + 1e-12,
                "{frequencies:?} {expected:?}"
            );
        }
    }

    #[test]
    fn draws_follow_the_softmax() {
        let p = [0.5f64, 0.3, 0.15, 0.05];
        let logits: Vec<f32> = p.iter().map(|p| p.ln() as f32).collect();
        close(&frequencies(&logits, &row()), &p);
        let squared: Vec<f64> = p.iter().map(|p| p * p / 0.365).collect();
        close(&frequencies(&logits, &SamplingRow { temperature: 0.5, ..row() }), &squared);
        close(&frequencies(&logits, &SamplingRow { top_k: 2, ..row() }), &[0.625, 0.375, 0.0, 0.0]);
        close(&frequencies(&logits, &SamplingRow { top_p: 0.79, ..row() }), &[0.625, 0.375, 0.0, 0.0]);
        close(&frequencies(&logits, &SamplingRow { top_p: 1e-6, ..row() }), &[1.0, 0.0, 0.0, 0.0]);
        let kept = 0.95;
        let min_p = SamplingRow { min_p: 0.2, ..row() };
        close(&frequencies(&logits, &min_p), &[0.5 / kept, 0.3 / kept, 0.15 / kept, 0.0]);
        close(&frequencies(&logits, &SamplingRow { banned: &[0], ..row() }), &[0.0, 0.6, 0.3, 0.1]);
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_the_largest() {
        let greedy = SamplingRow { temperature: 0.0, ..row() };
        let drawn = sample(&[1.0, 3.0, 3.0], &greedy, 0).unwrap();
        assert_eq!(drawn.id, 1);
        let z = (1f64.exp() + 2.0 * 3f64.exp()).ln();
        assert!((f64::from(drawn.logprob) - (3.0 - z)).abs() < 1e-6);
    }

    #[test]
    fn penalties_follow_the_published_rules() {
        let seen = [SeenToken { id: 0, generated: 2 }, SeenToken { id: 1, generated: 0 }];
        let greedy = SamplingRow { temperature: 0.0, seen: &seen, ..row() };
        let pick = |logits: &[f32], row: &SamplingRow<'_>| choose(logits, row).unwrap();
        // Divided when positive, multiplied when negative; prompt tokens count for repetition only.
        let repetition = SamplingRow { repetition_penalty: 2.0, ..greedy.clone() };
        assert_eq!(pick(&[3.0, 1.0, 1.6], &repetition), 2);
        assert_eq!(pick(&[-1.0, -0.4, -1.5], &repetition), 1);
        let presence = SamplingRow { presence_penalty: 1.0, ..greedy.clone() };
        assert_eq!(pick(&[3.0, 2.5, 2.4], &presence), 1);
        let frequency = SamplingRow { frequency_penalty: 0.4, ..greedy };
        assert_eq!(pick(&[3.0, 2.1, 2.15], &frequency), 0);
        assert_eq!(pick(&[3.0, 2.1, 2.25], &frequency), 2);
    }

    #[test]
    fn bias_and_mask_follow_the_penalties() {
        let p = [0.5f64, 0.3, 0.15, 0.05];
        let logits: Vec<f32> = p.iter().map(|p| p.ln() as f32).collect();
        // A bias of ln 2 doubles a weight; ids beyond the vocabulary are ignored.
        let bias = [(2, 2f32.ln()), (77, 50.0)];
        let expected = [0.5, 0.3, 0.3, 0.05].map(|w| w / 1.15);
        close(&frequencies(&logits, &SamplingRow { bias: &bias, ..row() }), &expected);
        close(
            &frequencies(&logits, &SamplingRow { allowed: Some(&[0b1010]), ..row() }),
            &[0.0, 6.0 / 7.0, 0.0, 1.0 / 7.0],
        );
        // The bias is added to the penalised logit and does not bring a banned token back.
        let seen = [SeenToken { id: 0, generated: 0 }];
        let greedy = SamplingRow { temperature: 0.0, seen: &seen, repetition_penalty: 2.0, ..row() };
        assert_eq!(choose(&[3.0, 2.0], &SamplingRow { bias: &[(0, 0.6)], ..greedy.clone() }), Some(0));
        assert_eq!(choose(&[3.0, 2.0], &SamplingRow { bias: &[(0, 0.4)], ..greedy.clone() }), Some(1));
        assert_eq!(choose(&[3.0, 2.0], &SamplingRow { bias: &[(0, 50.0)], banned: &[0], ..greedy }), Some(1));
    }

    /// Scores saturate instead of turning into infinities, whose differences would not be numbers.
    #[test]
    fn scores_saturate() {
        let seen = [SeenToken { id: 0, generated: 1 }, SeenToken { id: 1, generated: 1 }];
        let huge =
            SamplingRow { seen: &seen, repetition_penalty: f32::MIN_POSITIVE, temperature: 0.0, ..row() };
        assert_eq!(choose(&[1e30, 3e30, 5.0], &huge), Some(0), "both saturate, the lower id is first");
        let bias = [(2, f32::MAX)];
        assert_eq!(choose(&[1.0, 2.0, f32::MAX], &SamplingRow { bias: &bias, ..row() }), Some(2));
    }

    #[test]
    fn a_row_without_allowed_tokens_is_an_error() {
        for temperature in [0.0, 1.0] {
            let masked = SamplingRow { temperature, allowed: Some(&[0]), ..row() };
            let banned = SamplingRow { temperature, banned: &[0, 1], ..row() };
            for row in [masked, banned] {
                assert!(matches!(sample(&[1.0, 2.0], &row, 4), Err(Error::NothingAllowed { row: 4 })));
            }
        }
        assert!(matches!(
            sample(&[1.0, 2.0], &SamplingRow { bias: &[(0, f32::INFINITY)], ..row() }, 1),
            Err(Error::Sampling { row: 1, .. })
        ));
    }

    #[test]
    fn a_poisoned_row_is_an_error() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = sample(&[0.0, bad], &row(), 3).unwrap_err();
            assert!(matches!(error, Error::NotFinite { row: 3 }));
        }
    }
}
