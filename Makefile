# Everything works from a fresh clone: each target installs what it needs into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
DEMO ?= demo
INSTALLED := $(VENV)/.installed

.PHONY: caption estimate evaluate accuracy sweep study test test-slow test-vllm chaos lint clean

$(INSTALLED): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

caption: $(INSTALLED)  ## caption the demo corpus with the demo model on an embedded Ray; DEMO=gallery: the second demo
	$(BIN)/python jobs/caption_corpus.py --config conf/$(DEMO).yaml

estimate: $(INSTALLED)  ## what captioning the demo corpus would take and cost, by a sample
	$(BIN)/python jobs/caption_corpus.py run.estimate=true output.path=runs/estimated estimate.instances=[g6.xlarge,g5.xlarge:2]

evaluate: $(INSTALLED)  ## score the demo model on the demo world's nine tasks
	$(BIN)/python jobs/evaluate.py

sweep: $(INSTALLED)  ## which setting to buy, on the demo corpus: methods x retentions x pool sizes, resumable
	$(BIN)/python jobs/sweep.py

accuracy: $(INSTALLED)  ## score five selection methods at three retentions on the demo world: one table, one page
	$(BIN)/python jobs/evaluate_grid.py

study: $(INSTALLED)  ## the paper's experiments on a small scale; conf/study.yaml has them in full
	$(BIN)/python jobs/study.py

test: $(INSTALLED)  ## every test that needs no GPU and no minutes; JOBS=4 on a larger machine
	$(BIN)/python -m pytest -m "not slow and not on_ray" -n $(JOBS) --dist loadfile
	$(BIN)/python -m pytest -m "on_ray and not slow"

test-slow: $(INSTALLED)  ## the tests that take minutes each
	$(BIN)/python -m pytest -m "slow and not long"

chaos: $(INSTALLED)  ## every test that kills processes, the long ones too: a quarter of an hour
	$(BIN)/python -m pytest -m chaos

test-vllm:  ## the vLLM engine on the CPU build of vLLM, in an environment of its own
	PYTHON=$(PYTHON) tests/vllm/install .venv-vllm
	.venv-vllm/bin/python -m pytest tests/vllm -W default

lint: $(INSTALLED)  ## style and types, as in CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:  ## generated corpora and demo runs; your own outputs are elsewhere
	rm -rf .cache runs
