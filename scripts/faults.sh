#!/usr/bin/env bash
# Injects faults into small runs and says what became of them: kills, damage, full disks, dead peers, bad input.
#
#   ./scripts/faults.sh                 some 200 trials; docs/reliability.md gets their table where no full run stands there
#   ./scripts/faults.sh --full          all trials, some 2,000; docs/reliability.md gets their table
#   ./scripts/faults.sh --only F1,F4    these faults alone, and no table; with --full, their rows of a full run anew
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev

OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONPATH="$PWD:$PWD/tests" exec python -W ignore -m faults --page docs/reliability.md "$@"
