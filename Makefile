# make demo     a few photographs, captioned by the model that comes along: images/out_*.jpg
# make sample   the whole pipeline on the sample set, from nothing to images/out_*.jpg
# make test     lint and the whole test suite
# make bench    speed and memory against the plain implementation, about twenty minutes on two cores
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo sample test bench

demo: .venv/installed
	$(BIN)/python demo.py

sample: .venv/installed data/sample/scenes.json
	$(BIN)/python pre_process.py --preset sample
	$(BIN)/python train.py --preset sample $(if $(wildcard models/sample/checkpoint.pth.tar),--resume)
	$(BIN)/python eval.py --preset sample --split test_a
	$(BIN)/python demo.py --preset sample

test: .venv/installed
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

bench: .venv/installed
	$(BIN)/python benchmarks/run.py all

data/sample/scenes.json: | .venv/installed
	$(BIN)/python data/sample.py

# A file of its own marks a whole installation: pip that was cut short leaves .venv/ but not this.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -r requirements.txt
	touch $@
