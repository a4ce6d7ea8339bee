use std::process::ExitCode;

use anyhow::Result;
use longhaul_backend::DType;
use longhaul_engine::{Loader, ModelRef};
use longhaul_model::{ModelSpec, family, family_names};
use serde_json::{Value, json};

use crate::args::ModelsArgs;
use crate::output::{self, bytes, grouped};

struct Row {
    name: String,
    context: usize,
    spec: ModelSpec,
}

/// `longhaul models`
pub fn run(args: &ModelsArgs) -> Result<ExitCode> {
    let rows = match &args.model {
        None => family_names().filter_map(family).map(member).collect(),
        Some(name) => match ModelRef::parse(name)? {
            ModelRef::Family(name) => family(&name).map(member).into_iter().collect(),
            model => {
                let files = Loader { offline: args.offline, ..Loader::new(model) }.files()?;
                vec![Row { name: files.name, context: files.spec.max_position_embeddings, spec: files.spec }]
            }
        },
    };
    if args.json {
        output::json(&rows.iter().map(to_json).collect::<Vec<_>>())?;
    } else {
        table(&rows)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn member(family: longhaul_model::Family) -> Row {
    Row { name: family.name.into(), context: family.published_context, spec: family.spec }
}

fn to_json(row: &Row) -> Value {
    let s = &row.spec;
    json!({
        "name": row.name,
        "architecture": s.architecture.name(),
        "parameters": s.parameters(),
        "non_embedding_parameters": s.non_embedding_parameters(),
        "active_parameters": s.active_parameters(),
        "weight_bytes_bfloat16": s.weight_bytes(DType::BF16),
        "kv_bytes_per_token_bfloat16": s.kv_bytes_per_token(DType::BF16),
        "flops_per_token": s.flops_per_token(0, true),
        "context": row.context,
        "layers": s.layers,
        "hidden_size": s.hidden_size,
        "query_heads": s.query_heads,
        "kv_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "tied_embeddings": s.tied_embeddings,
        "experts": s.moe.as_ref().map_or(0, |m| m.experts),
        "experts_per_token": s.moe.as_ref().map_or(0, |m| m.top_k),
    })
}

fn table(rows: &[Row]) -> Result<()> {
    let head = [
        "model",
        "parameters",
        "non-embedding",
        "active",
        "bf16 weights",
        "KV bytes/token",
        "KV at context",
        "context",
        "heads q/kv",
        "head_dim",
        "tied",
    ];
    let mut lines = vec![head.map(String::from).to_vec()];
    for row in rows {
        let s = &row.spec;
        let kv = s.kv_bytes_per_token(DType::BF16);
        lines.push(vec![
            row.name.clone(),
            grouped(s.parameters()),
            grouped(s.non_embedding_parameters()),
            grouped(s.active_parameters()),
            bytes(s.weight_bytes(DType::BF16)),
            grouped(kv),
            bytes(kv * row.context as u64),
            grouped(row.context as u64),
            format!("{}/{}", s.query_heads, s.kv_heads),
            s.head_dim.to_string(),
            if s.tied_embeddings { "yes" } else { "no" }.into(),
        ]);
    }
    Ok(output::table(&lines)?)
}
