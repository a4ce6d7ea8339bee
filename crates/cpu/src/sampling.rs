//! Drawing tokens from a slice of the vocabulary: the reference for every device's sampler.
//!
//! What is drawn is defined by [`SamplingRow`]; `tests/sampling.rs` has that definition as a sort and a sum in float64.

use std::borrow::Cow;

use longhaul_backend::{
    Candidate, Error, Largest, PARTS, Part, Result, SamplingRow, SliceMasses, SliceSummary, VocabularySlice,
    Window, order_place,
};

/// The mass of the largest weight: what is lost below it sums up to less than a draw can tell apart (2⁻²⁴), for any
/// vocabulary that [`Slice::new`] takes.
const UNIT: f64 = (1u64 << 42) as f64;

/// Masses of this many ids fit into 64 bits.
const MOST_IDS: usize = 1 << 22;

/// A rank's slice of the vocabulary, for [`sample_slices`](longhaul_backend::sample_slices).
pub(crate) struct Slice<'a> {
    rows: Vec<Row<'a>>,
}

struct Row<'a> {
    rules: &'a SamplingRow<'a>,
    first_id: u32,
    logits: &'a [f32],
    /// Logits after the rules.
    scores: Cow<'a, [f32]>,
    largest: Largest,
    /// One an id, of rows that draw.
    masses: Vec<u64>,
}

impl<'a> Slice<'a> {
    /// `logits` are those of the ids `first_id..first_id + width` out of `vocab`, row by row. Rows whose lists are not in
    /// order ([`SamplingRow::check`]) are refused before anything is asked of the slice.
    ///
    /// # Errors
    /// [`Error::Shape`] for a vocabulary beyond 2²² ids.
    pub(crate) fn new(
        logits: &'a [f32],
        first_id: usize,
        width: usize,
        vocab: usize,
        rows: &'a [SamplingRow<'a>],
    ) -> Result<Self> {
        if vocab > MOST_IDS || first_id + width > vocab || logits.len() != rows.len() * width {
            let detail = format!("{} logits for {} rows of {width} ids of {vocab}", logits.len(), rows.len());
            return Err(Error::shape("sample", detail));
        }
        let row = |(index, rules)| {
            let logits = &logits[index * width..][..width];
            let first_id = first_id as u32;
            let scores = scores(logits, first_id, rules);
            let largest = Largest { logit: 0.0, score: 0.0 };
            Row { rules, first_id, logits, scores, largest, masses: Vec::new() }
        };
        Ok(Self { rows: rows.iter().enumerate().map(row).collect() })
    }
}

/// Logits after penalties, bias, banned ids and mask. Only ids that must not be drawn are infinite.
fn scores<'a>(logits: &'a [f32], first_id: u32, row: &SamplingRow<'_>) -> Cow<'a, [f32]> {
    let mut scores = Cow::Borrowed(logits);
    let local = |id: u32| id.checked_sub(first_id).map(|id| id as usize).filter(|id| *id < logits.len());
    let mut change = |id: u32, f: &dyn Fn(f32) -> f32| {
        if let Some(id) = local(id) {
            let score = &mut scores.to_mut()[id];
            *score = f(*score);
        }
    };
    for seen in row.seen {
        // Hugging Face's rule: towards less likely, whatever the sign.
        let repeated = |s: f32| if s > 0.0 { s / row.repetition_penalty } else { s * row.repetition_penalty };
        change(seen.id, &|s| (repeated(s) - row.penalty(seen)).clamp(f32::MIN, f32::MAX));
    }
    for (id, bias) in row.bias {
        change(*id, &|s| (s + bias).clamp(f32::MIN, f32::MAX));
    }
    for &id in row.banned {
        change(id, &|_| f32::NEG_INFINITY);
    }
    if row.allowed.is_some() {
        for (id, score) in (first_id..).zip(scores.to_mut()) {
            if !row.allows(id) {
                *score = f32::NEG_INFINITY;
            }
        }
    }
    scores
}

/// `exp(exponent)` as a mass, for exponents up to 0.
fn mass(exponent: f32) -> u64 {
    // e⁻³⁰ is less than one unit.
    if exponent < -30.0 { 0 } else { (f64::from(exponent).exp() * UNIT) as u64 }
}

impl Row<'_> {
    fn summary(&self) -> SliceSummary {
        let mut summary = SliceSummary::default();
        let mut best = f32::NEG_INFINITY;
        for ((id, logit), score) in (self.first_id..).zip(self.logits).zip(&*self.scores) {
            summary.finite &= logit.is_finite();
            summary.largest = summary.largest.max(*logit);
            if *score > best || summary.best == u64::MAX {
                best = *score;
                // + 0: zeros of both signs are equal.
                (summary.best, summary.logit) = (order_place(score + 0.0, id), *logit);
            }
        }
        summary
    }

    fn candidate(&self, index: usize) -> Candidate {
        let id = self.first_id + index as u32;
        Candidate {
            place: order_place(self.scores[index], id),
            mass: self.masses[index],
            logit: self.logits[index],
        }
    }

    fn masses(&mut self, largest: Largest, wanted: usize) -> SliceMasses {
        self.largest = largest;
        let raw = self.logits.iter().map(|logit| mass(logit - largest.logit)).sum();
        if self.rules.temperature == 0.0 {
            return SliceMasses { raw, ..SliceMasses::default() };
        }
        let temperature = self.rules.temperature;
        self.masses = self.scores.iter().map(|score| mass((score - largest.score) / temperature)).collect();
        let total = self.masses.iter().sum();
        let least = (f64::from(self.rules.min_p) * UNIT) as u64;
        let above_min_p = self.masses.iter().filter(|mass| **mass >= least).sum();
        let mut indices: Vec<usize> = (0..self.masses.len()).filter(|&i| self.masses[i] > 0).collect();
        let complete = indices.len() <= wanted;
        let place = |&index: &usize| order_place(self.scores[index], index as u32);
        if !complete {
            indices.select_nth_unstable_by_key(wanted, place);
            indices.truncate(wanted);
        }
        indices.sort_unstable_by_key(place);
        let best: Vec<Candidate> = indices.into_iter().map(|index| self.candidate(index)).collect();
        let beyond = match best.last() {
            Some(last) if !complete => last.place + 1,
            _ => u64::MAX,
        };
        SliceMasses { raw, total, above_min_p, best, beyond }
    }

    /// Calls `f` with the index and place of every candidate in the window.
    fn each(&self, window: &Window, mut f: impl FnMut(usize, u64)) {
        for (index, score) in self.scores.iter().enumerate() {
            let place = order_place(*score, self.first_id + index as u32);
            if window.contains(place) {
                f(index, place);
            }
        }
    }
}

impl VocabularySlice for Slice<'_> {
    fn unit(&self) -> u64 {
        UNIT as u64
    }

    fn summaries(&mut self) -> Result<Vec<SliceSummary>> {
        Ok(self.rows.iter().map(Row::summary).collect())
    }

    fn masses(&mut self, largest: &[Largest], wanted: &[usize]) -> Result<Vec<SliceMasses>> {
        let asked = largest.iter().zip(wanted);
        Ok(self.rows.iter_mut().zip(asked).map(|(row, (l, n))| row.masses(*l, *n)).collect())
    }

    fn parts(&mut self, windows: &[Window]) -> Result<Vec<Vec<Part>>> {
        let parts = |window: &Window| {
            let row = &self.rows[window.row];
            let mut parts = vec![Part::default(); PARTS];
            row.each(window, |index, place| {
                let part = &mut parts[((place - window.first) >> window.shift()) as usize];
                part.count += 1;
                part.mass += row.masses[index];
            });
            parts
        };
        Ok(windows.iter().map(parts).collect())
    }

    fn members(&mut self, windows: &[Window]) -> Result<Vec<Vec<Candidate>>> {
        let members = |window: &Window| {
            let row = &self.rows[window.row];
            let mut members = Vec::new();
            row.each(window, |index, _| members.push(row.candidate(index)));
            members
        };
        Ok(windows.iter().map(members).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use longhaul_backend::{Draw, RowError, SeenToken, Single, sample_slices};

    /// Draws from a whole row.
    fn sample(logits: &[f32], row: &SamplingRow<'_>) -> Result<Draw> {
        let rows = std::slice::from_ref(row);
        let mut slice = Slice::new(logits, 0, logits.len(), logits.len(), rows)?;
        Ok(sample_slices(&Single, &mut slice, logits.len(), rows)?[0])
    }

    fn choose(logits: &[f32], row: &SamplingRow<'_>) -> u32 {
        sample(logits, row).unwrap().unwrap().id
    }

    fn row() -> SamplingRow<'static> {
        SamplingRow { temperature: 1.0, seed: 7, ..SamplingRow::default() }
    }

    fn frequencies(logits: &[f32], row: &SamplingRow) -> Vec<f64> {
        let draws = 20_000;
        let mut counts = vec![0usize; logits.len()];
        for position in 0..draws {
            let drawn = sample(logits, &SamplingRow { position, ..row.clone() }).unwrap().unwrap();
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
        let drawn = sample(&[1.0, 3.0, 3.0], &greedy).unwrap().unwrap();
        assert_eq!(drawn.id, 1);
        let z = (1f64.exp() + 2.0 * 3f64.exp()).ln();
        assert!((f64::from(drawn.logprob) - (3.0 - z)).abs() < 1e-6);
    }

    #[test]
    fn penalties_follow_the_published_rules() {
        let seen = [SeenToken { id: 0, generated: 2 }, SeenToken { id: 1, generated: 0 }];
        let greedy = SamplingRow { temperature: 0.0, seen: &seen, ..row() };
        // Divided when positive, multiplied when negative; prompt tokens count for repetition only.
        let repetition = SamplingRow { repetition_penalty: 2.0, ..greedy.clone() };
        assert_eq!(choose(&[3.0, 1.0, 1.6], &repetition), 2);
        assert_eq!(choose(&[-1.0, -0.4, -1.5], &repetition), 1);
        let presence = SamplingRow { presence_penalty: 1.0, ..greedy.clone() };
        assert_eq!(choose(&[3.0, 2.5, 2.4], &presence), 1);
        let frequency = SamplingRow { frequency_penalty: 0.4, ..greedy };
        assert_eq!(choose(&[3.0, 2.1, 2.15], &frequency), 0);
        assert_eq!(choose(&[3.0, 2.1, 2.25], &frequency), 2);
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
        assert_eq!(choose(&[3.0, 2.0], &SamplingRow { bias: &[(0, 0.6)], ..greedy.clone() }), 0);
        assert_eq!(choose(&[3.0, 2.0], &SamplingRow { bias: &[(0, 0.4)], ..greedy.clone() }), 1);
        assert_eq!(choose(&[3.0, 2.0], &SamplingRow { bias: &[(0, 50.0)], banned: &[0], ..greedy }), 1);
    }

    /// Scores saturate instead of turning into infinities, whose differences would not be numbers.
    #[test]
    fn scores_saturate() {
        let seen = [SeenToken { id: 0, generated: 1 }, SeenToken { id: 1, generated: 1 }];
        let huge =
            SamplingRow { seen: &seen, repetition_penalty: f32::MIN_POSITIVE, temperature: 0.0, ..row() };
        assert_eq!(choose(&[1e30, 3e30, 5.0], &huge), 0, "both saturate, the lower id is first");
        let bias = [(2, f32::MAX)];
        assert_eq!(choose(&[1.0, 2.0, f32::MAX], &SamplingRow { bias: &bias, ..row() }), 2);
    }

    #[test]
    fn a_row_without_allowed_tokens_is_an_error() {
        for temperature in [0.0, 1.0] {
            let masked = SamplingRow { temperature, allowed: Some(&[0]), ..row() };
            let banned = SamplingRow { temperature, banned: &[0, 1], ..row() };
            for row in [masked, banned] {
                assert_eq!(sample(&[1.0, 2.0], &row).unwrap(), Err(RowError::NothingAllowed));
            }
        }
        assert!(matches!(
            sample(&[1.0, 2.0], &SamplingRow { bias: &[(0, f32::INFINITY)], ..row() }),
            Err(Error::Sampling { row: 0, .. })
        ));
    }

    #[test]
    fn a_poisoned_row_is_an_error() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(sample(&[0.0, bad], &row()).unwrap(), Err(RowError::NotFinite));
        }
    }
}
