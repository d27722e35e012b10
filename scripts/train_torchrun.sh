#!/usr/bin/env bash
# Trains with torchrun: on this machine, or, with the same line on each of several, on all of them. No ssh is needed.
#
#   scripts/train_torchrun.sh configs/runs/pythia-160m-sep-n64.yaml [section.key=value ...]
#   NNODES=4 HEAD=node01 scripts/train_torchrun.sh CONFIG ...    # on each of the four, in any order
#
# To edit, or to set in the environment:
#   GPUS    processes of a node; left out: one a GPU, one where there is none
#   NNODES  nodes of the job
#   HEAD    the node that the others find each other at: one of them, by a name or address that all reach
#   PORT    a port that is free on HEAD and open to the others
#   JOB     a word that is the same on all nodes, and another one for another job on HEAD
# Where nodes have several networks, name the fast one: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=eth0
set -euo pipefail

NNODES=${NNODES:-1}
GPUS=${GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
meeting=(--standalone)
if [[ $NNODES != 1 ]]; then
    meeting=(--rdzv-backend c10d --rdzv-endpoint "${HEAD:?the node to meet at}:${PORT:-29400}" --rdzv-id "${JOB:-megatron_sep}")
fi
# How long a process that is told to end may take to save; torchrun's own 30 seconds are few for a large model.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
exec python -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$GPUS" "${meeting[@]}" \
    -m megatron_sep train "$@"
