//! Drawing tokens from logits that lie in slices, one a rank: only small messages travel.
//!
//! The candidates of a row are ordered from likely to unlikely, the lower id first among equals; a *place* is a number that
//! grows along this order. Weights are integers (*masses*), so their sums depend neither on an order nor on the slices.
//! Top-k, top-p, min-p and the draw are then one question, asked up to three times: which is the first candidate at which
//! the running count, or mass, reaches a target? [`sample_slices`] answers it in exchanges between the ranks:
//!
//! 1. the largest logit and the best candidate of every slice. From now on all ranks know what weights are relative to;
//! 2. the masses of every slice, and its best candidates. Merged, these are the order up to the first place behind which
//!    some rank has kept something back; most questions end within;
//! 3. where one does not: counts and masses of 256 equal parts of the places beyond, again of the part that holds the
//!    answer, and so on, until so few are left that they are sent themselves.
//!
//! All ranks hear the same and conclude the same, so a row draws the same token over any number of ranks.

mod search;
mod wire;

use crate::{Collective, Draw as RowDraw, Result, RowError, Sampled, SamplingRow};
use search::{Draw, Search};
use wire::{
    CANDIDATE_WORDS, RowMasses, Words, exchange_masses, exchange_summaries, gather, push_candidate,
    push_wide, readers,
};

const OP: &str = "sample";

/// Parts of a [`Window`].
pub const PARTS: usize = 256;

/// Most candidates that a slice is asked for by [`VocabularySlice::masses`], for a row.
pub const MOST_CANDIDATES: usize = 256;

/// Most candidates of a window that [`VocabularySlice::members`] is asked for: so many of all slices together are sent
/// instead of counted.
pub const MOST_MEMBERS: usize = 512;

/// Weights beyond this distance from the largest, in units of the temperature, are looked at only if the answer is not
/// nearer. A choice of speed, never of the result.
const NEAR: f32 = 12.0;

/// Candidates asked of a slice where top-k does not say how many may matter.
const CANDIDATES: usize = 64;

/// Key of a score, ascending where scores descend (`total_cmp`).
pub fn order_key(score: f32) -> u32 {
    let bits = score.to_bits();
    !(if bits >> 31 == 1 { !bits } else { bits | 1 << 31 })
}

/// The score of an [`order_key`].
pub fn score_of_key(key: u32) -> f32 {
    let bits = !key;
    f32::from_bits(if bits >> 31 == 1 { bits & !(1 << 31) } else { !bits })
}

/// Place of a candidate in the order from likely to unlikely.
pub fn order_place(score: f32, id: u32) -> u64 {
    u64::from(order_key(score)) << 32 | u64::from(id)
}

/// What a slice of a row says before anything is known of the others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SliceSummary {
    /// Whether all logits are finite.
    pub finite: bool,
    /// The largest logit; −∞ in an empty slice.
    pub largest: f32,
    /// Place of the largest score after the rules, zeros of both signs being equal; `u64::MAX` in an empty slice.
    pub best: u64,
    /// The logit of that candidate.
    pub logit: f32,
}

impl Default for SliceSummary {
    /// An empty slice.
    fn default() -> Self {
        Self { finite: true, largest: f32::NEG_INFINITY, best: u64::MAX, logit: 0.0 }
    }
}

/// What the weights of a row are relative to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Largest {
    /// The largest logit of all slices.
    pub logit: f32,
    /// The largest score after the rules.
    pub score: f32,
}

/// One id that may be drawn.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Candidate {
    /// [`order_place`] of score and id.
    pub place: u64,
    /// `exp((score − largest) / temperature)` in units of [`VocabularySlice::unit`].
    pub mass: u64,
    /// The logit before the rules.
    pub logit: f32,
}

/// The masses of a slice of a row.
#[derive(Debug, Clone, PartialEq)]
pub struct SliceMasses {
    /// Sum of `exp(logit − largest)` over the logits before the rules and without temperature, in the same units.
    pub raw: u64,
    /// Sum of the masses; of rows that draw only, like what follows.
    pub total: u64,
    /// Sum of the masses whose weight is at least min-p.
    pub above_min_p: u64,
    /// The best candidates in order, not more than asked for; fewer will do, at the cost of more exchanges.
    pub best: Vec<Candidate>,
    /// The first place from which on candidates that have a mass are left out; `u64::MAX` if none is.
    pub beyond: u64,
}

impl Default for SliceMasses {
    /// An empty slice.
    fn default() -> Self {
        Self { raw: 0, total: 0, above_min_p: 0, best: Vec::new(), beyond: u64::MAX }
    }
}

/// Places `first..=last` of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Index of the row.
    pub row: usize,
    /// The first place.
    pub first: u64,
    /// The last place.
    pub last: u64,
}

impl Window {
    /// A place in the window belongs to part `(place - first) >> shift`, one of [`PARTS`].
    pub fn shift(&self) -> u32 {
        let bits = 64 - (self.last - self.first).leading_zeros();
        bits.saturating_sub(PARTS.ilog2())
    }

    /// Whether `place` lies in the window.
    pub fn contains(&self, place: u64) -> bool {
        (self.first..=self.last).contains(&place)
    }

    /// Part `index` as a window; its last place is that of this window where there are fewer parts.
    pub fn part(&self, index: usize) -> Window {
        let first = self.first.saturating_add((index as u64) << self.shift());
        let last = first.saturating_add((1 << self.shift()) - 1).min(self.last);
        Window { row: self.row, first, last }
    }

    /// The places of likely candidates, from the largest score on.
    pub fn near(row: usize, largest: f32, temperature: f32) -> Window {
        let least = largest - (NEAR * temperature).max(1.0);
        Window { row, first: order_place(largest, 0), last: order_place(least, u32::MAX) }
    }
}

/// Candidates of a slice in one part of a [`Window`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Part {
    /// How many.
    pub count: u32,
    /// Sum of their masses.
    pub mass: u64,
}

/// One rank's slice of the vocabulary for a batch of rows, as [`sample_slices`] asks about it. Ids are those of the whole
/// vocabulary.
pub trait VocabularySlice {
    /// The mass of the largest weight. All masses of a row together must fit into 64 bits.
    fn unit(&self) -> u64;

    /// One a row.
    ///
    /// # Errors
    /// The device's.
    fn summaries(&mut self) -> Result<Vec<SliceSummary>>;

    /// Masses relative to `largest`, and up to `wanted` candidates: one entry a row each. All later calls keep to `largest`.
    ///
    /// # Errors
    /// The device's.
    fn masses(&mut self, largest: &[Largest], wanted: &[usize]) -> Result<Vec<SliceMasses>>;

    /// The [`PARTS`] parts of each window.
    ///
    /// # Errors
    /// The device's.
    fn parts(&mut self, windows: &[Window]) -> Result<Vec<Vec<Part>>>;

    /// The candidates in each window, in any order; there are at most [`MOST_MEMBERS`]. No row has two windows in one call.
    ///
    /// # Errors
    /// The device's.
    fn members(&mut self, windows: &[Window]) -> Result<Vec<Vec<Candidate>>>;
}

/// Draws one token a row from a vocabulary of `vocab` ids of which every rank of `group` has a slice. All ranks call it
/// with equal rows and get equal tokens.
///
/// # Errors
/// As [`crate::Backend::sample`], on all ranks alike; those of `slice` and `group`.
pub fn sample_slices(
    group: &dyn Collective,
    slice: &mut dyn VocabularySlice,
    vocab: usize,
    rows: &[SamplingRow<'_>],
) -> Result<Vec<RowDraw>> {
    for (index, row) in rows.iter().enumerate() {
        row.check(vocab, index)?;
    }
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let summaries = exchange_summaries(group, slice.summaries()?, rows.len())?;
    let failures: Vec<Option<RowError>> = summaries
        .iter()
        .map(|summary| match summary {
            summary if !summary.finite => Some(RowError::NotFinite),
            summary if score(summary.best) == f32::NEG_INFINITY => Some(RowError::NothingAllowed),
            _ => None,
        })
        .collect();
    // Beside infinity, all weights of a row that has failed are nothing.
    let largest = summaries.iter().zip(&failures).map(|(summary, failure)| match failure {
        Some(_) => Largest { logit: f32::INFINITY, score: f32::INFINITY },
        None => Largest { logit: summary.largest, score: score(summary.best) },
    });
    let largest: Vec<Largest> = largest.collect();
    let wanted = rows.iter().zip(&failures).map(|(row, failure)| match failure {
        Some(_) => 0,
        None => wanted(row, vocab),
    });
    let wanted: Vec<usize> = wanted.collect();
    let masses = exchange_masses(group, slice.masses(&largest, &wanted)?, &wanted)?;

    let mut draws: Vec<Draw<'_>> = Vec::new();
    let mut chosen: Vec<Candidate> = Vec::with_capacity(rows.len());
    for (index, ((row, masses), summary)) in rows.iter().zip(&masses).zip(&summaries).enumerate() {
        chosen.push(Candidate { place: summary.best, mass: 0, logit: summary.logit });
        if row.temperature > 0.0 && failures.get(index) == Some(&None) {
            draws.push(Draw::new(index, row, vocab, score(summary.best), slice.unit(), masses));
        }
    }
    loop {
        let mut open = Vec::with_capacity(draws.len());
        for mut draw in draws {
            match draw.advance() {
                Some(candidate) => {
                    if let Some(chosen) = chosen.get_mut(draw.index) {
                        *chosen = candidate;
                    }
                }
                None => open.push(draw),
            }
        }
        draws = open;
        if draws.is_empty() {
            break;
        }
        narrow(group, slice, &mut draws)?;
    }
    let unit = slice.unit() as f64;
    let logprob = |(candidate, (masses, largest)): (Candidate, (&RowMasses, &Largest))| Sampled {
        id: candidate.place as u32,
        logprob: (f64::from(candidate.logit - largest.logit) - (masses.raw as f64 / unit).ln()) as f32,
    };
    let sampled = chosen.into_iter().zip(masses.iter().zip(&largest)).map(logprob);
    Ok(sampled.zip(failures).map(|(sampled, failed)| failed.map_or(Ok(sampled), Err)).collect())
}

fn score(place: u64) -> f32 {
    score_of_key((place >> 32) as u32)
}

/// Candidates asked of a slice: under top-k, no more can matter.
fn wanted(row: &SamplingRow<'_>, vocab: usize) -> usize {
    let wanted = match row.top_k as usize {
        _ if row.temperature == 0.0 => 0,
        k @ 1..=MOST_CANDIDATES => k,
        _ => CANDIDATES,
    };
    wanted.min(vocab)
}

/// One exchange for all open searches.
fn narrow(group: &dyn Collective, slice: &mut dyn VocabularySlice, draws: &mut [Draw<'_>]) -> Result<()> {
    const PART_WORDS: usize = 3;
    let searches: Vec<&mut Search> = draws.iter_mut().filter_map(|draw| draw.search.as_mut()).collect();
    let windows = |members: bool| -> Vec<Window> {
        searches.iter().filter(|s| s.members.is_some() == members).map(|s| s.window).collect()
    };
    let (counted, listed) = (windows(false), windows(true));
    let parts = if counted.is_empty() { Vec::new() } else { slice.parts(&counted)? };
    let members = if listed.is_empty() { Vec::new() } else { slice.members(&listed)? };
    let (mut parts, mut members) = (parts.into_iter(), members.into_iter());
    let mut message = Vec::new();
    let mut counts = vec![0; group.world_size()];
    for search in &searches {
        match &search.members {
            None => {
                let mut parts = parts.next().unwrap_or_default();
                parts.resize(PARTS, Part::default());
                for part in parts {
                    message.push(part.count as i32);
                    push_wide(&mut message, part.mass);
                }
                counts.iter_mut().for_each(|words| *words += PARTS * PART_WORDS);
            }
            Some(of_ranks) => {
                let members = members.next().unwrap_or_default();
                if of_ranks.get(group.rank()) != Some(&members.len()) {
                    return Err(search.contradiction("differ from its members'"));
                }
                members.iter().for_each(|candidate| push_candidate(&mut message, candidate));
                for (words, count) in counts.iter_mut().zip(of_ranks) {
                    *words += count * CANDIDATE_WORDS;
                }
            }
        }
    }
    let gathered = gather(group, &message, &counts)?;
    let mut ranks = readers(&gathered, &counts);
    for search in searches {
        match search.members.take() {
            None => {
                let read = |words: &mut Words<'_>| {
                    (0..PARTS).map(|_| Part { count: words.word(), mass: words.wide() }).collect()
                };
                let by_rank: Vec<Vec<Part>> = ranks.iter_mut().map(read).collect();
                search.take_parts(&by_rank)?;
            }
            Some(of_ranks) => {
                let mut members = Vec::new();
                for (words, count) in ranks.iter_mut().zip(of_ranks) {
                    members.extend((0..count).map(|_| words.candidate()));
                }
                search.take_members(members)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_follow_the_order_of_scores_and_ids() {
        let scores = [f32::MAX, 3.0, 1e-30, 0.0, -0.0, -1e-30, -3.0, f32::MIN, f32::NEG_INFINITY];
        for pair in scores.windows(2) {
            assert!(order_place(pair[0], u32::MAX) < order_place(pair[1], 0), "{pair:?}");
        }
        for score in scores {
            assert_eq!(score_of_key(order_key(score)).to_bits(), score.to_bits());
            assert!(order_place(score, 7) < order_place(score, 8));
        }
    }

    #[test]
    fn the_parts_of_a_window_cover_it() {
        for (first, last) in [
            (0, u64::MAX),
            (5, 5),
            (0, 255),
            (0, 256),
            (1, 256),
            (1 << 40, (1 << 52) + 12_345),
            (u64::MAX, u64::MAX),
        ] {
            let window = Window { row: 0, first, last };
            let of = |place: u64| ((place - first) >> window.shift()) as usize;
            assert!(of(last) < PARTS, "{window:?}");
            let mut next = Some(first);
            for index in 0..=of(last) {
                let Window { first: from, last: to, .. } = window.part(index);
                assert_eq!((Some(from), of(from), of(to)), (next, index, index), "{window:?}");
                next = to.checked_add(1);
            }
            assert_eq!(next, last.checked_add(1), "{window:?}");
        }
    }
}
