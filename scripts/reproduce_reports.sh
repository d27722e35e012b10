#!/usr/bin/env bash
# Measures the runs of reproduce_runs.sh, then writes to reports/ every table and figure that is made of runs.
#
#   scripts/reproduce_reports.sh BOOKS TASKS
#
# BOOKS is a folder of books as *.txt, four million tokens or more, as the test set of PG19; TASKS one of JSON lines, whose
# names and keys stand in configs/reproduce/tasks. Runs are those below runs/reproduce of the current directory, where what
# is measured goes too. Run again, it goes on: what is done stays as it is, unless the newest checkpoint of one of its runs is
# another one since. Then it is measured anew, and an older NAME.json of a run is there as NAME.json.older. Needs the extras
# hf, eval and plot.
#
# To set in the environment:
#   GPUS   measurements at once; left out: one a GPU, one where there is none
#   JOBS   names of measurements, in the order they start in; left out: all, and the reports of runs behind them
set -euo pipefail
books=${1:?BOOKS} tasks=${2:?TASKS}

here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
# shellcheck disable=SC1091  # is checked by itself
source "$here/gpus.sh"
out=runs/reproduce
for folder in "$books" "$tasks"; do [[ -d $folder ]] || { echo "$folder: no such folder" >&2; exit 2; }; done
[[ -d $out ]] || { echo "$out: no such folder; scripts/reproduce_runs.sh makes the runs in it" >&2; exit 2; }

# shellcheck disable=SC2329  # measure_one calls it
seals() {  # RUN ...: each with the sum of its newest checkpoint, where it has one
    local run files
    for run; do
        files=("$run"/checkpoints/step-????????/manifest.sha256)
        [[ ! -e ${files[-1]} ]] || echo "$run $(<"${files[-1]}")"
    done
}
export -f seals

# shellcheck disable=SC2329  # measure_one calls it
set_aside() {  # RUN FILE: what `eval` has kept of other weights than the run's newest, complete or in parts
    local kept weights
    weights=$(seals "$1")
    for kept in "$2" "$2.parts"; do
        if [[ -e $kept ]] && ! grep -rqF "${weights##* }" "$kept"; then
            echo "$kept: is of other weights; moved to $kept.older"
            rm -rf "$kept.older"
            mv "$kept" "$kept.older"
        fi
    done
}
export -f set_aside

# shellcheck disable=SC2329  # on_gpus calls it
measure_one() {  # JOB HERE OUT BOOKS
    local job=$1 here=$2 out=$3 books=$4 run=$3/${1#*-} status=0
    local sep=(python -m megatron_sep)
    local names=lambada_openai_local,arc_easy_local,arc_challenge_local,piqa_local,logiqa_local
    local books_of=("$books"/*.txt) runs checkpoints=() command weights
    case $job in
        needle-* | tasks-* | policies-*) runs=("$run") ;;
        figure2) runs=("$out"/{vanilla,sep-n64,streaming-n64,sep-n64-ht}) ;;
        *) runs=("$out"/{vanilla,sep-n64}) ;;
    esac
    for run in "${runs[@]}"; do checkpoints+=(--checkpoint "$run"); done
    case $job in
        needle-*) command=("${sep[@]}" eval "$run" --needle "${books_of[0]}" --needle-keys 4 --needle-samples 20 --out "$run/needle.json") ;;
        tasks-*) command=("${sep[@]}" eval "$run" --tasks "$names" --task-dir "$here/../configs/reproduce/tasks" --fewshot 0
            --batch 32 --out "$run/tasks.json") ;;
        policies-*) command=(python "$here/../tools/compare_policies.py" "$run" --books "$books" --out "$run/policies.json") ;;
        table4) command=("${sep[@]}" reproduce table4 "${checkpoints[@]}" --text "$books" --tokens 4000000 --streams 256) ;;
        table5) command=("${sep[@]}" reproduce table5 "${checkpoints[@]}" --text "$books" --tokens 20000) ;;
        table[678]) command=("${sep[@]}" reproduce "$job" "${checkpoints[@]}" --text "$books" --tokens 160000 --streams 16) ;;
        table16) command=("${sep[@]}" reproduce table16 "${checkpoints[@]}" --text "$books" --tokens 131072) ;;
        figure2) command=("${sep[@]}" reproduce figure2 "${checkpoints[@]}") ;;
        maps) command=("${sep[@]}" reproduce figure12 figure13 figure14 "${checkpoints[@]}") ;;
        *) echo "JOBS: $job: no such measurement" >&2; return 255 ;;
    esac
    weights=$(seals "${runs[@]}")
    if [[ -e $out/measured/$job && $(<"$out/measured/$job") == "$weights" ]]; then
        echo "$job: is done"
        return 0
    fi
    case $job in needle-* | tasks-*) set_aside "$run" "$run/${job%%-*}.json" ;; esac
    echo "$job: begins; $out/measured/$job.log"
    CUDA_VISIBLE_DEVICES=$(own_device) "${command[@]}" >"$out/measured/$job.log" 2>&1 || status=$?
    if ((status)); then
        echo "$job: $(tail -n 1 "$out/measured/$job.log")"
        return 1
    fi
    echo "$weights" >"$out/measured/$job"
    echo "$job: done"
}
export -f measure_one

mkdir -p "$out/measured"
[[ $tasks -ef $out/tasks ]] || ln -sfnT "$(realpath -e "$tasks")" "$out/tasks"
all="table4 policies-vanilla policies-sep-n64 table5 table6 table7 table8 table16
    tasks-vanilla tasks-streaming-n64 tasks-sep-n64 tasks-sep-n128 tasks-sep-n64-h tasks-sep-n64-ht tasks-fixllm-n64
    needle-vanilla needle-streaming-n64 needle-sep-n64-ht figure2 maps"
# shellcheck disable=SC2086  # names, one a word
printf '%s\n' ${JOBS:-$all} | on_gpus measure_one "$here" "$out" "$books"
[[ -z ${JOBS:-} ]] || exit 0

python -m megatron_sep reproduce table1 table3 table11 table12 table13 figure3 figure4 figure7 --runs "$out" >/dev/null
exec python -m megatron_sep reproduce table2 table9 table10 table15 table17 figure1 figure5 figure6 figure8 figure9 --runs "$out"
