//! Resident memory of a rank while it loads: its shard, and little more. A rank is a process here, so that the memory is
//! its own: this test program, started again for the test `loading_rank`.
#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::Command;

use longhaul_backend::DType;
use longhaul_cpu::{Cpu, Precision};
use longhaul_model::{Model, ModelSpec, PositionProfile, ShardOptions, ShardPlan, WeightFormat};
use longhaul_testkit::{TinyConfig, TinyMoe, write_dummy_checkpoint};
use longhaul_weights::Checkpoint;
use tempfile::TempDir;

const RANKS: usize = 4;
/// What the bound allows beyond the shard.
const MORE: f64 = 0.10;
/// What loading takes whatever the model's size: stacks of threads, the allocator's reserves, rotation tables, a read buffer.
const FIXED: u64 = 4 << 20;

/// The field of /proc/self/status, in bytes.
fn status(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<u64>().unwrap() << 10
}

fn plan(dir: &Path, expert_parallel: bool) -> (ModelSpec, ShardPlan) {
    let config = std::fs::read(dir.join("config.json")).unwrap();
    let spec = ModelSpec::from_config(&config, "config.json").unwrap();
    let options = ShardOptions { expert_parallel, ..ShardOptions::default() };
    let plan = ShardPlan::new(&spec, RANKS, &options).unwrap();
    (spec, plan)
}

/// A rank, when this program was started as one: prints by how much its memory grew at most, and in the end.
#[test]
fn loading_rank() {
    let Ok(dir) = std::env::var("TEST_CHECKPOINT") else { return };
    let dir = Path::new(&dir);
    let rank = std::env::var("TEST_RANK").unwrap().parse().unwrap();
    let (spec, plan) = plan(dir, std::env::var("TEST_EXPERT_PARALLEL").unwrap() == "true");
    let positions = PositionProfile::new(&spec, None, None).unwrap();
    let source = Checkpoint::open(dir, &spec.tensors(), &spec.ignorable_tensors()).unwrap();
    let cpu = Cpu::new(2, Precision::Bf16).unwrap();
    let before = status("VmRSS:");
    let model = Model::load_shard(cpu, &spec, &positions, (&plan, rank), &source, &mut |_, _| {}).unwrap();
    println!("grew {} {}", status("VmHWM:") - before, status("VmRSS:").saturating_sub(before));
    drop(model);
}

/// Loads every rank of `config` and compares its peak with its shard.
fn check(config: &TinyConfig, expert_parallel: bool) {
    let dir = TempDir::new().unwrap();
    let total = write_dummy_checkpoint(dir.path(), config);
    let (spec, plan) = plan(dir.path(), expert_parallel);
    for (rank, shard) in plan.ranks().iter().enumerate() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["loading_rank", "--exact", "--nocapture"])
            .env("TEST_CHECKPOINT", dir.path())
            .env("TEST_RANK", rank.to_string())
            .env("TEST_EXPERT_PARALLEL", expert_parallel.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let grew = text.lines().find_map(|line| line.split_once("grew ")).unwrap().1;
        let (peak, end) = grew.split_once(' ').unwrap();
        let (peak, end): (u64, u64) = (peak.parse().unwrap(), end.parse().unwrap());
        let dtype = spec.dtype.unwrap();
        let bytes = plan.weight_bytes(shard, WeightFormat::Float(dtype));
        println!(
            "{{\"checkpoint_bytes\": {total}, \"experts\": {}, \"expert_parallel\": {expert_parallel}, \
             \"rank\": {rank}, \"shard_bytes\": {bytes}, \"peak_bytes\": {peak}, \"end_bytes\": {end}, \
             \"peak_over_shard\": {:.4}}}",
            config.moe.as_ref().map_or(0, |moe| moe.experts),
            peak as f64 / bytes as f64
        );
        // The weights are there: nothing was left for later.
        assert!(peak >= bytes, "rank {rank}: {peak} bytes for a shard of {bytes}");
        let allowed = (bytes as f64 * (1.0 + MORE)) as u64 + FIXED;
        assert!(
            peak <= allowed,
            "rank {rank} took {peak} bytes for a shard of {bytes}; {allowed} are allowed"
        );
    }
}

/// Of the proportions of the family's smaller members, with an output head of its own: the largest tensors there are.
fn dense(vocab_size: usize, hidden_size: usize, layers: usize) -> TinyConfig {
    TinyConfig {
        vocab_size,
        hidden_size,
        intermediate_size: hidden_size * 6,
        num_hidden_layers: layers,
        num_attention_heads: hidden_size / 128,
        num_key_value_heads: 2,
        max_position_embeddings: 4096,
        tie_word_embeddings: false,
        dtype: DType::BF16,
        ..TinyConfig::dense()
    }
}

fn sparse(vocab_size: usize, hidden_size: usize, layers: usize, experts: usize) -> TinyConfig {
    let moe = TinyMoe {
        experts,
        experts_per_token: 4,
        intermediate_size: hidden_size * 11 / 16,
        shared_intermediate_size: hidden_size * 11 / 4,
        dense_layers: Vec::new(),
    };
    TinyConfig { moe: Some(moe), ..dense(vocab_size, hidden_size, layers) }
}

#[test]
fn a_loading_rank_takes_its_shard_and_little_more() {
    check(&dense(16_384, 512, 10), false);
    check(&sparse(16_384, 512, 2, 32), false);
    check(&sparse(16_384, 512, 2, 32), true);
}

#[test]
#[ignore = "nightly: writes checkpoints of 2 GB"]
fn a_loading_rank_of_a_2_gb_checkpoint_takes_its_shard_and_little_more() {
    check(&dense(151_936, 1536, 12), false);
    check(&sparse(100_000, 2048, 1, 60), false);
    check(&sparse(100_000, 2048, 1, 60), true);
}
