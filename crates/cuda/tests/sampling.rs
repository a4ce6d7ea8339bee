//! Sampling against a float64 implementation that sorts.

mod common;

use std::thread;

use common::{Random, context, schedules, skip_on_gpu};
use longhaul_backend::{Draw, Error, RowError, Sampled, SamplingRow, SeenToken, sample_slices, uniform};
use longhaul_collective::{Options, Threads};
use longhaul_cuda::driver::{Element, EmulatedOptions};
use longhaul_cuda::ops::sampling::sample;
use longhaul_cuda::ops::sampling_slice::Slice;
use longhaul_cuda::{Context, Tensor, Variant};

fn row() -> SamplingRow<'static> {
    SamplingRow { temperature: 1.0, seed: 7, ..SamplingRow::default() }
}

/// What may be drawn: the token, and its neighbours in the order where the drawn number lies within `SLACK` of theirs.
fn allowed(logits: &[f32], row: &SamplingRow<'_>) -> Vec<u32> {
    const SLACK: f64 = 1e-5;
    let mut scores = logits.to_vec();
    for seen in row.seen {
        let score = &mut scores[seen.id as usize];
        *score = if *score > 0.0 { *score / row.repetition_penalty } else { *score * row.repetition_penalty };
        if seen.generated > 0 {
            *score -= row.presence_penalty + row.frequency_penalty * seen.generated as f32;
        }
    }
    for (id, bias) in row.bias {
        scores[*id as usize] += bias;
    }
    for &id in row.banned {
        scores[id as usize] = f32::NEG_INFINITY;
    }
    if let Some(words) = row.allowed {
        for (id, score) in scores.iter_mut().enumerate() {
            if words[id / 32] >> (id % 32) & 1 == 0 {
                *score = f32::NEG_INFINITY;
            }
        }
    }
    for score in &mut scores {
        if *score > f32::NEG_INFINITY {
            *score = score.clamp(f32::MIN, f32::MAX);
        }
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    if row.temperature == 0.0 {
        // Zeros of both signs are equal here.
        let best = scores.iter().position(|score| *score == scores[order[0]]);
        return vec![best.unwrap() as u32];
    }
    let top = f64::from(scores[order[0]]);
    let weight = |id: usize| ((f64::from(scores[id]) - top) / f64::from(row.temperature)).exp();
    if row.top_k > 0 {
        order.truncate(row.top_k as usize);
    }
    let mut kept_options = vec![order.len()];
    if row.top_p < 1.0 {
        let total: f64 = order.iter().map(|&id| weight(id)).sum();
        let prefix = |wanted: f64| {
            let mut mass = 0.0;
            order.iter().position(|&id| {
                mass += weight(id);
                mass >= wanted
            })
        };
        // Where the mass just reaches p, one candidate more or less is right, too.
        kept_options = [-SLACK, 0.0, SLACK]
            .into_iter()
            .map(|slack| prefix((f64::from(row.top_p) + slack) * total).map_or(order.len(), |n| n + 1))
            .collect();
    }
    let mut result = Vec::new();
    for kept in kept_options {
        let kept = order[..kept]
            .iter()
            .take_while(|&&id| weight(id) >= f64::from(row.min_p) * (1.0 - 1e-6))
            .count()
            .max(1);
        let total: f64 = order[..kept].iter().map(|&id| weight(id)).sum();
        for slack in [-SLACK, 0.0, SLACK] {
            let mut left = (f64::from(uniform(row.seed, row.position)) + slack).clamp(0.0, 1.0) * total;
            let id = order[..kept].iter().find(|&&id| {
                let here = left < weight(id);
                left -= weight(id);
                here
            });
            result.push(*id.unwrap_or(&order[kept - 1]) as u32);
        }
    }
    result
}

fn logprob(logits: &[f32], id: u32) -> f64 {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
    let sum: f64 = logits.iter().map(|l| f64::from(l - largest).exp()).sum();
    f64::from(logits[id as usize] - largest) - sum.ln()
}

/// Draws rows none of which fails.
#[track_caller]
fn drawn(ctx: &Context, logits: &Tensor, rows: &[SamplingRow<'_>]) -> Vec<Sampled> {
    sample(ctx, logits, rows).unwrap().into_iter().map(Result::unwrap).collect()
}

/// Draws all rows in one call and checks each.
#[track_caller]
fn check(ctx: &Context, logits: &[f32], vocab: usize, rows: &[SamplingRow<'_>]) {
    let tensor = ctx.tensor_from_f32(logits, rows.len(), vocab, Element::F32).unwrap();
    let drawn = drawn(ctx, &tensor, rows);
    for ((sampled, row), logits) in drawn.iter().zip(rows).zip(logits.chunks_exact(vocab)) {
        let allowed = allowed(logits, row);
        assert!(allowed.contains(&sampled.id), "drew {}, expected one of {allowed:?}: {row:?}", sampled.id);
        let exact = logprob(logits, sampled.id);
        assert!((f64::from(sampled.logprob) - exact).abs() < 1e-4, "{} vs {exact}", sampled.logprob);
    }
}

fn parameters(random: &mut Random) -> SamplingRow<'static> {
    let pick = |random: &mut Random, values: &[f32]| values[random.below(values.len())];
    SamplingRow {
        temperature: pick(random, &[0.0, 0.3, 1.0, 2.5]),
        top_k: [0, 1, 2, 40, 1000][random.below(5)],
        top_p: pick(random, &[1.0, 0.95, 0.5, 1e-6]),
        min_p: pick(random, &[0.0, 0.0, 0.05, 1.0]),
        seed: random.next_u64(),
        position: random.next_u64() % 1000,
        ..row()
    }
}

#[test]
fn random_rows_match_float64() {
    for (index, options) in schedules().into_iter().enumerate() {
        let ctx = context(options, Variant::Auto, Element::Bf16);
        let mut random = Random(index as u64);
        for vocab in [1, 2, 7, 320, 1021, 2047, 2048, 2049, 5003] {
            let rows: Vec<_> = (0..8).map(|_| parameters(&mut random)).collect();
            let logits: Vec<f32> =
                (0..8 * vocab).map(|_| 8.0 * random.value() + 4.0 * random.value()).collect();
            check(&ctx, &logits, vocab, &rows);
        }
    }
}

/// The family's largest vocabulary: one draw of each kind.
#[test]
fn a_whole_vocabulary_matches_float64() {
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    let vocab = 152_064;
    let mut random = Random(3);
    let logits: Vec<f32> =
        (0..2 * vocab).map(|_| 6.0 * (random.value() + random.value() + random.value())).collect();
    let rows =
        [SamplingRow { temperature: 0.7, top_p: 0.9, ..row() }, SamplingRow { temperature: 0.0, ..row() }];
    check(&ctx, &logits, vocab, &rows);
}

/// More candidates than the list holds, and none of them the one: the search reads the whole row.
#[test]
fn a_flat_vocabulary_matches_float64() {
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    let vocab = 40_000;
    let mut random = Random(5);
    let mut logits: Vec<f32> = random.values(vocab);
    // A second row whose mass lies 20 below its largest logit, beyond the candidates of a temperature of 1.
    logits.extend((0..vocab).map(|id| if id == 9 { 20.0 } else { 0.01 * random.value() }));
    let rows = [SamplingRow { top_k: 30_000, ..row() }, SamplingRow { top_k: 3, position: 5, ..row() }];
    check(&ctx, &logits, vocab, &rows);
    // The last 8e-5 of the second row are 40,000 ids: a uniform number near 1 names one of them.
    let tail = &logits[vocab..];
    let position = (0..).find(|&position| uniform(7, position) > 0.99996).unwrap();
    let tensor = ctx.tensor_from_f32(tail, 1, vocab, Element::F32).unwrap();
    let drawn = drawn(&ctx, &tensor, &[SamplingRow { position, ..row() }])[0].id as usize;
    let weight = |id: usize| (f64::from(tail[id]) - 20.0).exp();
    let before = |id: usize| tail[id] > tail[drawn] || (tail[id] == tail[drawn] && id < drawn);
    let total: f64 = (0..vocab).map(weight).sum();
    let below = (0..vocab).filter(|&id| before(id)).map(weight).sum::<f64>() / total;
    assert!(drawn != 9 && (below - f64::from(uniform(7, position))).abs() < 1e-6, "{drawn}: {below}");
}

/// Ties, flat and one-hot logits, zeros of both signs.
#[test]
fn degenerate_distributions_match_float64() {
    for options in schedules().into_iter().step_by(3) {
        let ctx = context(options, Variant::Auto, Element::Bf16);
        let mut random = Random(11);
        let vocab = 2000;
        let flat = vec![1.5f32; vocab];
        let one_hot: Vec<f32> = (0..vocab).map(|i| if i == 77 { 60.0 } else { -60.0 }).collect();
        let steps: Vec<f32> = (0..vocab).map(|i| (i % 5) as f32).collect();
        let zeros: Vec<f32> = (0..vocab).map(|i| if i % 2 == 0 { 0.0 } else { -0.0 }).collect();
        let far: Vec<f32> = (0..vocab).map(|i| if i < 3 { 0.0 } else { -1e30 }).collect();
        for logits in [flat, one_hot, steps, zeros, far] {
            let rows: Vec<_> = (0..6).map(|_| parameters(&mut random)).collect();
            check(&ctx, &logits.repeat(6), vocab, &rows);
        }
    }
}

#[test]
fn penalties_and_banned_ids_match_float64() {
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    let vocab = 500;
    let mut random = Random(2);
    let logits: Vec<f32> = (0..4 * vocab).map(|_| 5.0 * random.value()).collect();
    let seen: Vec<SeenToken> = (0..100).map(|i| SeenToken { id: i * 3, generated: i % 4 }).collect();
    let all_but_one: Vec<u32> = (0..vocab as u32).filter(|&id| id != 123).collect();
    let penalised = SamplingRow {
        seen: &seen,
        repetition_penalty: 1.3,
        presence_penalty: 0.7,
        frequency_penalty: 0.2,
        ..row()
    };
    let rows = [
        penalised.clone(),
        SamplingRow { temperature: 0.0, ..penalised.clone() },
        SamplingRow { banned: &all_but_one, ..row() },
        SamplingRow { banned: &all_but_one[..250], top_k: 5, repetition_penalty: 1e30, ..penalised },
    ];
    check(&ctx, &logits, vocab, &rows);
    let tensor = ctx.tensor_from_f32(&logits[..vocab], 1, vocab, Element::F32).unwrap();
    let only = drawn(&ctx, &tensor, &rows[2..3]);
    assert_eq!(only[0].id, 123);
}

/// All rules at once on vocabularies of one and of several chunks; ids beyond the vocabulary are ignored.
#[test]
fn bias_and_masks_match_float64() {
    for (index, options) in schedules().into_iter().enumerate() {
        let ctx = context(options, Variant::Auto, Element::Bf16);
        let mut random = Random(30 + index as u64);
        for vocab in [3usize, 33, 2048, 4500] {
            let logits: Vec<f32> = (0..6 * vocab).map(|_| 4.0 * random.value()).collect();
            let stride = vocab.div_ceil(20);
            let bias: Vec<(u32, f32)> =
                (0..vocab).step_by(stride).map(|id| (id as u32, 6.0 * random.value())).collect();
            let seen: Vec<SeenToken> = (0..vocab)
                .step_by(2 * stride)
                .map(|id| SeenToken { id: id as u32, generated: id as u32 % 3 })
                .collect();
            let banned: Vec<u32> = (1..vocab as u32).step_by(7).collect();
            // A third of the ids and always id 0, so that something is allowed.
            let mask: Vec<u32> =
                (0..vocab.div_ceil(32)).map(|_| 0x2492_4924 | 1 | (random.next_u64() as u32 % 2)).collect();
            let rules = SamplingRow {
                bias: &bias,
                seen: &seen,
                repetition_penalty: 1.2,
                presence_penalty: 0.4,
                frequency_penalty: 0.3,
                ..parameters(&mut random)
            };
            let rows = [
                rules.clone(),
                SamplingRow { temperature: 0.0, ..rules.clone() },
                SamplingRow { banned: &banned, ..rules.clone() },
                SamplingRow { allowed: Some(&mask), ..rules.clone() },
                SamplingRow { allowed: Some(&mask), banned: &banned, temperature: 0.0, ..rules },
                SamplingRow { allowed: Some(&mask), ..parameters(&mut random) },
            ];
            check(&ctx, &logits, vocab, &rows);
        }
    }
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    let tensor = ctx.tensor_from_f32(&[1.0, 2.0, 3.0], 1, 3, Element::F32).unwrap();
    let beyond = SamplingRow {
        temperature: 0.0,
        bias: &[(3, 1e9), (u32::MAX, 1e9)],
        banned: &[3, u32::MAX],
        seen: &[SeenToken { id: 4, generated: 1 }],
        presence_penalty: 1.0,
        ..row()
    };
    assert_eq!(drawn(&ctx, &tensor, &[beyond])[0].id, 2);
}

/// What the CPU's sampler refuses is refused, and the row is named.
#[test]
fn rows_without_a_token_are_named() {
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    let vocab = 2100usize;
    let tensor = ctx.tensor_from_f32(&vec![0.5; 2 * vocab], 2, vocab, Element::F32).unwrap();
    let none = vec![0u32; vocab.div_ceil(32)];
    for temperature in [0.0, 1.0] {
        let masked = SamplingRow { temperature, allowed: Some(&none), ..row() };
        let draws = sample(&ctx, &tensor, &[row(), masked]).unwrap();
        assert!(matches!(draws[..], [Ok(_), Err(RowError::NothingAllowed)]), "{draws:?}");
    }
    let bad = SamplingRow { bias: &[(1, 1.0), (1, 2.0)], ..row() };
    assert!(matches!(sample(&ctx, &tensor, &[row(), bad]), Err(Error::Sampling { row: 1, .. })));
    let short = SamplingRow { allowed: Some(&none[1..]), ..row() };
    assert!(matches!(sample(&ctx, &tensor, &[short, row()]), Err(Error::Sampling { row: 0, .. })));
}

#[test]
fn a_row_that_is_not_finite_is_named() {
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut logits = vec![0.5f32; 3 * 700];
        logits[700 + 699] = bad;
        let tensor = ctx.tensor_from_f32(&logits, 3, 700, Element::F32).unwrap();
        let draws = sample(&ctx, &tensor, &[row(), row(), row()]).unwrap();
        let good = ctx.tensor_from_f32(&logits[..700], 1, 700, Element::F32).unwrap();
        let alone = drawn(&ctx, &good, &[row()])[0];
        assert_eq!(draws, [Ok(alone), Err(RowError::NotFinite), Ok(alone)], "{bad}");
    }
}

/// A draw depends on the row alone: the same in any batch, in any schedule.
#[test]
fn a_row_draws_the_same_in_any_batch() {
    let vocab = 700;
    let mut random = Random(4);
    let logits: Vec<f32> = (0..8 * vocab).map(|_| 3.0 * random.value()).collect();
    let rows: Vec<_> = (0..8).map(|position| SamplingRow { position, top_p: 0.9, ..row() }).collect();
    let mut first = None;
    for options in schedules() {
        let ctx = context(options, Variant::Auto, Element::Bf16);
        let all = ctx.tensor_from_f32(&logits, 8, vocab, Element::F32).unwrap();
        let batch = drawn(&ctx, &all, &rows);
        for index in 0..8 {
            let one = ctx.tensor_from_f32(&logits[index * vocab..][..vocab], 1, vocab, Element::F32).unwrap();
            assert_eq!(drawn(&ctx, &one, &rows[index..=index]), [batch[index]]);
        }
        assert_eq!(*first.get_or_insert_with(|| batch.clone()), batch);
    }
}

/// Chi-square of 2,000 draws over eight tokens: 7 degrees of freedom, 24.3 is exceeded once in a thousand.
#[test]
fn draws_follow_the_distribution() {
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    let logits: Vec<f32> = (0..8).map(|i| 0.4 * i as f32).collect();
    let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
    let mut counts = [0usize; 8];
    let batch = 100;
    let tensor = ctx.tensor_from_f32(&logits.repeat(batch), batch, 8, Element::F32).unwrap();
    for round in 0..20 {
        let rows: Vec<_> =
            (0..batch).map(|i| SamplingRow { position: (round * batch + i) as u64, ..row() }).collect();
        for drawn in drawn(&ctx, &tensor, &rows) {
            counts[drawn.id as usize] += 1;
        }
    }
    let draws = (20 * batch) as f64;
    let chi_square: f64 = counts
        .iter()
        .zip(&logits)
        .map(|(count, logit)| {
            let expected = draws * f64::from(*logit).exp() / total;
            (*count as f64 - expected).powi(2) / expected
        })
        .sum();
    assert!(chi_square < 24.3, "{chi_square}: {counts:?}");
}

#[test]
fn wrong_shapes_are_errors() {
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    let tensor = ctx.tensor_from_f32(&[0.0; 20], 2, 10, Element::F32).unwrap();
    assert!(matches!(sample(&ctx, &tensor, &[row()]), Err(Error::Shape { op: "sample", .. })));
}

/// The outcome of ranks, one emulated device each, that hold `shares` of the vocabulary.
fn sliced(logits: &[f32], shares: &[usize], rows: &[SamplingRow<'_>]) -> Vec<Vec<Draw>> {
    let vocab: usize = shares.iter().sum();
    let groups = Threads::group(shares.len(), Options::default()).unwrap();
    thread::scope(|scope| {
        let start = |(rank, group): (usize, Threads)| {
            scope.spawn(move || {
                let options = EmulatedOptions { seed: rank as u64, ..EmulatedOptions::default() };
                let ctx = context(options, Variant::Auto, Element::Bf16);
                let first_id = shares[..rank].iter().sum();
                let slice = |row: &[f32]| row[first_id..][..shares[rank]].to_vec();
                let own: Vec<f32> = logits.chunks_exact(vocab).flat_map(slice).collect();
                let tensor = ctx.tensor_from_f32(&own, rows.len(), shares[rank], Element::F32).unwrap();
                let mut slice = Slice::new(&ctx, &tensor, first_id, rows).unwrap();
                sample_slices(&group, &mut slice, vocab, rows).unwrap()
            })
        };
        let ranks: Vec<_> = groups.into_iter().enumerate().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Slices without a width, and cut in the middle of a mask's word.
const SHARES: [&[usize]; 3] = [&[2500, 2503], &[0, 37, 2500, 0, 2466], &[1000, 1, 2049, 1953]];

/// Ranks that each reduce their slice draw what one device draws from the whole row.
#[test]
fn slices_draw_the_token_of_the_whole_row() {
    if skip_on_gpu("several devices at once") {
        return;
    }
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    let vocab = 5003usize;
    let mut random = Random(40);
    let bias: Vec<(u32, f32)> =
        (0..vocab as u32 + 9).step_by(117).map(|id| (id, 3.0 * random.value())).collect();
    let seen: Vec<SeenToken> = (0..2000).map(|i| SeenToken { id: i * 3, generated: i % 3 }).collect();
    let banned: Vec<u32> = (1..vocab as u32).step_by(7).collect();
    let mask: Vec<u32> = (0..vocab.div_ceil(32)).map(|_| random.next_u64() as u32 | 1).collect();
    for shares in SHARES {
        let mut rows: Vec<SamplingRow<'_>> = (0..6).map(|_| parameters(&mut random)).collect();
        for _ in 0..4 {
            let ruled = SamplingRow {
                bias: &bias,
                seen: &seen,
                repetition_penalty: 1.2,
                presence_penalty: 0.3,
                ..parameters(&mut random)
            };
            rows.push(SamplingRow { banned: &banned, ..ruled.clone() });
            rows.push(SamplingRow { allowed: Some(&mask), ..ruled });
        }
        let mut logits: Vec<f32> =
            (0..rows.len() * vocab).map(|_| 8.0 * random.value() + 4.0 * random.value()).collect();
        // Flat rows, whose answers lie beyond the lists that ranks send first: ties, nearly ties, and far below the largest.
        logits.extend((0..vocab).map(|id| (id % 3) as f32));
        logits.extend((0..vocab).map(|_| 0.01 * random.value()));
        logits.extend((0..vocab).map(|id| if id == 9 { 20.0 } else { 0.01 * random.value() }));
        let far = (0..).find(|&position| uniform(7, position) > 0.999_99).unwrap();
        rows.push(SamplingRow { top_k: 3000, top_p: 0.95, ..row() });
        rows.push(SamplingRow { top_p: 0.999, position: 3, ..row() });
        rows.push(SamplingRow { position: far, ..row() });
        let whole = ctx.tensor_from_f32(&logits, rows.len(), vocab, Element::F32).unwrap();
        let expected = drawn(&ctx, &whole, &rows);
        let unwrapped = |draws: Vec<Draw>| draws.into_iter().map(Result::unwrap).collect();
        let ranks: Vec<Vec<Sampled>> = sliced(&logits, shares, &rows).into_iter().map(unwrapped).collect();
        for ((drawn, expected), row) in ranks[0].iter().zip(&expected).zip(&rows) {
            assert_eq!(drawn.id, expected.id, "{shares:?}: {row:?}");
            assert!((drawn.logprob - expected.logprob).abs() < 1e-4, "{drawn:?}, {expected:?}: {shares:?}");
        }
        assert!(ranks.iter().all(|rank| *rank == ranks[0]), "{shares:?}: ranks differ");
    }
}

#[test]
fn slices_name_rows_that_fail() {
    if skip_on_gpu("several devices at once") {
        return;
    }
    let vocab = 5003;
    for shares in SHARES {
        let mut logits: Vec<f32> = (0..2 * vocab).map(|id| (id % vocab % 11) as f32 * 0.3).collect();
        let alone = sliced(&logits[..vocab], shares, &[row()])[0][0];
        assert!(alone.is_ok());
        let none = vec![0u32; vocab.div_ceil(32)];
        for temperature in [0.0, 1.0] {
            let masked = SamplingRow { temperature, allowed: Some(&none), ..row() };
            for draws in sliced(&logits, shares, &[row(), masked]) {
                assert_eq!(draws, [alone, Err(RowError::NothingAllowed)]);
            }
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            logits[vocab + 36] = bad;
            for draws in sliced(&logits, shares, &[row(), row()]) {
                assert_eq!(draws, [alone, Err(RowError::NotFinite)], "{bad}");
            }
        }
    }
}
