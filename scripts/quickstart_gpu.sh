#!/usr/bin/env bash
# From text of your own to a trained SepLLM of 160m, and what it gains over full attention: meant for ten minutes of a GPU.
#
#   ./scripts/quickstart_gpu.sh TOKENIZER TEXT [section.key=value ...]
#
# TOKENIZER: a tokenizer.json, as GPT-NeoX's. TEXT: a file or folder of .txt, .jsonl or .parquet, also .gz and .zst. 197
# million tokens are trained on, less text several times. Run again, it goes on. A smaller GPU: train.micro_batch_size=8.
set -euo pipefail
[[ $# -ge 2 ]] || { sed -n '4,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
tokenizer=$(realpath -e "$1")
text=$(realpath -e "$2")
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh data,hf,plot

run=${RUN:-runs/quickstart-gpu}
part() { echo "== $1 (after $SECONDS s)"; }
settings=("tokenizer.path=$tokenizer" "data.path=$run/corpus" data.order=samples 'data.split=[0.99,0.01,0]'
    train.precision=bf16 train.global_batch_size=64 train.micro_batch_size=16 train.steps=1500
    train.eval_every=250 checkpoint.every=500 optimizer.lr=1e-3 optimizer.min_lr=1e-4)

part "corpus"
mkdir -p "$run"
cat >"$run/prepare.yaml" <<EOT
output: $run/corpus
tokenizer: {path: "$tokenizer"}
sources: [{paths: ["$text"]}]
on_bad: skip
shuffle: true
EOT
python -m megatron_sep prepare "$run/prepare.yaml"
part "SepLLM n=64"
python -m megatron_sep train pythia-160m-sep-n64 "${settings[@]}" dir="$run" metrics.attention_mass_every=250 "$@"
part "full attention, for its speed alone"
python -m megatron_sep train pythia-160m "${settings[@]}" "$@" dir="$run/full" train.steps=60 train.eval_every=0 checkpoint.every=60
part "sample"
python -m megatron_sep generate "$run" --prompt "The" --max-tokens 120 | tee "$run/sample.txt"
python -m megatron_sep plot "$run" --figures "$run/figures" >/dev/null
part "gained"
python tools/gains.py "$run" "$run/full" --texts "${TEXTS:-64}" | tee "$run/gains.txt"
