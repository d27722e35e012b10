#!/usr/bin/env bash
# The gate, the same for a person and for CI: format, lint, types, imports, tests. Arguments go to pytest.
#
#   ./scripts/test.sh               200 random cases of a property, an eighth of the quickstart: twenty minutes on two cores
#   ./scripts/test.sh --full        every random case (2,000 of most properties), the whole quickstart, long proofs at length
#   ./scripts/test.sh tests/data    the tests of one room
#
# Each worker takes whole files, so that what a file's tests share is made once, and the longest files first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev

ruff format --check .
ruff check .
mypy
lint-imports
OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
