#!/usr/bin/env bash
# Compare Longhaul with transformers and candle-transformers on this machine's CPU: see README.md.
set -euo pipefail
cd "$(dirname "$0")/.."

export THREADS="${THREADS:-2}" INPUT_LEN="${INPUT_LEN:-512}" OUTPUT_LEN="${OUTPUT_LEN:-64}" REPEATS="${REPEATS:-5}"

# The command under test; `--dtype` is appended, once float32 and once bfloat16.
LONGHAUL="${LONGHAUL:-target/release/longhaul bench latency --model qwen2-0.5b --load-format dummy --device cpu \
--input-len $INPUT_LEN --output-len $OUTPUT_LEN --runs $REPEATS --threads $THREADS --json}"
export LONGHAUL

if [[ ! -x benches/.venv/bin/python ]]; then
    python3 -m venv benches/.venv
    benches/.venv/bin/pip install --quiet -r benches/requirements.txt
fi
cargo build --release --locked
cargo build --release --locked --manifest-path benches/candle-qwen2/Cargo.toml

exec benches/.venv/bin/python benches/compare.py "$@"
