//! The questions of a row that draws: which candidate is the first to reach a count or a mass?

use super::wire::RowMasses;
use super::{Candidate, MOST_MEMBERS, OP, PARTS, Part, Window};
use crate::{Error, Result, SamplingRow, uniform};

/// Count and mass of the candidates before a place.
#[derive(Debug, Clone, Copy, Default)]
struct Prefix {
    count: u64,
    mass: u64,
}

#[derive(Debug, Clone, Copy)]
enum Target {
    Count(u64),
    Mass(u64),
}

impl Target {
    fn is_reached(self, prefix: Prefix) -> bool {
        match self {
            Target::Count(count) => prefix.count >= count,
            Target::Mass(mass) => prefix.mass >= mass,
        }
    }
}

/// The first of `candidates`, which are in order and follow on `prefix`, at which `target` is reached, and the mass up to
/// and including it; what lies before the rest if none is.
fn first_reaching(
    candidates: &[Candidate],
    mut prefix: Prefix,
    target: Target,
) -> std::result::Result<(Candidate, u64), Prefix> {
    for candidate in candidates {
        prefix.count += 1;
        prefix.mass += candidate.mass;
        if target.is_reached(prefix) {
            return Ok((*candidate, prefix.mass));
        }
    }
    Err(prefix)
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    TopK,
    TopP,
    Draw,
}

/// A question that the known candidates do not answer.
pub(super) struct Search {
    target: Target,
    pub(super) window: Window,
    /// What lies before the window.
    before: Prefix,
    /// How many of the window every rank holds: few, they are asked for.
    pub(super) members: Option<Vec<usize>>,
    found: Option<(Candidate, u64)>,
}

/// A row on its way to a token.
pub(super) struct Draw<'a> {
    pub(super) index: usize,
    row: &'a SamplingRow<'a>,
    vocab: usize,
    largest: f32,
    /// Mass that the rules so far have kept.
    kept: u64,
    above_min_p: u64,
    /// The best candidates of all slices in order.
    known: Vec<Candidate>,
    /// The first place from which on candidates that have a mass may be missing.
    beyond: u64,
    stage: Stage,
    pub(super) search: Option<Search>,
}

impl<'a> Draw<'a> {
    pub(super) fn new(
        index: usize,
        row: &'a SamplingRow<'a>,
        vocab: usize,
        largest: f32,
        unit: u64,
        masses: &RowMasses,
    ) -> Self {
        Self {
            index,
            row,
            vocab,
            largest,
            kept: masses.total,
            // The best candidate stays, whatever min-p.
            above_min_p: masses.above_min_p.max(unit),
            known: masses.known.clone(),
            beyond: masses.beyond,
            stage: Stage::TopK,
            search: None,
        }
    }

    fn target(&self) -> Option<Target> {
        let kept = self.kept as f64;
        match self.stage {
            Stage::TopK => {
                let k = self.row.top_k as usize;
                (k != 0 && k < self.vocab).then_some(Target::Count(k as u64))
            }
            Stage::TopP => (self.row.top_p < 1.0).then(|| {
                let mass = (f64::from(self.row.top_p) * kept).ceil() as u64;
                Target::Mass(mass.min(self.kept).max(1))
            }),
            Stage::Draw => {
                let u = f64::from(uniform(self.row.seed, self.row.position));
                Some(Target::Mass(((u * kept) as u64 + 1).min(self.kept)))
            }
        }
    }

    /// Answers what can be answered; the token, or `None` where a search is open.
    pub(super) fn advance(&mut self) -> Option<Candidate> {
        loop {
            let Some(target) = self.target() else {
                self.next_stage();
                continue;
            };
            let found = match self.search.take() {
                Some(Search { found: Some(found), .. }) => found,
                Some(open) => {
                    self.search = Some(open);
                    return None;
                }
                None => match (first_reaching(&self.known, Prefix::default(), target), target) {
                    (Ok(found), _) => found,
                    // Everything that has a mass is known, and is less than top-k would keep.
                    (Err(_), Target::Count(_)) if self.beyond == u64::MAX => {
                        self.next_stage();
                        continue;
                    }
                    (Err(before), _) => {
                        self.search = Some(self.search_beyond(target, before));
                        return None;
                    }
                },
            };
            if self.stage == Stage::Draw {
                return Some(found.0);
            }
            self.kept = self.kept.min(found.1);
            self.next_stage();
        }
    }

    fn next_stage(&mut self) {
        self.stage = match self.stage {
            Stage::TopK => Stage::TopP,
            Stage::TopP | Stage::Draw => {
                if self.row.min_p > 0.0 {
                    self.kept = self.kept.min(self.above_min_p);
                }
                Stage::Draw
            }
        };
    }

    /// What lies behind the known candidates, the near ones first.
    fn search_beyond(&self, target: Target, before: Prefix) -> Search {
        let near = Window::near(self.index, self.largest, self.row.temperature);
        let first = self.beyond.max(near.first);
        let last = if near.last > first { near.last } else { u64::MAX };
        Search { target, window: Window { row: self.index, first, last }, before, members: None, found: None }
    }
}

impl Search {
    /// Narrows the window to the part that holds the answer, or moves it on.
    pub(super) fn take_parts(&mut self, by_rank: &[Vec<Part>]) -> Result<()> {
        for index in 0..PARTS {
            let of_ranks = || by_rank.iter().filter_map(|parts| parts.get(index));
            let count: u64 = of_ranks().map(|part| u64::from(part.count)).sum();
            let mass: u64 = of_ranks().map(|part| part.mass).sum();
            let reached = Prefix { count: self.before.count + count, mass: self.before.mass + mass };
            if count > 0 && self.target.is_reached(reached) {
                self.members = (count <= MOST_MEMBERS as u64)
                    .then(|| of_ranks().map(|part| part.count as usize).collect());
                self.window = self.window.part(index);
                return Ok(());
            }
            self.before = reached;
        }
        self.window.first =
            self.window.last.checked_add(1).ok_or_else(|| self.contradiction("reach no candidate"))?;
        self.window.last = u64::MAX;
        Ok(())
    }

    pub(super) fn take_members(&mut self, mut members: Vec<Candidate>) -> Result<()> {
        members.sort_unstable_by_key(|candidate| candidate.place);
        match first_reaching(&members, self.before, self.target) {
            Ok(found) => {
                self.found = Some(found);
                Ok(())
            }
            Err(_) => Err(self.contradiction("differ from its members'")),
        }
    }

    pub(super) fn contradiction(&self, detail: &str) -> Error {
        let message = format!("row {}: the counts and masses of a window {detail}", self.window.row);
        Error::Device { op: OP, message }
    }
}
