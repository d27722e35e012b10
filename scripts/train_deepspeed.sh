#!/usr/bin/env bash
# Trains with DeepSpeed's engine and launcher: on this machine, or on the nodes of a hostfile, with or without ssh.
#
#   scripts/train_deepspeed.sh configs/runs/pythia-160m-sep-n64.yaml parallel.zero_stage=3 [section.key=value ...]
#   HOSTFILE=hosts scripts/train_deepspeed.sh CONFIG ...                # on one node; it reaches the others by ssh and pdsh
#   HOSTFILE=hosts NODE_RANK=0 scripts/train_deepspeed.sh CONFIG ...    # on each node, with its line of the file; no ssh
#
# To edit, or to set in the environment:
#   HOSTFILE   a line a node: `node01 slots=8`, slots being its processes. Empty lines are passed over.
#   NODE_RANK  which line of HOSTFILE this node is, from 0
#   HEAD       a name or address of the first line's node that all reach; left out: as that line has it
#   PORT       a port that is free on it and open to the others
#   GPUS       processes of this machine, without a hostfile; left out: one a GPU
set -euo pipefail

where=(--master_port "${PORT:-29500}")
if [[ -n ${HOSTFILE:-} ]]; then
    where+=(--hostfile "$HOSTFILE")
    [[ -z ${NODE_RANK:-} ]] ||
        where+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${HEAD:-$(awk 'NF { print $1; exit }' "$HOSTFILE")}")
elif [[ -n ${GPUS:-} ]]; then
    where+=(--num_gpus "$GPUS")
fi
exec python -m deepspeed.launcher.runner "${where[@]}" --no_local_rank \
    --module megatron_sep train "${1:?the YAML of a run}" parallel.engine=deepspeed "${@:2}"
