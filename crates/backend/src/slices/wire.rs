//! What ranks send each other about their slices: 32-bit words, as many as the rows and what was asked for say.

use super::{Candidate, SliceMasses, SliceSummary};
use crate::{Collective, Result};

/// The summary of the whole rows.
pub(super) fn exchange_summaries(
    group: &dyn Collective,
    own: Vec<SliceSummary>,
    rows: usize,
) -> Result<Vec<SliceSummary>> {
    const WORDS: usize = 5;
    let mut message = Vec::with_capacity(rows * WORDS);
    for summary in &own {
        message.extend([i32::from(summary.finite), bits(summary.largest), bits(summary.logit)]);
        push_wide(&mut message, summary.best);
    }
    let counts = vec![rows * WORDS; group.world_size()];
    let gathered = gather(group, &message, &counts)?;
    let mut ranks = readers(&gathered, &counts);
    let row = |_| {
        ranks.iter_mut().fold(SliceSummary::default(), |whole, words| {
            let finite = whole.finite && words.word() != 0;
            let (largest, logit) = (f32::from_bits(words.word()), f32::from_bits(words.word()));
            let best = words.wide();
            let (best, logit) = if best < whole.best { (best, logit) } else { (whole.best, whole.logit) };
            SliceSummary { finite, largest: whole.largest.max(largest), best, logit }
        })
    };
    Ok((0..rows).map(row).collect())
}

/// Masses of a whole row.
pub(super) struct RowMasses {
    pub(super) raw: u64,
    pub(super) total: u64,
    pub(super) above_min_p: u64,
    pub(super) known: Vec<Candidate>,
    pub(super) beyond: u64,
}

pub(super) fn exchange_masses(
    group: &dyn Collective,
    own: Vec<SliceMasses>,
    wanted: &[usize],
) -> Result<Vec<RowMasses>> {
    const DRAW_WORDS: usize = 7;
    let mut message = Vec::new();
    let mut length = 0;
    for (masses, &wanted) in own.iter().zip(wanted) {
        push_wide(&mut message, masses.raw);
        length += 2;
        if wanted == 0 {
            continue;
        }
        push_wide(&mut message, masses.total);
        push_wide(&mut message, masses.above_min_p);
        let best = masses.best.as_slice();
        push_wide(&mut message, masses.beyond);
        message.push(best.len() as i32);
        best.iter().for_each(|candidate| push_candidate(&mut message, candidate));
        length += DRAW_WORDS + wanted * CANDIDATE_WORDS;
        message.resize(length, 0);
    }
    let counts = vec![length; group.world_size()];
    let gathered = gather(group, &message, &counts)?;
    let mut ranks = readers(&gathered, &counts);
    let row = |&wanted: &usize| {
        let mut whole = RowMasses { raw: 0, total: 0, above_min_p: 0, known: Vec::new(), beyond: u64::MAX };
        for words in &mut ranks {
            whole.raw += words.wide();
            if wanted == 0 {
                continue;
            }
            whole.total += words.wide();
            whole.above_min_p += words.wide();
            whole.beyond = whole.beyond.min(words.wide());
            let count = words.word() as usize;
            let mut best: Vec<Candidate> = (0..wanted).map(|_| words.candidate()).collect();
            best.truncate(count);
            whole.known.extend(best);
        }
        whole.known.retain(|candidate| candidate.place < whole.beyond);
        whole.known.sort_unstable_by_key(|candidate| candidate.place);
        whole
    };
    Ok(wanted.iter().map(row).collect())
}

/// Every rank's words, one rank after the other.
pub(super) fn gather(group: &dyn Collective, message: &[i32], counts: &[usize]) -> Result<Vec<i32>> {
    let mut gathered = vec![0; counts.iter().sum()];
    group.all_gather(message.into(), counts, gathered.as_mut_slice().into())?;
    Ok(gathered)
}

pub(super) fn readers<'a>(gathered: &'a [i32], counts: &[usize]) -> Vec<Words<'a>> {
    let mut rest = gathered;
    let take = |&count: &usize| {
        let (words, later) = rest.split_at(count.min(rest.len()));
        rest = later;
        Words(words.iter())
    };
    counts.iter().map(take).collect()
}

/// Reads what a rank sent. Its length has been checked by the group.
pub(super) struct Words<'a>(std::slice::Iter<'a, i32>);

impl Words<'_> {
    pub(super) fn word(&mut self) -> u32 {
        self.0.next().map_or(0, |word| *word as u32)
    }

    pub(super) fn wide(&mut self) -> u64 {
        u64::from(self.word()) | u64::from(self.word()) << 32
    }

    pub(super) fn candidate(&mut self) -> Candidate {
        Candidate { place: self.wide(), mass: self.wide(), logit: f32::from_bits(self.word()) }
    }
}

pub(super) const CANDIDATE_WORDS: usize = 5;

pub(super) fn push_candidate(message: &mut Vec<i32>, candidate: &Candidate) {
    push_wide(message, candidate.place);
    push_wide(message, candidate.mass);
    message.push(bits(candidate.logit));
}

pub(super) fn push_wide(message: &mut Vec<i32>, value: u64) {
    message.extend([value as u32 as i32, (value >> 32) as u32 as i32]);
}

fn bits(value: f32) -> i32 {
    value.to_bits() as i32
}
