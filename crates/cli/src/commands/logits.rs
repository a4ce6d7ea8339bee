use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use longhaul_engine::{EngineError, Loader, Precision};
use serde_json::json;

use crate::args::LogitsArgs;
use crate::output;
use crate::progress;

/// The model to load.
pub fn loader(args: &LogitsArgs) -> Result<Loader, EngineError> {
    args.model.loader(Precision::Auto)
}

/// `longhaul logits`
pub fn run(args: &LogitsArgs) -> Result<ExitCode> {
    let ids = super::read_ids(&args.ids_file)?;
    let mut engine = progress::load(&loader(args)?)?;
    let vocab = engine.spec().vocab_size;
    let start = Instant::now();
    let mut file = LogitsFile::create(&args.out, ids.len(), vocab)
        .with_context(|| format!("cannot write {}", args.out.display()))?;
    engine.logits(&ids, args.chunk, &mut |rows| {
        file.write(rows)
            .map_err(|e| EngineError::File { path: args.out.display().to_string(), message: e.to_string() })
    })?;
    file.commit().with_context(|| format!("cannot write {}", args.out.display()))?;
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        output::json(&json!({ "tokens": ids.len(), "vocab": vocab, "seconds": seconds }))?;
    } else {
        eprintln!("{}: logits [{}, {vocab}] in {seconds:.2} s", args.out.display(), ids.len());
    }
    Ok(ExitCode::SUCCESS)
}

/// A safetensors file with one f32 tensor, written row by row beside its final name, so that an interrupted run leaves
/// nothing that looks like a result.
struct LogitsFile {
    path: PathBuf,
    partial: PathBuf,
    out: BufWriter<File>,
}

impl LogitsFile {
    fn create(path: &Path, tokens: usize, vocab: usize) -> io::Result<Self> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let partial = path.with_file_name(name);
        let bytes = tokens as u64 * vocab as u64 * 4;
        let header =
            json!({ "logits": { "dtype": "F32", "shape": [tokens, vocab], "data_offsets": [0, bytes] } });
        let mut header = header.to_string();
        // The data begins 8-byte aligned.
        while !header.len().is_multiple_of(8) {
            header.push(' ');
        }
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&partial)?);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        Ok(Self { path: path.into(), partial, out })
    }

    fn write(&mut self, values: &[f32]) -> io::Result<()> {
        for value in values {
            self.out.write_all(&value.to_le_bytes())?;
        }
        Ok(())
    }

    fn commit(mut self) -> io::Result<()> {
        self.out.flush()?;
        std::fs::rename(&self.partial, &self.path)
    }
}

impl Drop for LogitsFile {
    fn drop(&mut self) {
        // Gone already after `commit`.
        let _ = std::fs::remove_file(&self.partial);
    }
}
