# To source: work that is spread over the GPUs of a machine, a name and a GPU each.
# GPUS: how many at once; left out: one a GPU, one where there is none.
# shellcheck shell=bash
GPUS=${GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}

# shellcheck disable=SC2329  # what `on_gpus` starts calls it
own_device() {  # the id of the GPU that this process may use, of those that the caller may
    local devices
    IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 63)}"
    echo "${devices[$GPU]}"
}
export -f own_device

on_gpus() {  # FUNCTION ARGUMENT ...: `FUNCTION NAME ARGUMENT ...` for each line of the input; 124 where one returned 255
    local function=$1
    shift
    xargs -r -P "$GPUS" -I {} --process-slot-var=GPU bash -c '"$@"' on_gpus "$function" {} "$@"
}
