# Five words: serve · test · bench · check · build.
#
# `make serve` and `make test` need nothing but Python 3.10 or later and a C++ compiler: the virtual environment,
# its packages and the C++ library are made on the first call, and again when pyproject.toml or the C++ changes.
# Python files are used from the checkout.

PYTHON ?= python3
VENV ?= .venv
# Only compression and tests use torch. On Linux the package index gives the CUDA build, several gigabytes; the
# processor's build is
#   make test TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0
# More words for pytest or the benchmark: make test ARGS='tests/kernels -k omp'
ARGS ?=
# Which of tests/bench is run: layers or training.
BENCH ?= layers

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check
everything := '.[compress,test]'
sources := pyproject.toml kernels/CMakeLists.txt $(wildcard kernels/csrc/* kernels/csrc/*/*)

.PHONY: bench build check test serve
.DELETE_ON_ERROR:

serve: $(VENV)/for-serving
	exec $(bin)/dsformer-serve

test: $(VENV)/for-testing
	$(bin)/pytest $(ARGS)

bench: $(VENV)/for-testing
	PYTHONPATH=tests:tests/kernels $(bin)/python tests/bench/$(BENCH).py $(ARGS)

check: $(VENV)/for-testing
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

build: $(VENV)/checkout
	$(pip) wheel --no-deps --wheel-dir dist .

# $(VENV)/checkout names the checkout an environment belongs to. It is missing until the environment stands and
# while pip changes it, so one that was interrupted, moved, or has lost its interpreter is made anew.
ifneq ($(shell cat $(VENV)/checkout 2>&1 && $(bin)/python -c 'import pip' 2>&1),$(CURDIR))
.PHONY: $(VENV)/checkout $(VENV)/for-serving $(VENV)/for-testing
endif

$(VENV)/checkout:
	$(PYTHON) -m venv --clear $(VENV)
	@echo '$(CURDIR)' >$@

# An ordinary failure of pip (no network, a compile error) leaves the environment as it was; being killed does not.
define install
@rm -f $(VENV)/checkout
@echo "pip install $(1)"; $(pip) install $(1); status=$$?; echo '$(CURDIR)' >$(VENV)/checkout; exit $$status
endef

$(VENV)/for-serving: $(sources) | $(VENV)/checkout
	$(call install,--editable .)
	@touch $@

$(VENV)/for-testing: $(sources) | $(VENV)/checkout
	$(call install,$(TORCH))
	$(call install,--editable $(everything))
	@touch $(VENV)/for-serving $@
