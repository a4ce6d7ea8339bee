use std::ops::Range;
use std::process::ExitCode;

use anyhow::Result;
use longhaul_backend::DType;
use longhaul_bench::plan::{FormatReport, PlanConfig, PlanReport, RankReport, plan};
use longhaul_engine::{Loader, ModelRef};
use longhaul_model::roofline::{Link, Roofline};
use longhaul_model::{ModelSpec, WeightFormat, family};
use serde_json::json;

use crate::args::{KvDType, PlanArgs, PlanDType};
use crate::output::{self, bytes, grouped, table};

/// `longhaul plan`
pub fn run(args: &PlanArgs) -> Result<ExitCode> {
    let (name, spec, context) = model(args)?;
    let config = config(args, args.max_model_len.unwrap_or(context));
    let reports = args.gpus.clone().map(|gpus| plan(&spec, gpus, &config)).collect::<Result<Vec<_>, _>>()?;
    if args.json {
        output::json(&json!({
            "model": name,
            "parameters": spec.parameters(),
            "weight_bytes": spec.weight_bytes_as(config.format),
            "dtype": config.format.to_string(),
            "kv_cache_dtype": kv_name(args.kv_cache_dtype),
            "gpu_memory": args.gpu_memory,
            "usable_memory": config.usable_memory,
            "max_model_len": config.max_model_len,
            "expert_parallel": config.expert_parallel,
            "batch": config.batch,
            "context": config.context,
            "chunk": config.chunk,
            "plans": reports,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(&format!(
        "{name}: {} parameters, {} weights, {} KV cache, {} of each GPU's {} to use",
        grouped(spec.parameters()),
        config.format,
        kv_name(args.kv_cache_dtype),
        bytes(config.usable_memory),
        bytes(args.gpu_memory)
    ))?;
    output::line("")?;
    match reports.as_slice() {
        [report] => one(report, &config)?,
        reports => many(reports, &config)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Name, shape and context of the model.
fn model(args: &PlanArgs) -> Result<(String, ModelSpec, usize)> {
    let model = ModelRef::parse(&args.model)?;
    if let ModelRef::Family(name) = &model
        && let Some(member) = family(name)
    {
        return Ok((member.name.into(), member.spec, member.published_context));
    }
    let files = Loader { offline: args.offline, ..Loader::new(model) }.files()?;
    let context = files.spec.max_position_embeddings;
    Ok((files.name, files.spec, context))
}

fn config(args: &PlanArgs, max_model_len: usize) -> PlanConfig {
    let link = match (args.link_latency, args.link_bandwidth) {
        (Some(latency), Some(bandwidth)) => {
            Link::Given { latency: latency * 1e-6, bandwidth: bandwidth * 1e9 }
        }
        _ => Link::NvLink,
    };
    PlanConfig {
        format: match args.dtype {
            PlanDType::Bfloat16 => WeightFormat::Float(DType::BF16),
            PlanDType::Fp8 => WeightFormat::Fp8,
            PlanDType::Int4 => WeightFormat::Int4,
        },
        kv_element_bytes: match args.kv_cache_dtype {
            KvDType::Bfloat16 => 2,
            KvDType::Fp8 => 1,
        },
        expert_parallel: args.expert_parallel,
        usable_memory: (args.gpu_memory as f64 * args.gpu_memory_utilization) as u64,
        max_model_len,
        batch: args.batch,
        context: args.context,
        chunk: args.chunk,
        roofline: Roofline {
            bandwidth: args.gpu_bandwidth * 1e12,
            flops: args.gpu_tflops * 1e12,
            fp8_flops: args.gpu_fp8_tflops * 1e12,
            link,
        },
    }
}

fn kv_name(dtype: KvDType) -> &'static str {
    match dtype {
        KvDType::Bfloat16 => "bfloat16",
        KvDType::Fp8 => "fp8",
    }
}

/// The shards of one number of GPUs.
fn one(report: &PlanReport, config: &PlanConfig) -> Result<()> {
    shards(report)?;
    output::line(&format!(
        "\nheld together {} parameters, {} of them replicated: {} in the model",
        grouped(report.parameters + report.replicated_parameters),
        grouped(report.replicated_parameters),
        grouped(report.parameters)
    ))?;
    output::line(&format!(
        "largest share over the mean: {:.3} of the weights, {:.3} of the query heads\n",
        report.imbalance, report.head_imbalance
    ))?;

    let mut lines = vec![["weights", "a GPU", "KV tokens", "longest sequence"].map(String::from).to_vec()];
    for format in &report.formats {
        let wanted = grouped(config.max_model_len as u64);
        let verdict = if !format.fits {
            "does not fit".into()
        } else if format.context < config.max_model_len as u64 {
            format!("{} of {wanted}", grouped(format.context))
        } else {
            format!("{wanted}, fits")
        };
        lines.push(vec![
            format.dtype.clone(),
            bytes(format.weight_bytes),
            if format.fits { grouped(format.kv_tokens) } else { "-".into() },
            verdict,
        ]);
    }
    table(&lines)?;

    output::line("")?;
    if report.all_reduces > 0 {
        output::line(&format!(
            "all-reduce: {} a step, {} in a decode step of {}, {} in a prompt chunk of {}",
            report.all_reduces,
            bytes(report.decode_all_reduce_bytes),
            config.batch,
            bytes(report.prefill_all_reduce_bytes),
            grouped(config.chunk as u64)
        ))?;
    }
    output::line(&format!(
        "at best: {} tok/s decoding {} of {} tokens, {} tok/s reading a prompt of {}",
        speed(report.decode_tokens_per_second),
        config.batch,
        grouped(config.context as u64),
        speed(report.prefill_tokens_per_second),
        grouped(config.chunk as u64)
    ))?;
    Ok(())
}

/// One of a rank's ranges.
type PartOf = fn(&RankReport) -> &Range<usize>;

/// A line a rank; columns that no rank has are left out.
fn shards(report: &PlanReport) -> Result<()> {
    type Column<'a> = (&'a str, Box<dyn Fn(usize) -> String + 'a>);
    let ranks = &report.ranks;
    let mut columns: Vec<Column> = vec![("rank", Box::new(|r| ranks[r].rank.to_string()))];
    let parts: [(&str, PartOf); 7] = [
        ("query heads", |r| &r.query_heads),
        ("KV heads", |r| &r.kv_heads),
        ("columns", |r| &r.columns),
        ("shared columns", |r| &r.shared_columns),
        ("experts", |r| &r.experts),
        ("expert columns", |r| &r.expert_columns),
        ("vocabulary", |r| &r.vocabulary),
    ];
    for (name, part) in parts {
        if ranks.iter().any(|r| !part(r).is_empty()) {
            columns.push((name, Box::new(move |r| range(part(&ranks[r])))));
        }
    }
    columns.push(("parameters", Box::new(|r| grouped(ranks[r].parameters))));
    columns.push(("weights", Box::new(|r| bytes(ranks[r].weight_bytes))));
    columns.push(("KV bytes/token", Box::new(|r| grouped(ranks[r].kv_bytes_per_token))));
    columns.push(("KV tokens", Box::new(|r| ranks[r].kv_tokens.map_or("any".into(), grouped))));
    let mut lines = vec![columns.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>()];
    lines.extend((0..ranks.len()).map(|r| columns.iter().map(|(_, cell)| cell(r)).collect()));
    Ok(table(&lines)?)
}

/// A line for every number of GPUs.
fn many(reports: &[PlanReport], config: &PlanConfig) -> Result<()> {
    let mut head =
        ["GPUs", "query heads", "KV heads", "weights a GPU", "largest/mean"].map(String::from).to_vec();
    let dtypes = reports.first().map_or(&[][..], |r| &r.formats);
    head.extend(dtypes.iter().map(|f| format!("KV tokens {}", f.dtype)));
    head.extend(["all-reduce/step", "decode tok/s", "prefill tok/s"].map(String::from));
    let mut lines = vec![head];
    for report in reports {
        let most = |part: fn(&RankReport) -> &Range<usize>| {
            let lengths = || report.ranks.iter().map(|r| part(r).len());
            match (lengths().max().unwrap_or(0), lengths().min().unwrap_or(0)) {
                (most, least) if most == least => most.to_string(),
                (most, least) => format!("{most}-{least}"),
            }
        };
        let mut line = vec![
            report.gpus.to_string(),
            most(|r| &r.query_heads),
            most(|r| &r.kv_heads),
            bytes(report.ranks.iter().map(|r| r.weight_bytes).max().unwrap_or(0)),
            format!("{:.3}", report.imbalance),
        ];
        let tokens = |f: &FormatReport| {
            if f.fits { grouped(f.kv_tokens) } else { "does not fit".into() }
        };
        line.extend(report.formats.iter().map(tokens));
        line.push(bytes(report.decode_all_reduce_bytes));
        line.push(speed(report.decode_tokens_per_second));
        line.push(speed(report.prefill_tokens_per_second));
        lines.push(line);
    }
    table(&lines)?;
    output::line(&format!(
        "\nat best, {}: decoding {} of {} tokens, reading a prompt of {}; heads are the most and the least a GPU has",
        config.format,
        config.batch,
        grouped(config.context as u64),
        grouped(config.chunk as u64)
    ))?;
    Ok(())
}

fn range(range: &Range<usize>) -> String {
    if range.is_empty() { "-".into() } else { format!("{}..{}", range.start, range.end) }
}

/// Tokens a second: whole ones where there are many.
fn speed(tokens: f64) -> String {
    if tokens < 100.0 { format!("{tokens:.1}") } else { grouped(tokens.round() as u64) }
}
