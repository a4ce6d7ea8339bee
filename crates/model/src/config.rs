//! `config.json` in both layouts: published (top-level `rope_theta`, `rope_scaling`, `torch_dtype`) and transformers 5
//! (`rope_parameters`, `dtype`, `layer_types`).

use longhaul_backend::DType;
use serde_json::{Map, Value};

use crate::fields::Fields;
use crate::spec::{Architecture, DualChunkConfig, ModelSpec, MoeSpec, YarnConfig};
use crate::{ModelError, Result};

/// Bounds that keep every product in the arithmetic within u64; far above any member of the family.
const MAX_LAYERS: usize = 1 << 12;
const MAX_WIDTH: usize = 1 << 20;
const MAX_VOCAB: usize = 1 << 24;
const MAX_CONTEXT: usize = 1 << 27;
/// Experts of all layers together: bounds the list of tensors.
const MAX_EXPERTS: usize = 1 << 18;
/// What transformers takes when the field is missing.
const DEFAULT_MAX_WINDOW_LAYERS: usize = 28;

impl ModelSpec {
    /// Reads a `config.json`; `origin` names it in errors.
    ///
    /// # Errors
    /// [`ModelError::Json`] when it is no JSON object, [`ModelError::Field`] for any value that is missing, odd, or asks
    /// for something that is not implemented.
    pub fn from_config(json: &[u8], origin: &str) -> Result<ModelSpec> {
        let json_error = |message: String| ModelError::Json { origin: origin.into(), message };
        let value: Value =
            serde_json::from_slice(json).map_err(|e| json_error(format!("is not valid JSON: {e}")))?;
        let map = value.as_object().ok_or_else(|| json_error("must be a JSON object".into()))?;
        let fields = Fields::new(origin, "", map);

        let architecture = architecture(&fields)?;
        refuse_unsupported(&fields)?;

        let vocab_size = fields.required_integer("vocab_size", 1..=MAX_VOCAB)?;
        let hidden_size = fields.required_integer("hidden_size", 1..=MAX_WIDTH)?;
        let layers = fields.required_integer("num_hidden_layers", 1..=MAX_LAYERS)?;
        let query_heads = fields.required_integer("num_attention_heads", 1..=MAX_WIDTH)?;
        let kv_heads = fields.integer("num_key_value_heads", 1..=MAX_WIDTH)?.unwrap_or(query_heads);
        if query_heads % kv_heads != 0 {
            return Err(fields.error(
                "num_key_value_heads",
                format!("{kv_heads} does not divide num_attention_heads {query_heads}"),
            ));
        }
        let head_dim = match fields.integer("head_dim", 2..=4096)? {
            Some(head_dim) => head_dim,
            None if hidden_size % query_heads == 0 => hidden_size / query_heads,
            None => {
                return Err(fields.error(
                    "num_attention_heads",
                    format!(
                        "{query_heads} does not divide hidden_size {hidden_size}, and head_dim is not given"
                    ),
                ));
            }
        };
        if head_dim % 2 != 0 {
            return Err(fields.error("head_dim", format!("must be even for rotary embedding, is {head_dim}")));
        }
        let max_position_embeddings = fields.required_integer("max_position_embeddings", 1..=MAX_CONTEXT)?;
        let rope = rope(&fields, origin, max_position_embeddings)?;
        Ok(ModelSpec {
            architecture,
            vocab_size,
            hidden_size,
            intermediate_size: fields.required_integer("intermediate_size", 1..=MAX_WIDTH)?,
            layers,
            query_heads,
            kv_heads,
            head_dim,
            qkv_bias: fields.boolean("qkv_bias")?.unwrap_or(true),
            tied_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
            rms_norm_eps: fields
                .number("rms_norm_eps", "a number above 0 and below 0.1", |v| v > 0.0 && v < 0.1)?
                .unwrap_or(1e-6),
            rope_theta: rope.theta,
            max_position_embeddings,
            yarn: rope.yarn,
            dual_chunk: dual_chunk(&fields, origin)?,
            sliding_window: sliding_window(&fields, layers, max_position_embeddings)?,
            moe: if architecture == Architecture::Moe { Some(moe(&fields, layers)?) } else { None },
            dtype: dtype(&fields)?,
            bos_token_id: fields.token_ids("bos_token_id", vocab_size)?.first().copied(),
            eos_token_ids: fields.token_ids("eos_token_id", vocab_size)?,
        })
    }
}

fn architecture(fields: &Fields) -> Result<Architecture> {
    const SUPPORTED: &str = "Qwen2ForCausalLM and Qwen2MoeForCausalLM are";
    let both = [Architecture::Dense, Architecture::Moe];
    let by_type = match fields.string("model_type")? {
        None => None,
        Some(name) => Some(both.into_iter().find(|a| a.model_type() == name).ok_or_else(|| {
            fields.error("model_type", format!("\"{name}\" is not supported; qwen2 and qwen2_moe are"))
        })?),
    };
    let by_name = match fields.array("architectures")?.map(Vec::as_slice) {
        None | Some([]) => None,
        Some([Value::String(name)]) => {
            Some(both.into_iter().find(|a| a.name() == name).ok_or_else(|| {
                fields.error("architectures", format!("\"{name}\" is not supported; {SUPPORTED}"))
            })?)
        }
        Some(_) => {
            return Err(fields.error("architectures", format!("must name one architecture; {SUPPORTED}")));
        }
    };
    match (by_name, by_type) {
        (Some(a), Some(b)) if a != b => Err(fields.error(
            "model_type",
            format!("\"{}\" contradicts architectures [\"{}\"]", b.model_type(), a.name()),
        )),
        (Some(a), _) | (None, Some(a)) => Ok(a),
        (None, None) => Err(fields.error("architectures", format!("is missing; {SUPPORTED} supported"))),
    }
}

/// Fields that would change the result in a way that is not implemented.
fn refuse_unsupported(fields: &Fields) -> Result<()> {
    if let Some(act) = fields.string("hidden_act")?
        && act != "silu"
    {
        return Err(fields.error("hidden_act", format!("\"{act}\" is not supported; silu is")));
    }
    if fields.get("quantization_config").is_some() {
        return Err(fields.error(
            "quantization_config",
            "quantised checkpoints are not supported yet; use the bfloat16 checkpoint of this model",
        ));
    }
    for field in ["attention_bias", "mlp_bias"] {
        // Qwen2 has neither key: q, k, v carry biases, nothing else does.
        if let Some(value) = fields.boolean(field)? {
            return Err(fields.error(field, format!("{value}: Qwen2 checkpoints do not choose their biases")));
        }
    }
    if let Some(factor) = fields.number("partial_rotary_factor", "a number", |_| true)?
        && factor != 1.0
    {
        return Err(fields.error("partial_rotary_factor", format!("{factor} is not supported; 1 is")));
    }
    if fields.get("auto_map").is_some() {
        return Err(fields.error("auto_map", "asks for code from the checkpoint; it is never run"));
    }
    Ok(())
}

fn dtype(fields: &Fields) -> Result<Option<DType>> {
    let read = |field| -> Result<Option<DType>> {
        match fields.string(field)? {
            None => Ok(None),
            Some("bfloat16") => Ok(Some(DType::BF16)),
            Some("float16") => Ok(Some(DType::F16)),
            Some("float32") => Ok(Some(DType::F32)),
            Some(other) => Err(fields
                .error(field, format!("\"{other}\" is not supported; bfloat16, float16 and float32 are"))),
        }
    };
    match (read("torch_dtype")?, read("dtype")?) {
        (Some(a), Some(b)) if a != b => {
            Err(fields.error("dtype", format!("{b} contradicts torch_dtype {a}; remove one of them")))
        }
        (a, b) => Ok(a.or(b)),
    }
}

/// The window, if a layer uses one and it does not cover `max_position_embeddings`, is refused: it would change results.
fn sliding_window(fields: &Fields, layers: usize, context: usize) -> Result<Option<usize>> {
    let window = fields.integer("sliding_window", 1..=MAX_CONTEXT)?;
    let used = fields.boolean("use_sliding_window")?.unwrap_or(false);
    let first_windowed =
        fields.integer("max_window_layers", 0..=MAX_LAYERS)?.unwrap_or(DEFAULT_MAX_WINDOW_LAYERS);
    let mut windowed_layer = (used && first_windowed < layers).then_some(first_windowed);
    if let Some(types) = fields.array("layer_types")? {
        if types.len() != layers {
            return Err(fields.error(
                "layer_types",
                format!("has {} entries for num_hidden_layers {layers}", types.len()),
            ));
        }
        for (layer, kind) in types.iter().enumerate() {
            match kind.as_str() {
                Some("full_attention") => {}
                Some("sliding_attention") => windowed_layer = windowed_layer.or(Some(layer)),
                _ => {
                    return Err(fields.error(
                        "layer_types",
                        format!("entry {layer} is {kind}; full_attention and sliding_attention are known"),
                    ));
                }
            }
        }
    }
    match (windowed_layer, window) {
        (None, _) => Ok(None),
        (Some(layer), None) => {
            Err(fields.error("sliding_window", format!("is missing, but layer {layer} uses a sliding window")))
        }
        (Some(_), Some(window)) if window >= context => Ok(Some(window)),
        (Some(layer), Some(window)) => Err(fields.error(
            "sliding_window",
            format!(
                "{window} would cut the attention of layer {layer} and later within max_position_embeddings \
                 {context}; sliding windows are not supported (set use_sliding_window to false if the checkpoint \
                 was trained without)"
            ),
        )),
    }
}

struct Rope {
    theta: f64,
    yarn: Option<YarnConfig>,
}

fn rope(fields: &Fields, origin: &str, context: usize) -> Result<Rope> {
    let positive = |v: f64| v > 0.0;
    let top_theta = fields.number("rope_theta", "a number above 1", |v| v > 1.0)?;
    let (name, scaling) = match (fields.object("rope_parameters")?, fields.object("rope_scaling")?) {
        (Some(_), Some(_)) => {
            return Err(fields.error("rope_scaling", "is given beside rope_parameters; remove one of them"));
        }
        (Some(map), None) => ("rope_parameters.", Some(map)),
        (None, map) => ("rope_scaling.", map),
    };
    let empty = Map::new();
    let scaling = Fields::new(origin, name, scaling.unwrap_or(&empty));
    let inner_theta = scaling.number("rope_theta", "a number above 1", |v| v > 1.0)?;
    let theta = match (top_theta, inner_theta) {
        (Some(a), Some(b)) if a != b => {
            return Err(scaling.error("rope_theta", format!("{b} contradicts the top-level rope_theta {a}")));
        }
        (a, b) => a.or(b).unwrap_or(10_000.0),
    };
    let kind = match (scaling.string("rope_type")?, scaling.string("type")?) {
        (Some(a), Some(b)) if a != b => {
            return Err(scaling.error("type", format!("\"{b}\" contradicts rope_type \"{a}\"")));
        }
        (a, b) => a.or(b),
    };
    let kind = match kind {
        Some(kind) => kind,
        None if scaling.keys().all(|k| k == "rope_theta") => "default",
        None => return Err(scaling.error("rope_type", "is missing; default and yarn are supported")),
    };
    match kind {
        "default" => Ok(Rope { theta, yarn: None }),
        "yarn" => {
            let factor = scaling
                .number("factor", "a number of at least 1", |v| v >= 1.0)?
                .ok_or_else(|| scaling.error("factor", "is missing"))?;
            let original =
                scaling.integer("original_max_position_embeddings", 1..=MAX_CONTEXT)?.unwrap_or(context);
            let beta_fast = scaling.number("beta_fast", "a number above 0", positive)?.unwrap_or(32.0);
            let beta_slow = scaling.number("beta_slow", "a number above 0", positive)?.unwrap_or(1.0);
            if beta_fast < beta_slow {
                return Err(scaling.error("beta_fast", format!("{beta_fast} is below beta_slow {beta_slow}")));
            }
            let mscale = scaling.number("mscale", "a number", |_| true)?;
            let mscale_all_dim = scaling.number("mscale_all_dim", "a number", |_| true)?;
            let given = scaling.number("attention_factor", "a number above 0", positive)?;
            let attention_factor =
                given.unwrap_or_else(|| crate::rope::yarn_attention_factor(factor, mscale, mscale_all_dim));
            Ok(Rope {
                theta,
                yarn: Some(YarnConfig {
                    factor,
                    original_max_position_embeddings: original,
                    beta_fast,
                    beta_slow,
                    truncate: scaling.boolean("truncate")?.unwrap_or(true),
                    attention_factor,
                }),
            })
        }
        other => {
            Err(scaling.error("rope_type", format!("\"{other}\" is not supported; default and yarn are")))
        }
    }
}

fn dual_chunk(fields: &Fields, origin: &str) -> Result<Option<DualChunkConfig>> {
    let Some(map) = fields.object("dual_chunk_attention_config")? else { return Ok(None) };
    let fields = Fields::new(origin, "dual_chunk_attention_config.", map);
    // Defaults of the published implementation.
    let chunk_size = fields.integer("chunk_size", 1..=MAX_CONTEXT)?.unwrap_or(8192);
    let local_size = fields.integer("local_size", 0..=MAX_CONTEXT)?.unwrap_or(1024);
    if local_size >= chunk_size {
        return Err(fields.error("local_size", format!("{local_size} must be below chunk_size {chunk_size}")));
    }
    let original = fields.integer("original_max_position_embeddings", 0..=MAX_CONTEXT)?.filter(|&o| o > 0);
    Ok(Some(DualChunkConfig { chunk_size, local_size, original_max_position_embeddings: original }))
}

fn moe(fields: &Fields, layers: usize) -> Result<MoeSpec> {
    let experts = fields.required_integer("num_experts", 0..=1 << 16)?;
    let top_k = fields.required_integer("num_experts_per_tok", 1..=1 << 16)?;
    if experts > 0 && top_k > experts {
        return Err(fields.error("num_experts_per_tok", format!("{top_k} exceeds num_experts {experts}")));
    }
    if experts * layers > MAX_EXPERTS {
        return Err(fields.error(
            "num_experts",
            format!("{experts} in each of {layers} layers are more than {MAX_EXPERTS}"),
        ));
    }
    let step = fields.integer("decoder_sparse_step", 1..=MAX_LAYERS)?.unwrap_or(1);
    let mut sparse_layers: Vec<bool> = (0..layers).map(|l| experts > 0 && (l + 1) % step == 0).collect();
    for entry in fields.array("mlp_only_layers")?.into_iter().flatten() {
        let layer = entry.as_u64().and_then(|l| sparse_layers.get_mut(l as usize));
        *layer.ok_or_else(|| {
            fields.error("mlp_only_layers", format!("{entry} is not a layer index below {layers}"))
        })? = false;
    }
    Ok(MoeSpec {
        experts,
        top_k,
        intermediate_size: fields.required_integer("moe_intermediate_size", 1..=MAX_WIDTH)?,
        shared_intermediate_size: fields
            .required_integer("shared_expert_intermediate_size", 0..=MAX_WIDTH)?,
        norm_topk_prob: fields.boolean("norm_topk_prob")?.unwrap_or(false),
        sparse_layers,
    })
}

#[cfg(test)]
mod tests;
