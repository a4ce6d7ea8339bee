//! Sampling over vocabulary slices against the definition: a sort of the whole row and sums in float64. Any number of ranks,
//! slices of no width included, draws its token.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use candle_core::{Device, Tensor};
use longhaul_backend::{
    Backend, Collective, Draw, Error, Result, RowError, Sampled, SamplingRow, SeenToken, uniform,
};
use longhaul_collective::{Options, Threads};
use longhaul_cpu::{Cpu, Precision};

use common::{Counted, Counts};

const WORLDS: [usize; 5] = [1, 2, 3, 5, 16];

/// A group of CPU ranks; what the first of them has sent.
struct Ranks {
    cpus: Vec<Cpu>,
    sent: Arc<Counts>,
}

impl Ranks {
    fn new(world_size: usize) -> Self {
        let sent = Arc::<Counts>::default();
        let cpu = |group: Threads| {
            let counts = if group.rank() == 0 { sent.clone() } else { Arc::default() };
            Cpu::new(1, Precision::F32).unwrap().in_group(Arc::new(Counted { group, counts }))
        };
        let cpus = Threads::group(world_size, Options::default()).unwrap().into_iter().map(cpu).collect();
        Self { cpus, sent }
    }

    /// Every rank's outcome.
    fn try_sample(
        &self,
        logits: &[f32],
        shares: &[usize],
        rows: &[SamplingRow<'_>],
    ) -> Vec<Result<Vec<Draw>>> {
        let vocab: usize = shares.iter().sum();
        thread::scope(|scope| {
            let start = |(rank, cpu)| {
                let first: usize = shares[..rank].iter().sum();
                let own: Vec<f32> =
                    logits.chunks(vocab).flat_map(|row| row[first..][..shares[rank]].to_vec()).collect();
                scope.spawn(move || {
                    let cpu: &Cpu = cpu;
                    let slice = Tensor::from_vec(own, (rows.len(), shares[rank]), &Device::Cpu).unwrap();
                    cpu.sample(&slice, shares, rows)
                })
            };
            let ranks: Vec<_> = self.cpus.iter().enumerate().map(start).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    /// What all ranks agree on.
    #[track_caller]
    fn sample(&self, logits: &[f32], shares: &[usize], rows: &[SamplingRow<'_>]) -> Vec<Sampled> {
        self.draws(logits, shares, rows).into_iter().map(|draw| draw.unwrap()).collect()
    }

    /// The same, where rows may fail.
    #[track_caller]
    fn draws(&self, logits: &[f32], shares: &[usize], rows: &[SamplingRow<'_>]) -> Vec<Draw> {
        let mut ranks = self.try_sample(logits, shares, rows).into_iter().map(Result::unwrap);
        let first = ranks.next().unwrap();
        for (rank, other) in ranks.enumerate() {
            assert_eq!(first, other, "rank {} draws something else than rank 0", rank + 1);
        }
        first
    }
}

/// Shares of `vocab` ids: about even, or uneven with slices of no width.
fn shares(vocab: usize, world_size: usize, uneven: bool) -> Vec<usize> {
    let bound = |rank: usize| match uneven {
        // A third of the ranks, the first among them, have nothing; the others less and less.
        true => {
            let weight = |rank: usize| if rank.is_multiple_of(3) { 0 } else { world_size - rank };
            let total: usize = (0..world_size).map(weight).sum();
            (0..rank).map(weight).sum::<usize>() * vocab / total.max(1)
        }
        false => rank * vocab / world_size,
    };
    let mut shares: Vec<usize> = (0..world_size).map(|rank| bound(rank + 1) - bound(rank)).collect();
    *shares.last_mut().unwrap() += vocab - shares.iter().sum::<usize>();
    shares
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// In `[-1, 1)`.
    fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
    fn row(&mut self, vocab: usize, scale: f32) -> Vec<f32> {
        (0..vocab).map(|_| scale * (self.value() + self.value() + self.value())).collect()
    }
}

/// Logits after the rules, as [`SamplingRow`] orders them.
fn scores(logits: &[f32], row: &SamplingRow<'_>) -> Vec<f32> {
    let mut scores = logits.to_vec();
    for seen in row.seen.iter().filter(|seen| (seen.id as usize) < logits.len()) {
        let score = &mut scores[seen.id as usize];
        *score = if *score > 0.0 { *score / row.repetition_penalty } else { *score * row.repetition_penalty };
        if seen.generated > 0 {
            *score -= row.presence_penalty + row.frequency_penalty * seen.generated as f32;
        }
        *score = score.clamp(f32::MIN, f32::MAX);
    }
    for (id, bias) in row.bias.iter().filter(|(id, _)| (*id as usize) < logits.len()) {
        scores[*id as usize] = (scores[*id as usize] + bias).clamp(f32::MIN, f32::MAX);
    }
    for (id, score) in (0..).zip(&mut scores) {
        let masked = row.allowed.is_some_and(|words| words[id as usize / 32] >> (id % 32) & 1 == 0);
        if masked || row.banned.contains(&id) {
            *score = f32::NEG_INFINITY;
        }
    }
    scores
}

/// The definition: a sort, then sums in float64.
fn defined(logits: &[f32], row: &SamplingRow<'_>) -> Sampled {
    let scores = scores(logits, row);
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|l| f64::from(l - largest).exp()).sum();
    let sampled =
        |id: usize| Sampled { id: id as u32, logprob: (f64::from(logits[id] - largest) - total.ln()) as f32 };
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if row.temperature == 0.0 {
        return sampled(scores.iter().position(|score| *score == top).unwrap());
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    if row.top_k > 0 {
        order.truncate(row.top_k as usize);
    }
    let weights: Vec<f64> =
        order.iter().map(|&id| f64::from((scores[id] - top) / row.temperature).exp()).collect();
    let mut kept = order.len();
    if row.top_p < 1.0 {
        let wanted = f64::from(row.top_p) * weights.iter().sum::<f64>();
        let mut mass = 0.0;
        let reaches = |weight: &f64| {
            mass += weight;
            mass >= wanted
        };
        kept = weights.iter().position(reaches).map_or(kept, |last| last + 1);
    }
    kept = kept.min(weights.iter().take_while(|weight| **weight >= f64::from(row.min_p)).count()).max(1);
    let mut left = f64::from(uniform(row.seed, row.position)) * weights[..kept].iter().sum::<f64>();
    for (id, weight) in order.iter().zip(&weights[..kept]) {
        if left < *weight {
            return sampled(*id);
        }
        left -= weight;
    }
    sampled(order[kept - 1])
}

/// Draws all rows from all worlds in one call each. Logprobs have the same bits everywhere.
#[track_caller]
fn check(worlds: &[Ranks], logits: &[f32], vocab: usize, rows: &[SamplingRow<'_>]) {
    let expected: Vec<Sampled> =
        logits.chunks_exact(vocab).zip(rows).map(|(logits, row)| defined(logits, row)).collect();
    assert_eq!(expected.len(), rows.len());
    let mut first: Option<Vec<Sampled>> = None;
    for ranks in worlds {
        let world_size = ranks.cpus.len();
        for uneven in [false, true] {
            let shares = shares(vocab, world_size, uneven);
            let drawn = ranks.sample(logits, &shares, rows);
            for ((drawn, expected), row) in drawn.iter().zip(&expected).zip(rows) {
                assert_eq!(drawn.id, expected.id, "{shares:?}: {row:?}");
                let error = (drawn.logprob - expected.logprob).abs();
                assert!(
                    error <= 1e-6 * expected.logprob.abs().max(1.0),
                    "{drawn:?}, {expected:?}: {shares:?}"
                );
            }
            assert_eq!(*first.get_or_insert_with(|| drawn.clone()), drawn, "{shares:?}");
        }
    }
}

fn worlds() -> Vec<Ranks> {
    WORLDS.into_iter().map(Ranks::new).collect()
}

/// Every combination of the parameters, with numbers to draw of their own.
fn combinations(random: &mut Random) -> Vec<SamplingRow<'static>> {
    let mut rows = vec![SamplingRow::default()];
    for temperature in [0.3, 1.0, 2.5] {
        for top_k in [0, 1, 2, 40, 300, u32::MAX] {
            for top_p in [1.0, 0.999, 0.9, 0.5, 1e-6] {
                for min_p in [0.0, 0.05, 1.0] {
                    let (seed, position) = (random.next(), random.next() % 4096);
                    let row = SamplingRow { temperature, top_k, top_p, min_p, ..SamplingRow::default() };
                    rows.push(SamplingRow { seed, position, ..row });
                }
            }
        }
    }
    rows
}

#[test]
fn every_combination_draws_the_defined_token() {
    let (worlds, mut random) = (worlds(), Random(1));
    for (vocab, scale) in [(7, 1.0), (331, 3.0), (1000, 0.3), (1000, 6.0)] {
        let rows = combinations(&mut random);
        let logits: Vec<f32> = rows.iter().flat_map(|_| random.row(vocab, scale)).collect();
        check(&worlds, &logits, vocab, &rows);
    }
}

/// Penalties, bias, banned ids and masks reach into the slice that has the id, and ids beyond the vocabulary into none.
#[test]
fn rules_reach_into_every_slice() {
    let (worlds, mut random) = (worlds(), Random(2));
    let vocab = 500usize;
    let seen: Vec<SeenToken> = (0..200).map(|i| SeenToken { id: i * 3, generated: i % 4 }).collect();
    let bias: Vec<(u32, f32)> =
        (0..vocab as u32 + 9).step_by(17).map(|id| (id, 4.0 * random.value())).collect();
    let banned: Vec<u32> = (1..vocab as u32 + 50).step_by(7).collect();
    let mask: Vec<u32> = (0..vocab.div_ceil(32)).map(|_| random.next() as u32 | 1).collect();
    let all_but_one: Vec<u32> = (0..vocab as u32).filter(|&id| id != 123).collect();
    let rules = SamplingRow {
        seen: &seen,
        bias: &bias,
        repetition_penalty: 1.3,
        presence_penalty: 0.7,
        frequency_penalty: 0.2,
        ..SamplingRow::default()
    };
    let mut rows = Vec::new();
    for parameters in combinations(&mut random).into_iter().step_by(5) {
        let SamplingRow { temperature, top_k, top_p, min_p, seed, position, .. } = parameters;
        let ruled = SamplingRow { temperature, top_k, top_p, min_p, seed, position, ..rules.clone() };
        rows.push(SamplingRow { banned: &banned, ..ruled.clone() });
        rows.push(SamplingRow { allowed: Some(&mask), ..ruled.clone() });
        rows.push(SamplingRow { allowed: Some(&mask), banned: &banned, temperature: 0.0, ..ruled.clone() });
        rows.push(SamplingRow { banned: &all_but_one, ..parameters });
        rows.push(SamplingRow { repetition_penalty: 1e30, ..ruled });
    }
    let logits: Vec<f32> = rows.iter().flat_map(|_| random.row(vocab, 2.0)).collect();
    check(&worlds, &logits, vocab, &rows);
}

/// Ties across slices, flat rows, one token that has everything, what lies far away, zeros of both signs.
#[test]
fn hostile_rows_draw_the_defined_token() {
    let (worlds, mut random) = (worlds(), Random(3));
    let vocab = 6000;
    let flat = vec![1.5f32; vocab];
    let nearly_flat: Vec<f32> = (0..vocab).map(|_| 0.001 * random.value()).collect();
    let one_hot: Vec<f32> = (0..vocab).map(|id| if id == 4077 { 60.0 } else { -60.0 }).collect();
    let steps: Vec<f32> = (0..vocab).map(|id| (id % 5) as f32).collect();
    let zeros: Vec<f32> = (0..vocab).map(|id| if id % 2 == 0 { -0.0 } else { 0.0 }).collect();
    let far: Vec<f32> = (0..vocab).map(|id| if id < 3 { 0.0 } else { -1e30 }).collect();
    let peak: Vec<f32> = (0..vocab).map(|id| if id == 9 { 20.0 } else { 0.01 * random.value() }).collect();
    let extreme: Vec<f32> = (0..vocab).map(|id| [f32::MAX, f32::MIN, 1e37, 0.0][id % 4]).collect();
    let wide = random.row(vocab, 1.0);
    let row = SamplingRow { temperature: 1.0, ..SamplingRow::default() };
    for logits in [flat, nearly_flat, one_hot, steps, zeros, far, peak, extreme, wide] {
        let mut rows = vec![SamplingRow::default()];
        for (top_k, top_p, min_p) in [
            (0, 1.0, 0.0),
            (0, 0.999, 0.0),
            (0, 0.9, 1e-3),
            (3, 1.0, 0.0),
            (200, 0.7, 0.0),
            (4000, 0.999, 0.0),
            (5999, 1.0, 0.0),
        ] {
            let (seed, position) = (random.next(), random.next() % 99);
            rows.push(SamplingRow { top_k, top_p, min_p, seed, position, ..row.clone() });
        }
        // The largest number there is to draw: the end of the order.
        let last = (0..).find(|&position| uniform(11, position) > 0.9999).unwrap();
        rows.push(SamplingRow { seed: 11, position: last, ..row.clone() });
        check(&worlds, &logits.repeat(rows.len()), vocab, &rows);
    }
}

/// The largest vocabulary of the family.
#[test]
fn a_whole_vocabulary_draws_the_defined_token() {
    let (worlds, mut random) = ([Ranks::new(1), Ranks::new(3)], Random(4));
    let vocab = 152_064;
    let logits = [random.row(vocab, 5.0), random.row(vocab, 0.3)].concat();
    let rows = [
        SamplingRow { temperature: 0.7, top_p: 0.9, seed: 5, ..SamplingRow::default() },
        SamplingRow { temperature: 1.0, top_p: 0.999, seed: 6, ..SamplingRow::default() },
    ];
    check(&worlds, &logits, vocab, &rows);
}

/// Bytes that a rank sends for a row, and exchanges, are those of docs/architecture.md. They depend on the shape of the
/// distribution, not on the width of the vocabulary.
#[test]
fn what_travels_is_small() {
    let ranks = Ranks::new(3);
    let mut random = Random(5);
    let mut sent = |vocab: usize, scale: f32, row: SamplingRow<'static>| {
        let logits = random.row(vocab, scale);
        let counts = || {
            let Counts { gathered_bytes, gathers, .. } = &*ranks.sent;
            (gathered_bytes.load(Ordering::Relaxed), gathers.load(Ordering::Relaxed))
        };
        let before = counts();
        ranks.sample(&logits, &shares(vocab, 3, false), &[row]);
        let (bytes, exchanges) = counts();
        (bytes - before.0, exchanges - before.1)
    };
    let row = SamplingRow { temperature: 1.0, seed: 2, ..SamplingRow::default() };
    for vocab in [2000, 60_000] {
        assert_eq!(sent(vocab, 1.0, SamplingRow::default()), (28, 2), "greedy");
        assert_eq!(sent(vocab, 0.3, SamplingRow { top_k: 20, ..row.clone() }), (56 + 20 * 20, 2), "top-k 20");
        assert_eq!(sent(vocab, 9.0, SamplingRow { top_p: 0.8, ..row.clone() }), (56 + 64 * 20, 2), "peaked");
        let (bytes, exchanges) = sent(vocab, 0.3, SamplingRow { top_k: 1500, top_p: 0.999, ..row.clone() });
        // Three searches beyond the lists.
        assert!(exchanges <= 2 + 3 * 5 && bytes <= 64 << 10, "flat: {bytes} bytes in {exchanges} exchanges");
    }
}

/// What fails one row fails it alone, on all ranks alike, wherever it lies.
#[test]
fn rows_fail_alone_and_on_all_ranks() {
    let row = SamplingRow { temperature: 1.0, ..SamplingRow::default() };
    let (vocab, mask) = (96, [0u32; 3]);
    for ranks in &worlds()[1..] {
        let shares = shares(vocab, ranks.cpus.len(), true);
        let good = vec![0.5f32; 2 * vocab];
        let alone = ranks.draws(&good[..vocab], &shares, std::slice::from_ref(&row))[0];
        assert!(alone.is_ok());
        let failure = |logits: &[f32], rows: &[SamplingRow<'_>]| {
            let outcomes = ranks.try_sample(logits, &shares, rows);
            outcomes.into_iter().map(Result::unwrap_err).collect::<Vec<_>>()
        };
        for id in (0..vocab).step_by(19) {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut logits = good.clone();
                logits[vocab + id] = bad;
                let draws = ranks.draws(&logits, &shares, &[row.clone(), row.clone()]);
                assert_eq!(draws, [alone, Err(RowError::NotFinite)], "{bad} at {id}");
            }
        }
        for temperature in [0.0, 1.0] {
            let masked = SamplingRow { temperature, allowed: Some(&mask), ..row.clone() };
            let draws = ranks.draws(&good, &shares, &[row.clone(), masked]);
            assert_eq!(draws, [alone, Err(RowError::NothingAllowed)]);
        }
        let twice = SamplingRow { bias: &[(1, 1.0), (1, 2.0)], ..row.clone() };
        for error in failure(&good, &[row.clone(), twice]) {
            assert!(matches!(error, Error::Sampling { row: 1, .. }), "{error}");
        }
        ranks.sample(&good, &shares, &[row.clone(), row.clone()]);
    }
}
