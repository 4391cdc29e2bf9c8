# `make demo` and `make test` need nothing but make and a Python >= 3.11.

# The newest interpreter that runs: a shim that only answers "command not found", or a
# build without ssl, does not count. PATH first, then pyenv's versions.
FIND_PYTHON = for python in \
	  $$(for minor in 15 14 13 12 11; do echo python3.$$minor; done) python3 python \
	  "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/python; do \
	"$$python" -c 'import sys, ssl, sqlite3, lzma, ctypes, venv, ensurepip; \
	  v = sys.version_info; \
	  $(1) and print(v.minor, getattr(sys, "_base_executable", "") or sys.executable)' \
	  2>/dev/null; done | sort -s -n -r -k1,1 | head -n 1 | cut -d" " -f2-

PYTHON ?= $(shell $(call FIND_PYTHON,v >= (3, 11)))
OLDEST ?= $(shell $(call FIND_PYTHON,v[:2] == (3, 11)))
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
BIN = .venv/bin
WORKERS ?= 2
# What a change affects comes first, where tests/affected.py is told since when.
FIRST = --numprocesses $(WORKERS) -p tests.affected
# `make test` is a quarter of an hour: what a change affects, however long it takes, other
# tests while these minutes last, and the notebooks. `make test-all` is everything.
MINUTES ?= 10

.PHONY: demo test test-all check test-oldest test-aot other-environments results clean

demo: .venv/installed
	$(BIN)/python -m experiments.vae.iwae demo

test: .venv/installed-dev
	TESTS_SINCE="$${TESTS_SINCE-.ci/passed}" \
	  TESTS_UNTIL="$${TESTS_UNTIL-$$(($$(date +%s) + 60 * $(MINUTES)))}" \
	  $(BIN)/python -m pytest $(FIRST) --dist worksteal tests jaxzoo pallas_kernels
	# By themselves, since tests compile in haste and notebooks train for minutes; the
	# last ones, which are the longest, first. What they compile is kept, too.
	JAX_COMPILATION_CACHE_DIR="$${XDG_CACHE_HOME:-$$HOME/.cache}/jaxzoo/notebooks" \
	  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	  $(BIN)/python -m pytest --numprocesses $(WORKERS) --nbmake \
	  $$(ls -r notebooks/*.ipynb)

test-all:
	TESTS_SINCE= $(MAKE) test

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright
	$(BIN)/python -m jaxzoo.catalogue --check

# SUBSET=... takes a part of the suite.
SUBSET ?= tests jaxzoo pallas_kernels
ifeq ($(OLDEST),)
test-oldest:
	@echo "No Python 3.11 here: nothing was tested. make test-oldest OLDEST=/path/to/python3.11"
else
test-oldest: .venv-oldest/installed-dev
	.venv-oldest/bin/python -m pytest $(FIRST) --dist worksteal $(SUBSET)
endif

# With the vendors' compilers, which need no TPU and no GPU: 0.9 GB of wheels. What they
# compile is what is tested, so none of it comes from the compile cache.
test-aot: .venv-aot/installed-dev
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 JAX_ENABLE_COMPILATION_CACHE=0 .venv-aot/bin/python -m pytest $(FIRST) tests/*/test_*_aot.py

# What `test-oldest` and `test-aot` need, to be made beside something else.
other-environments: .venv-aot/installed-dev $(if $(OLDEST),.venv-oldest/installed-dev)

# The committed record of every experiment, measured again.
results: .venv/installed
	-$(BIN)/python -m experiments run --all  # a claim that fails is recorded too
	$(BIN)/python -m experiments record
	$(BIN)/python -m jaxzoo.catalogue
	$(BIN)/python tests/test_readme.py

clean:
	rm -rf .venv .venv-oldest .venv-aot runs build dist

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found: install one, or make PYTHON=/path/to/python." >&2; exit 1; }
	@echo "Installing jaxzoo with $(PYTHON) into .venv: a minute or two, the first time."
	"$(PYTHON)" -m venv .venv
	$(BIN)/python $(PIP_INSTALL) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python $(PIP_INSTALL) --editable ".[dev]"
	@touch $@

.venv-oldest/installed-dev: pyproject.toml
	"$(OLDEST)" -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP_INSTALL) --editable ".[dev]"
	@touch $@

.venv-aot/installed-dev: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found: make PYTHON=/path/to/python." >&2; exit 1; }
	"$(PYTHON)" -m venv .venv-aot
	.venv-aot/bin/python $(PIP_INSTALL) --editable ".[aot,dev]"
	@touch $@
