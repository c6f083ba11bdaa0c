# Two commands need nothing but Python 3.11 and a package registry: `make demo` and `make test`.

PYTHON ?= python3.11
VENV ?= .venv
# On Linux a plain torch from PyPI brings CUDA along. For the CPU build: make demo TORCH_PIP="--index-url https://download.pytorch.org/whl/cpu"
TORCH_PIP ?=
BIN := $(VENV)/bin

.PHONY: demo test lint serve clean
.DEFAULT_GOAL := demo

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH_PIP) "torch==2.13.0"
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[worker,embedded,dev]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/lowbit demo --out out/demo

# Two files of tests at a time, in their order: most of a test runs on one core, and what runs on both is not left to the end.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

serve: $(VENV)/.ready
	$(BIN)/lowbit serve

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
