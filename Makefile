PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TORCH := torch==2.13.0

.PHONY: train test slow soak engine engine-llama load lint gallery record docs clean

train: $(READY)  ## set-up from nothing, then python train.py; ARGS="model=small" for overrides
	$(BIN)/python train.py $(ARGS)

test: $(READY)  ## set-up from nothing, then the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

soak: $(READY)  ## an hour, for memory, files and threads
	$(BIN)/python -m pytest -m soak -s $(ARGS)

engine: .venv-engine/.ready  ## vLLM for CPUs, in an environment of its own, for tests/engine and mismatch endpoint=

engine-llama: .venv-llama/.ready  ## llama.cpp's server for the same, built in some minutes by a C++ compiler

.venv-engine/.ready: tests/engine/vllm.lock
	$(PYTHON) -m venv .venv-engine
	.venv-engine/bin/python -m pip install --quiet $(TORCH)
	.venv-engine/bin/python -m pip install --quiet --no-deps --require-hashes --requirement tests/engine/vllm.lock
	@touch .venv-engine/.ready

.venv-llama/.ready: tests/engine/llama.lock
	$(PYTHON) -m venv .venv-llama
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" .venv-llama/bin/python -m pip install --quiet --no-deps \
		--require-hashes --requirement tests/engine/llama.lock
	@touch .venv-llama/.ready

load: .venv-load/.ready  ## guidellm, the load generator of serving endpoint=, in an environment of its own

.venv-load/.ready: tests/engine/load.txt
	$(PYTHON) -m venv .venv-load
	.venv-load/bin/python -m pip install --quiet $(TORCH)
	.venv-load/bin/python -m pip install --quiet --no-deps --requirement tests/engine/load.txt
	@touch .venv-load/.ready

lint: $(READY)  ## ruff, mypy, and which room may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

gallery: $(READY)  ## pages, tables and pictures of the questions, from their files and docs/recorded
	$(BIN)/python docs/gallery.py

record: $(READY)  ## the gallery's runs anew, about an hour with nothing else running; ARGS="peers" for some of them
	$(BIN)/python docs/record.py $(ARGS)

docs: $(READY)  ## the site, in site/; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Everything is as requirements.lock has it, hash by hash, but torch: its pin takes the build that this machine has, where
# a range may pull another, and some builds bring packages of their own.
$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; write make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(READY)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist
