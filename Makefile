.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

PYTHON ?= python3
BIN := .venv/bin

help:  ## List the targets
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | column -t -s '|'

demo: .venv/.demo  ## Segment three photographs into demo-output/
	$(BIN)/fastdeeplab demo --out demo-output

test: .venv/.test  ## Run the tests
	$(BIN)/python -m pytest

lint: .venv/.lint  ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
# The package as it is installed: type checkers can't follow the mapping of kernels/ to fastdeeplab.kernels.
	rm -rf build/typed && mkdir -p build/typed
	cp -r fastdeeplab build/typed/fastdeeplab && cp -r kernels build/typed/fastdeeplab/kernels
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fastdeeplab

clean:  ## Remove the virtual environment and everything built
	rm -rf .venv build *.egg-info demo-output

# One environment, and in it one stamp per extra of pyproject.toml.
.venv/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
