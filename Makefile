# Everything runs in .venv, made on the first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: env test lint demo clean

env: $(STAMP)

# uv picks matching builds of torch and torchvision; plain pip may not (see constraints.txt).
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q -p $(BIN)/python -c constraints.txt -e ".[test]"
	touch $@

test: env
	YOLO_OFFLINE=1 $(BIN)/python -m pytest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: env
	$(BIN)/dfq demo

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
