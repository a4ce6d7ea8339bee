use longhaul_testkit::golden_cases;
use longhaul_weights::{Slice, TensorSpec};
use proptest::prelude::*;

use super::*;
use crate::{Mlp, ModelSpec, MoeSpec, Role, WeightFormat, family, family_names};
use longhaul_backend::{DType, HeadGroups};

/// How often every row (of a tensor cut by rows) or column (by columns) is held.
fn holdings(plan: &ShardPlan, index: usize) -> (TensorSpec, Role, Vec<usize>) {
    let (tensor, role, _) = plan.tensors(&plan.ranks()[0]).nth(index).unwrap();
    let by_columns = matches!(role, Role::Output | Role::Down(_));
    let mut counts = vec![0; tensor.shape[usize::from(by_columns)]];
    for shard in plan.ranks() {
        match shard.slice(role) {
            Slice::All => counts.iter_mut().for_each(|count| *count += 1),
            Slice::Rows(range) if !by_columns => counts[range].iter_mut().for_each(|count| *count += 1),
            Slice::Cols(range) if by_columns => counts[range].iter_mut().for_each(|count| *count += 1),
            other => panic!("{} {role:?} is cut as {other}", tensor.name),
        }
    }
    (tensor.clone(), role, counts)
}

/// The distinct shapes and roles of a model: layers repeat, and so do experts that lie together.
fn distinct(spec: &ModelSpec) -> Vec<usize> {
    let mut seen = std::collections::HashSet::new();
    let manifest = spec.manifest();
    (0..manifest.len()).filter(|&i| seen.insert((manifest[i].0.shape.clone(), manifest[i].1))).collect()
}

fn check(spec: &ModelSpec, world_size: usize, options: &ShardOptions) {
    let case = format!("{} heads, {world_size} ranks, {options:?}", spec.query_heads);
    let plan = ShardPlan::new(spec, world_size, options).unwrap();
    let shards = plan.ranks();
    assert_eq!(shards.len(), world_size);
    assert!(shards.iter().enumerate().all(|(rank, s)| (s.rank, s.world_size) == (rank, world_size)));

    // Every element is held as often as planned: once, by all ranks, or by the ranks that need the KV head.
    for index in distinct(spec) {
        let (tensor, role, counts) = holdings(&plan, index);
        for (at, &count) in counts.iter().enumerate() {
            let expected = match role {
                Role::Replicated => world_size,
                Role::KeyValue => plan.holders_of(at / spec.head_dim).count(),
                _ => 1,
            };
            assert_eq!(count, expected, "{case}: {} at {at}", tensor.name);
        }
    }
    let group = spec.query_heads / spec.kv_heads;
    for kv_head in 0..spec.kv_heads {
        let readers = |s: &&RankShard| s.query_heads.clone().any(|head| head / group == kv_head);
        let readers: Vec<usize> = shards.iter().filter(readers).map(|s| s.rank).collect();
        assert_eq!(plan.holders_of(kv_head).collect::<Vec<_>>(), readers, "{case}: KV head {kv_head}");
    }

    // The sum of the shares is the whole.
    let held: u64 = shards.iter().map(|s| plan.parameters(s)).sum();
    assert_eq!(held - plan.replicated_parameters(), spec.parameters(), "{case}");
    let bf16 = WeightFormat::Float(DType::BF16);
    let bytes: u64 = shards.iter().map(|s| plan.weight_bytes(s, bf16)).sum();
    assert_eq!(bytes, 2 * held, "{case}");
    if world_size == 1 {
        assert_eq!(shards[0], RankShard::whole(spec));
        assert_eq!(plan.replicated_parameters(), 0);
    }

    // Shares differ by one unit at most, cuts lie on units, and heads read the KV head of their group.
    let unit = options.quantisation_group.unwrap_or(options.column_multiple);
    let even = |what: &str, total: usize, unit: usize, lengths: Vec<usize>| {
        let most = total.div_ceil(unit).div_ceil(world_size) * unit;
        assert!(lengths.iter().all(|&n| n <= most), "{case}: {what} {lengths:?}, at most {most}");
    };
    let lengths = |f: &dyn Fn(&RankShard) -> usize| shards.iter().map(f).collect::<Vec<_>>();
    even("columns", spec.intermediate_size, unit, lengths(&|s| s.columns.len()));
    even("vocabulary", spec.vocab_size, options.column_multiple, lengths(&|s| s.vocabulary.len()));
    if let Some(moe) = &spec.moe {
        even("shared expert", moe.shared_intermediate_size, unit, lengths(&|s| s.shared_columns.len()));
        if options.expert_parallel {
            even("experts", moe.experts, 1, lengths(&|s| s.experts.len()));
        } else {
            even("expert columns", moe.intermediate_size, unit, lengths(&|s| s.expert_columns.len()));
        }
    }
    for shard in shards {
        for (range, total) in [
            (&shard.columns, spec.intermediate_size),
            (&shard.shared_columns, spec.moe.as_ref().map_or(0, |m| m.shared_intermediate_size)),
        ] {
            for cut in [range.start, range.end] {
                assert!(cut.is_multiple_of(unit) || cut == total, "{case}: {shard:?}");
            }
        }
        let layout = shard.kv_layout(spec, 16, 1, DType::F32);
        assert!(layout.is_consistent(), "{case}: {layout:?}");
        for kv_head in 0..layout.kv_heads {
            for head in layout.query_heads_of(kv_head) {
                let (head, kv_head) = (shard.query_heads.start + head, shard.kv_heads.start + kv_head);
                assert_eq!(head / group, kv_head, "{case}: {shard:?}");
            }
        }
    }
}

fn every_option(spec: &ModelSpec) -> Vec<ShardOptions> {
    let mut options = vec![
        ShardOptions::default(),
        ShardOptions { quantisation_group: Some(128), ..ShardOptions::default() },
    ];
    if spec.moe.is_some() {
        options.push(ShardOptions { expert_parallel: true, ..ShardOptions::default() });
    }
    options
}

#[test]
fn every_member_over_one_to_sixteen_ranks() {
    for name in family_names() {
        let mut spec = family(name).unwrap().spec;
        // Layers are equal: two of them prove what all do.
        spec.layers = 2;
        for options in every_option(&spec) {
            for world_size in 1..=16 {
                check(&spec, world_size, &options);
            }
        }
    }
}

#[test]
fn whole_members_add_up() {
    for name in family_names() {
        let spec = family(name).unwrap().spec;
        for world_size in [1, 3, 8] {
            let plan = ShardPlan::new(&spec, world_size, &ShardOptions::default()).unwrap();
            let held: u64 = plan.ranks().iter().map(|s| plan.parameters(s)).sum();
            assert_eq!(held - plan.replicated_parameters(), spec.parameters(), "{name} over {world_size}");
            assert!(plan.imbalance(WeightFormat::Float(DType::BF16)) < 1.1, "{name} over {world_size}");
        }
    }
}

#[test]
fn the_goldens_over_more_ranks_than_heads() {
    for case in golden_cases() {
        let config = std::fs::read(case.join("config.json")).unwrap();
        let spec = ModelSpec::from_config(&config, "config.json").unwrap();
        for options in every_option(&spec) {
            for world_size in (1..=16).chain([31, 64, 100]) {
                check(&spec, world_size, &options);
            }
        }
    }
}

#[test]
fn known_plans() {
    let plan = |name: &str, world_size, options| {
        ShardPlan::new(&family(name).unwrap().spec, world_size, &options).unwrap()
    };
    let default = ShardOptions::default();
    let seven = plan("qwen2-7b", 8, default);
    let heads: Vec<_> = seven.ranks().iter().map(|s| (s.query_heads.clone(), s.kv_heads.clone())).collect();
    assert_eq!(heads[..3], [(0..4, 0..1), (7..11, 1..2), (14..18, 2..3)]);
    assert_eq!(heads[7], (25..28, 3..4));
    assert_eq!(seven.holders_of(0).collect::<Vec<_>>(), [0, 4]);
    assert!(seven.ranks().iter().all(|s| s.head_groups() == HeadGroups::Even));
    // No rank is inside one group over three ranks.
    let groups: Vec<_> = plan("qwen2-7b", 3, default).ranks().iter().map(RankShard::head_groups).collect();
    assert_eq!(groups, [0, 3, 5].map(|skipped| HeadGroups::Cut { size: 7, skipped }));
    // 29568 = 231 · 128.
    let quantised = ShardOptions { quantisation_group: Some(128), ..default };
    let columns: Vec<_> = plan("qwen2-72b", 8, quantised).ranks().iter().map(|s| s.columns.len()).collect();
    assert_eq!(columns, [3584, 3712, 3712, 3712, 3712, 3712, 3712, 3712]);
    let experts = plan("qwen2-57b-a14b", 3, ShardOptions { expert_parallel: true, ..default });
    let shares: Vec<_> =
        experts.ranks().iter().map(|s| (s.experts.clone(), s.expert_columns.len())).collect();
    assert_eq!(shares, [(0..21, 2560), (21..42, 2560), (42..64, 2560)]);
    assert_eq!(experts.ranks()[0].mlp_columns(Mlp::Expert(21)), 0..0);
}

#[test]
fn what_cannot_be_dealt_is_refused() {
    let spec = family("qwen2-7b").unwrap().spec;
    let default = ShardOptions::default();
    for (world_size, options, expected) in [
        (0, default, "0 ranks"),
        (1025, default, "1025 ranks"),
        (2, ShardOptions { column_multiple: 0, ..default }, "multiples of 0"),
        (2, ShardOptions { quantisation_group: Some(0), ..default }, "multiples of 0"),
        (2, ShardOptions { expert_parallel: true, ..default }, "no experts"),
    ] {
        let error = ShardPlan::new(&spec, world_size, &options).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

fn any_spec() -> impl Strategy<Value = ModelSpec> {
    let moe = (1usize..40, 1usize..200, 0usize..300).prop_map(|(experts, columns, shared)| MoeSpec {
        experts,
        top_k: 1,
        intermediate_size: columns,
        shared_intermediate_size: shared,
        norm_topk_prob: false,
        sparse_layers: vec![true, false],
    });
    let shape = (1usize..10, 1usize..12, 1usize..5, 1usize..600, 1usize..700, any::<bool>(), any::<bool>());
    (shape, proptest::option::of(moe)).prop_map(|((kv, group, half, columns, vocab, bias, tied), moe)| {
        let mut spec = family("qwen2-0.5b").unwrap().spec;
        spec.layers = 2;
        (spec.kv_heads, spec.query_heads, spec.head_dim) = (kv, kv * group, 2 * half);
        (spec.hidden_size, spec.intermediate_size, spec.vocab_size) = (8, columns, vocab);
        (spec.qkv_bias, spec.tied_embeddings, spec.moe) = (bias, tied, moe);
        spec
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn any_model_over_any_ranks(
        spec in any_spec(),
        world_size in 1usize..40,
        column_multiple in 1usize..40,
        group in proptest::option::of(1usize..130),
        expert_parallel in any::<bool>(),
    ) {
        let expert_parallel = expert_parallel && spec.moe.is_some();
        check(&spec, world_size, &ShardOptions { expert_parallel, column_multiple, quantisation_group: group });
    }
}
