.PHONY: test full gpu quickstart

test:
	./scripts/test.sh

full:
	./scripts/test.sh --full

gpu:
	python -m pytest -m gpu -n 8

quickstart:
	./scripts/quickstart.sh
