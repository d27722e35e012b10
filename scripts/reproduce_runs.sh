#!/usr/bin/env bash
# Trains the runs that `megatron_sep reproduce` reads: Pythia-160m as vanilla, StreamingLLM, SepLLM and FixLLM on the same
# tokens in the same order, then vanilla's checkpoint on as SepLLM. A run has one GPU; there are as many at once as GPUs.
#
#   scripts/reproduce_runs.sh TOKENIZER.json TEXT [section.key=value ...]
#
# TEXT is a file, a folder or a glob of text (docs/data.md), 100 MB or more. All goes to runs/reproduce below the current
# directory. Run again, it goes on: what is done stays as it is, what was killed continues from its newest checkpoint.
# Needs an installed megatron_sep with the extras data and hf.
#
# To set in the environment:
#   GPUS   runs at once; left out: one a GPU, one where there is none
#   RUNS   names of files in configs/reproduce, in the order they start in; left out: all
set -euo pipefail
tokenizer=${1:?TOKENIZER.json} text=${2:?TEXT}
shift 2

here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
# shellcheck disable=SC1091  # is checked by itself
source "$here/gpus.sh"
configs=$here/../configs/reproduce
out=runs/reproduce
RUNS=${RUNS:-vanilla sep-n64 streaming-n64 sep-n64-ht sep-n128 sep-n64-h fixllm-n64
    vanilla-seed2 sep-n64-seed2 sep-n64-ht-seed2 streaming-n64-seed2 sep-n128-seed2 sep-n64-h-seed2 fixllm-n64-seed2
    posttrain-n64 posttrain-n128 posttrain-n64-larger-lr}

# shellcheck disable=SC2329  # on_gpus calls it
train_one() {  # NAME CONFIGS OUT [section.key=value ...]
    local name=$1 configs=$2 out=$3 status=0
    shift 3
    mkdir -p "$out/$name"
    echo "$name: begins; $out/$name/train.log"
    CUDA_VISIBLE_DEVICES=$(own_device) python -m megatron_sep train "$configs/$name.yaml" "$@" \
        >>"$out/$name/train.log" 2>&1 || status=$?
    echo "$name: $(tail -n 1 "$out/$name/train.log")"
    # Of a run that was told to stop, xargs hears 255 and starts no other.
    case $status in 75 | 130 | 143) return 255 ;; *) return "$status" ;; esac
}
export -f train_one

first=() second=()
for name in $RUNS; do
    [[ -f $configs/$name.yaml ]] || { echo "RUNS: $name: no $name.yaml in $configs" >&2; exit 2; }
    case $name in posttrain-*) second+=("$name") ;; *) first+=("$name") ;; esac
done

mkdir -p "$out"
[[ $tokenizer -ef $out/tokenizer.json ]] || cp "$tokenizer" "$out/tokenizer.json"
python -m megatron_sep prepare "$configs/prepare.yaml" "sources=[{paths: ['$text']}]"

status=0
printf '%s\n' "${first[@]}" | on_gpus train_one "$configs" "$out" "$@" || status=$?
[[ $status != 124 ]] || exit 75  # told to stop
printf '%s\n' "${second[@]}" | on_gpus train_one "$configs" "$out" "$@" || status=$?
exit "$status"
