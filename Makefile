# Everything runs in .venv, made on first use. PYTHON picks the interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What `make demo` draws with, from where, and to where.
MODEL := models/emoji-scenes
EXAMPLES := $(MODEL)/examples
DRAWN := runs/drawn
DRAW := --model $(MODEL) --steps 20 --guidance 5 --scheduler ddpm --seed 0
export PROMPT

.PHONY: help install demo demo-train reference test test-all lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      draw with the model in models/: prompts, inpainting, a map, a way between two prompts (a minute);"
	@echo "               your own words: make demo PROMPT=\"a small dog above a large pizza on a navy background\""
	@echo "make demo-train train both stages on built-in scenes, draw held-out prompts, score them (12 minutes on 2 cores)"
	@echo "make reference train the reference model from nothing (about five hours on 2 cores, three with AMX; goes on where it was stopped)"
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
	$(BIN)/ldm generate $(DRAW) $(if $(PROMPT),--prompt "$$PROMPT" --count 8,--prompts $(EXAMPLES)/prompts.txt) --out $(DRAWN)/prompts
	$(BIN)/ldm inpaint $(DRAW) --image $(EXAMPLES)/scene.png --mask $(EXAMPLES)/mask.png --count 3 \
	  --prompt "$$(cat $(EXAMPLES)/inpaint.txt)" --out $(DRAWN)/inpainting
	$(BIN)/ldm generate $(DRAW) --semantic-map $(EXAMPLES)/map.png --prompts $(EXAMPLES)/map-prompts.txt --out $(DRAWN)/map
	$(BIN)/ldm interpolate $(DRAW) --prompt "$$(sed -n 1p $(EXAMPLES)/way.txt)" --prompt "$$(sed -n 2p $(EXAMPLES)/way.txt)" \
	  --out $(DRAWN)/interpolation
	@echo; echo "The pictures:"; ls -t $(DRAWN)/prompts/grid.png $(DRAWN)/inpainting/grid.png $(DRAWN)/map/grid.png \
	  $$(ls -t $(DRAWN)/interpolation/*.png | head -1)
	@echo 'Your own words: make demo PROMPT="a small dog above a large pizza on a navy background"'

demo-train: $(VENV)/installed
	$(BIN)/python train_vae.py configs/demo/vae.yaml
	$(BIN)/python train_ldm.py configs/demo/ldm.yaml
	$(BIN)/ldm evaluate runs/demo/ldm --count 128 --out runs/demo/score
	@echo; echo "The picture: runs/demo/score/grid.png"
	@echo "Your own words: $(BIN)/ldm generate --model runs/demo/ldm/pipeline --prompt 'a red circle on a black background' --out runs/demo/mine"

reference: $(VENV)/installed
	$(BIN)/python train_vae.py configs/reference/vae.yaml
	$(BIN)/python train_ldm.py configs/reference/ldm.yaml
	$(BIN)/python train_ldm.py configs/reference/ldm-relations.yaml
	$(BIN)/python train_ldm.py configs/reference/ldm-finish.yaml

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
