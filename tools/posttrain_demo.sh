#!/usr/bin/env bash
# Post-training in one go: Pythia-70m's shape from scratch with full attention, and from two thirds of the way on also as
# SepLLM n=64 and n=64 H/T, on the same cosine and the same data. Some minutes on one H100 or H200.
#
#   ./tools/posttrain_demo.sh TOKENIZER.json SHARD OUT
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tokenizer=$1 shard=$2 out=$3

common=(tokenizer.path="$tokenizer" data.path="$shard" "data.split=[0.97,0.03,0]" train.steps=1200 metrics.every=5
    train.global_batch_size=32 train.micro_batch_size=32 train.eval_every=40 train.eval_batches=4 checkpoint.every=800)
sep=(attention.window=64 attention.sinks=3 attention.separators=default)
start=(checkpoint.init_from="$out/full/checkpoints/step-00000800" checkpoint.init_step=800)
train=(python3 -m megatron_sep train configs/runs/pythia-70m.yaml)

"${train[@]}" "${common[@]}" dir="$out/full"
"${train[@]}" "${common[@]}" "${sep[@]}" "${start[@]}" dir="$out/n64"
"${train[@]}" "${common[@]}" "${sep[@]}" "${start[@]}" "attention.full_layers=[0,-1]" dir="$out/n64-ht"
python3 -m megatron_sep plot "$out/full" "$out/n64" "$out/n64-ht" --out "$out/loss.png"
