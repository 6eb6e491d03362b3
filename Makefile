.DEFAULT_GOAL := help
.PHONY: help demo test lint codegen clean

PYTHON ?= python3
BIN := .venv/bin
# Beside the one pinned in constraints.txt: the oldest supported one and the newest.
CODEGEN_VERSIONS := 3.6.0 3.9.0

help:  ## List the targets
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | column -t -s '|'

demo: .venv/.demo  ## Segment three pictures into demo-output/
	$(BIN)/fastdeeplab demo --out demo-output

test: .venv/.test  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: .venv/.test .venv/.lint  ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
# The package as it is installed: type checkers can't follow the mapping of kernels/ to fastdeeplab.kernels.
	rm -rf build/typed && mkdir -p build/typed
	cp -r fastdeeplab build/typed/fastdeeplab && cp -r kernels build/typed/fastdeeplab/kernels
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fastdeeplab

codegen: .venv/.test $(CODEGEN_VERSIONS:%=.venv-triton-%/.done)  ## Compile every kernel for every architecture, with each supported triton
	$(BIN)/python tests/codegen.py --thorough
	for version in $(CODEGEN_VERSIONS); do .venv-triton-$$version/bin/python tests/codegen.py --thorough || exit 1; done

clean:  ## Remove the virtual environment and everything built
	rm -rf .venv .venv-triton-* build *.egg-info demo-output runs

# One environment, and in it one stamp per extra of pyproject.toml.
.venv/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

.venv-triton-%/.done: pyproject.toml
	$(PYTHON) -m venv .venv-triton-$*
	.venv-triton-$*/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
	.venv-triton-$*/bin/python -m pip install --quiet --disable-pip-version-check triton==$*
	.venv-triton-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@
