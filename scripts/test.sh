#!/usr/bin/env bash
# The gate, the same for a person and for CI: format, lint, types, imports, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev

ruff format --check .
ruff check .
mypy
lint-imports
OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadfile "$@"
