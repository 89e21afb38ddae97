# Everything runs in .venv, made on first use. PYTHON picks the interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo reference test test-all lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train both stages on built-in scenes, draw held-out prompts, score them (12 minutes on 2 cores)"
	@echo "make reference train the reference model from nothing (three hours on 2 cores; goes on where it was stopped)"
	@echo "make test      the tests (12 minutes on 2 cores); make test-all adds the slow ones"
	@echo "make lint      ruff and mypy;  make format  rewrites;  make install  only makes .venv;  make clean"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "make: this needs Python 3.11-3.13 with venv (Debian: apt-get install python3-venv)"; exit 2; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/installed

demo: $(VENV)/installed
	$(BIN)/python train_vae.py configs/demo/vae.yaml
	$(BIN)/python train_ldm.py configs/demo/ldm.yaml
	$(BIN)/ldm evaluate runs/demo/ldm --count 128 --out runs/demo/score
	@echo; echo "The picture: runs/demo/score/grid.png"
	@echo "Your own words: $(BIN)/ldm generate --model runs/demo/ldm/pipeline --prompt 'a red circle on a black background' --out runs/demo/mine"

reference: $(VENV)/installed
	$(BIN)/python train_vae.py configs/reference/vae.yaml
	$(BIN)/python train_ldm.py configs/reference/ldm.yaml
	$(BIN)/python train_ldm.py configs/reference/ldm-conditions.yaml

# Hypothesis draws the same cases each time here, so that a pass means something to the next person; test-all explores.
# Files run in their order: the reordering of xdist leaves the long end-to-end ones to the last, and a core idle.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --hypothesis-profile ci -m "not slow" $(TESTS)

test-all: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
