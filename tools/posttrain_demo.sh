#!/usr/bin/env bash
# Pretrains a vanilla 70m, switches it to SepLLM n=64 and to H/T, and draws the three curves.
#
#   tools/posttrain_demo.sh SHARD TOKENIZER [section.key=value ...]
#
# SHARD is a prefix that `megatron_sep prepare` wrote. Run again, it goes on where it stopped.
set -euo pipefail
shard=${1:?a shard: the path without .bin and .idx}
tokenizer=${2:?a tokenizer.json}
shift 2
out=${OUT:-runs/posttrain}
first=${FIRST:-1000} # steps of the vanilla model before the switch
more=${MORE:-100}    # and after it
run=configs/runs/posttrain-demo.yaml
shared=("data.path=$shard" "tokenizer.path=$tokenizer" "optimizer.decay_steps=$((first + more))" "checkpoint.every=$first" "$@")
start=("checkpoint.init_from=$out/vanilla" "checkpoint.init_step=$first" "train.steps=$((first + more))")

if [[ ! -d $out/vanilla/checkpoints/$(printf 'step-%08d' $((first + more))) ]]; then
    python -m megatron_sep train $run "${shared[@]}" "dir=$out/vanilla" "train.steps=$first"
    for kind in sep-n64 sep-n64-ht; do
        python -m megatron_sep train $run configs/attention/$kind.yaml "${shared[@]}" "${start[@]}" "dir=$out/$kind"
    done
    python -m megatron_sep train $run "${shared[@]}" "dir=$out/vanilla" "train.steps=$((first + more))"
fi
python -m megatron_sep plot "$out/vanilla" "$out/sep-n64" "$out/sep-n64-ht" --out "$out/loss.png"
