# The two commands of a newcomer: `make quickstart` and `make test`. Both make the environment first.
PYTHON ?= python3
# `make test EXTRAS=dev,tpu` brings the TPU compiler too, for the planner's tests that ask it; without it they are skipped.
EXTRAS ?= dev
VENV ?= .venv
RUN = $(VENV)/bin
MAXLM = $(RUN)/maxlm
QUICKSTART ?= runs/quickstart
# Two files of tests at a time: compiling, which takes most of the time, keeps one core busy.
SIDE_BY_SIDE ?= --numprocesses 2 --dist loadfile
# More overrides for the quickstart, such as train.steps=50.
SET ?=

.PHONY: help install quickstart test test-fast test-slow lint types clean

help:
	@echo "make quickstart  make the environment and run the main job on real text (about 5 minutes on 2 cores)"
	@echo "make test        make the environment and run the whole test suite"
	@echo "make test-fast   the suite without the tests that start processes or go through every family and law"
	@echo "make test-slow   the tests marked slow"
	@echo "make lint        formatting and lint;  make types: the type checker"
	@echo "PYTHON=python3.13 make ...  chooses the Python that the environment is made with"

# The stamp is newer than pyproject.toml exactly when the environment holds what it asks for.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

install: $(VENV)/.installed

quickstart: install
	@MAXLM=$(MAXLM) bash launch/quickstart.sh $(QUICKSTART) $(SET)

test: install
	$(RUN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE)

test-fast: install
	$(RUN)/python -m pytest -m "not slow and not processes and not exhaustive" $(SIDE_BY_SIDE)

test-slow: install
	$(RUN)/python -m pytest -m slow

lint: install
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .

types: install
	$(RUN)/pyright --pythonpath $(RUN)/python

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
