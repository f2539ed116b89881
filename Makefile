# Everything a fresh machine needs: python 3.11 or newer with pip and venv, make, a C compiler.
PYTHON ?= python3
VENV ?= .venv
RUN_ARGS ?=
# Large pages for what a step allocates: a sixth of a step's time on a CPU. Means nothing to other C libraries than glibc.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1
# Exact versions; another file for other versions of jax.
CONSTRAINTS ?= constraints.txt
INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
# An environment of its own, without jax: it is small, and pyright looks at perl_jax alone (pyproject.toml).
LINT := $(VENV)/lint
LINT_TOOLS := ruff 'pyright[nodejs]' mkdocs-material 'mkdocstrings[python]'
TEST_ARGS ?=
MUTANTS_ARGS ?=
# Trials of each kind of fault (tests/campaign).
CAMPAIGN_ARGS ?= --trials 4

.PHONY: run lint docs notebook test test-slow test-all campaign golden mutants clean

run: $(VENV)/.installed
	$(HUGE_PAGES) $(VENV)/bin/python -m experiments.orders.quickstart $(RUN_ARGS)

# Format, style, types, and the documentation with its links.
lint: $(LINT)/.installed
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/ruff check .
	$(LINT)/bin/pyright --pythonpath $(LINT)/bin/python
	NO_MKDOCS_2_WARNING=1 $(LINT)/bin/mkdocs build --quiet --strict

# The documentation as a site, which follows the files as they change.
docs: $(LINT)/.installed
	NO_MKDOCS_2_WARNING=1 $(LINT)/bin/mkdocs serve

# The notebook, from its one source.
notebook: $(VENV)/.installed-test
	$(VENV)/bin/python -m tests.notebook

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(TEST_ARGS)

test-slow: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n 2 -m "slow and not exhaustive" $(TEST_ARGS)

# Everything: the third tier alone, faults put into real commands, then the quick tier again as XLA ships its optimisations.
test-all: test test-slow
	$(VENV)/bin/python -m pytest -n 2 -m exhaustive $(TEST_ARGS)
	$(VENV)/bin/python -m tests.campaign $(CAMPAIGN_ARGS)
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(VENV)/bin/python -m pytest -n 2 --dist loadfile $(TEST_ARGS)

# Faults drawn by a seed, put into real commands: `make campaign CAMPAIGN_ARGS="--only kills --trials 100"`.
campaign: $(VENV)/.installed-test
	$(VENV)/bin/python -m tests.campaign $(CAMPAIGN_ARGS)

# Writes the numbers that tests/golden holds every change against. Only where a change of behaviour is meant.
golden: $(VENV)/.installed-test
	$(VENV)/bin/python -m tests.golden

# Plants errors one by one and counts which the tests notice: `make mutants MUTANTS_ARGS="--jobs 2"`, or `--only NAME ...`.
mutants: $(VENV)/.installed-test
	$(VENV)/bin/python -m tests.mutants $(MUTANTS_ARGS)

$(VENV)/.installed: setup.py $(CONSTRAINTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) -e '.[test]'
	touch $@

$(LINT)/.installed: Makefile $(CONSTRAINTS)
	test -x $(LINT)/bin/python || $(PYTHON) -m venv $(LINT)
	$(LINT)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) $(LINT_TOOLS)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
