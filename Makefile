.PHONY: test gpu quickstart

test:
	./scripts/test.sh

gpu:
	python -m pytest -m gpu

quickstart:
	./scripts/quickstart.sh
