"""Faults injected into runs, and what became of them: `python -m faults` from tests/, or scripts/faults.sh."""
