.PHONY: test gpu quickstart

test:
	./scripts/test.sh

gpu:
	python -m pytest -m gpu -n 8

quickstart:
	./scripts/quickstart.sh
