# Everything here runs in a virtual environment that is made on first use.
#
#   PYTHON   interpreter that the environment is made from (3.11 or newer)
#   VENV     folder of the environment
#   WORKERS  pytest processes of 'make test': a number, 0 for none, or 'auto'
#   ARGS     further arguments of the program that a target runs
#   CUDA     extra of this package that brings JAX for the GPU: cuda12 or cuda13

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS =
CUDA ?= cuda12

BIN := $(VENV)/bin
# Neighbours stay in one process, which compiles once what they share.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo ring evidence notebooks test test-all test-changed test-for-gpu \
  lint format hooks doctest docs check-pages bench-cpu-rows bench-gpu-step bench-step-smoke \
  check-gpu-rows check-gpu-losses check-gpu-attention check-gpu-sharding \
  bench-gpu-rows bench-gpu-losses bench-gpu-linear bench-gpu-attention \
  bench-gpu-sharding clean
# The environment is one folder: two pip processes must not write to it at once.
.NOTPARALLEL:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' Makefile
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS) ARGS=$(ARGS)" \
	  "CUDA=$(CUDA)"

demo: $(VENV)/.stamp-examples ## train a small network (ARGS=--quick: shorter)
	$(BIN)/python examples/train_digits.py $(ARGS)

ring: $(VENV)/.stamp-examples ## attention over a sequence that devices share
	$(BIN)/python examples/ring_attention.py $(ARGS)

evidence: $(VENV)/.stamp-examples ## train a language model with either (ARGS=--quick)
	$(BIN)/python examples/training_evidence.py $(ARGS)

notebooks: $(VENV)/.stamp-notebooks ## run the notebooks (ARGS=--quick, or --write)
	$(BIN)/python examples/run_notebooks.py $(ARGS)

test: $(VENV)/.stamp-test ## run the tests (ARGS='-k log_softmax': some of them)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.stamp-test ## run the tests, rare combinations too
	$(PYTEST) $(ARGS)

test-changed: $(VENV)/.stamp-test ## run the tests of what differs from main
	@tests=$$(sh tests/changed.sh) && if [ -z "$$tests" ]; then \
	  echo "No test mirrors what differs from main"; \
	  else set -x; $(PYTEST) $$tests $(ARGS); fi

# In a process of its own: the plugin is no part of what the other tests test.
test-for-gpu: $(VENV)/.stamp-for-gpu ## count the kernels of programs for GPUs, without one
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
	  tests/core/test_compile_only.py tests/rows/test_kernel_counts.py \
	  tests/test_training_step.py $(ARGS)

lint: $(VENV)/.stamp-lint ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.stamp-lint ## format the code and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.stamp-lint ## check style, format and types before each commit
	$(BIN)/pre-commit install

# The sources of Triton kernels import triton, which there is for Linux alone.
doctest: $(VENV)/.stamp-test ## run the examples in the docstrings, the README and docs
	$(BIN)/python -m pytest --doctest-modules --doctest-glob="*.md" \
	  --ignore-glob="*/triton_source.py" --ignore=docs/conf.py jaxsoftmax README.md docs $(ARGS)

# -E: what docs/conf.py computes is not seen to have changed.
docs: $(VENV)/.stamp-docs ## build the documentation site in build/docs
	$(BIN)/python -m sphinx -b html -W --keep-going -E -q \
	  -c docs -d build/doctrees . build/docs $(ARGS)

check-pages: $(VENV)/.stamp-test ## whether tables in docs agree with measurements
	$(BIN)/python benchmarks/performance_page.py --check
	$(BIN)/python benchmarks/training_page.py --check
	$(BIN)/python benchmarks/memory_model.py --check

bench-cpu-rows: $(VENV)/.stamp-examples ## measure time and memory on the CPU
	$(BIN)/python benchmarks/cpu_softmax.py $(ARGS)

check-gpu-rows: $(VENV)/.stamp-gpu ## check the kernels on this GPU (ARGS=--quick: some)
	$(BIN)/python tests/gpu/check_kernels.py $(ARGS)

check-gpu-losses: $(VENV)/.stamp-gpu ## check the kernels of cross-entropy on this GPU
	$(BIN)/python tests/gpu/check_cross_entropy.py $(ARGS)

check-gpu-attention: $(VENV)/.stamp-gpu ## check attention on this GPU
	$(BIN)/python tests/gpu/check_attention.py $(ARGS)

check-gpu-sharding: $(VENV)/.stamp-gpu ## check programs for all GPUs of this machine
	$(BIN)/python tests/gpu/check_sharding.py $(ARGS)

# In turn with PyTorch where 'pip install torch' was run in the environment.
bench-gpu-rows: $(VENV)/.stamp-gpu ## measure time on this GPU (ARGS='--json FILE --png FILE')
	$(BIN)/python benchmarks/gpu_softmax.py $(ARGS)

bench-gpu-step: $(VENV)/.stamp-gpu ## measure training steps on this GPU, likewise
	$(BIN)/python benchmarks/gpu_training_step.py $(ARGS)

bench-step-smoke: $(VENV)/.stamp-examples ## run the training steps once, small, on the CPU
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/gpu_training_step.py --smoke

bench-gpu-losses: $(VENV)/.stamp-gpu ## measure cross-entropy on this GPU, likewise
	$(BIN)/python benchmarks/gpu_cross_entropy.py $(ARGS)

bench-gpu-linear: $(VENV)/.stamp-gpu ## measure linear + cross-entropy on this GPU
	$(BIN)/python benchmarks/gpu_linear_cross_entropy.py $(ARGS)

bench-gpu-attention: $(VENV)/.stamp-gpu ## measure attention on this GPU
	$(BIN)/python benchmarks/gpu_attention.py $(ARGS)

bench-gpu-sharding: $(VENV)/.stamp-gpu ## measure weak scaling over all GPUs of this machine
	$(BIN)/python benchmarks/gpu_sharding.py $(ARGS)

clean: ## remove .venv, .venv-newest, builds and caches
	rm -rf .venv .venv-newest build dist *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

# 'pip install --group' came with pip 25.1; the pip that a new environment gets
# from its interpreter may be older.
$(VENV)/.stamp-venv:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: PYTHON=$(PYTHON) was not found; set PYTHON=/path/to/python" >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Python 3.11 or newer is needed, PYTHON=$(PYTHON) is" \
	    "$$("$(PYTHON)" --version 2>&1 | sed -n 1p); set PYTHON=/path/to/python" >&2; \
	  exit 1; }
	@echo "Creating $(VENV)"
	@"$(PYTHON)" -m venv "$(VENV)"
	@$(PIP) --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-venv pyproject.toml
	@echo "Installing jaxsoftmax and the test tools into $(VENV)"
	@$(PIP) --editable . --group test
	@touch $@

$(VENV)/.stamp-for-gpu: $(VENV)/.stamp-test
	@echo "Installing JAX's plugin that compiles for GPUs into $(VENV)"
	@$(PIP) --group for-gpu
	@touch $@

# mypy reads the packages that jaxsoftmax imports, hence the test group.
$(VENV)/.stamp-lint: $(VENV)/.stamp-test
	@echo "Installing the lint tools into $(VENV)"
	@$(PIP) --group lint
	@touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-venv pyproject.toml
	@echo "Installing jaxsoftmax and the documentation tools into $(VENV)"
	@$(PIP) --editable . --group docs
	@touch $@

$(VENV)/.stamp-examples: $(VENV)/.stamp-venv pyproject.toml
	@echo "Installing jaxsoftmax and the packages of the examples into $(VENV)"
	@$(PIP) --editable ".[examples]"
	@touch $@

$(VENV)/.stamp-notebooks: $(VENV)/.stamp-examples
	@echo "Installing the notebook tools into $(VENV)"
	@$(PIP) --group notebooks
	@touch $@

$(VENV)/.stamp-gpu: $(VENV)/.stamp-test
	@echo "Installing JAX for the GPU, jax-triton and matplotlib into $(VENV)"
	@$(PIP) --editable ".[$(CUDA)]" matplotlib
	@touch $@
