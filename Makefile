# `make sweep` and `make test` do all the set-up they need; only Python 3.11+ and make are taken for granted.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= out/demo

.PHONY: sweep test lint clean

sweep: $(READY)
	$(BIN)/fqsweep run search_spaces/demo.yaml --out $(OUT)

# Three processes on two cores: the long tests of sweeps wait for half of their time.
test: lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fqsweep analysis

clean:
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "Setting up $(VENV) (torch and friends, about 3 minutes and 6.5 GB, once)"
	$(PYTHON) -m venv $(VENV)
	@# Compiled below on all cores. Not left to the first import: where PYTHONDONTWRITEBYTECODE is set, as in many
	@# containers, every process would compile all that it imports. Templates among the packages cannot be compiled,
	@# and their own tests and what nobody here imports need not be.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[test,export]"
	@$(BIN)/python -m compileall -qq -j 0 -x '/(tests|rllib|moto|pip|setuptools|mypyc?)/|/torch/testing/_internal/' $(VENV)/lib || true
	@touch $(READY)
