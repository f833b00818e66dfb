# Everything from nothing but Python and a package index.
#   make demo   install, train a small model on Python's own standard library, complete a prompt with it
#   make test   install with the development tools, then lint, types and the whole test suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow format clean

demo: $(VENV)/.base
	$(BIN)/pocketlm train demo
	$(BIN)/pocketlm generate latest "def " --seed 1

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

test-slow: $(VENV)/.dev
	$(BIN)/pytest --slow

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev,data,tensorboard,tiktoken]'
	touch $@ $(VENV)/.base
