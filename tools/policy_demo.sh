#!/usr/bin/env bash
# Cache policies at an equal measured share, on two models of Pythia-70m's shape trained here from scratch: one with full
# attention, one as SepLLM n=64. Some minutes on one H100 or H200.
#
#   ./tools/policy_demo.sh TOKENIZER.json SHARD BOOKS OUT       BOOKS: a directory of *.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tokenizer=$1 shard=$2 books=$3 out=$4

train=(python3 -m megatron_sep train configs/runs/pythia-70m.yaml tokenizer.path="$tokenizer" data.path="$shard"
    "data.split=[0.97,0.03,0]" train.steps="${STEPS:-700}" train.global_batch_size=32 train.micro_batch_size=32
    train.eval_every=100 train.eval_batches=4 checkpoint.every="${STEPS:-700}" metrics.every=20)
"${train[@]}" dir="$out/full"
"${train[@]}" dir="$out/sep" attention.window=64 attention.sinks=3 attention.separators=default
python3 tools/compare_policies.py "$out/full" "$out/sep" --books "$books" --out "$out/table.json"
