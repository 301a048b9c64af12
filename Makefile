# Each target makes its own virtual environment from Python and pip alone.
#   make demo                     train the quickstart (runs/quickstart)
#   make test                     lint and all tests;  make test TESTS=tests/data FLAGS="-m 'not slow' -x"
#   make test PARALLEL=           one test file at a time, to look at one
#   make test PYTHON=python3.12   with another interpreter;  VENV=... to keep its environment apart
PYTHON ?= python3
VENV ?= .venv-test
TESTS ?= tests
FLAGS ?=
PARALLEL ?= -n 2 --dist loadfile
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --no-compile

# pip would compile every file of every dependency, most of which are never imported: a third of the time of an
# installation. What is imported is compiled and kept on first use, which this variable would forbid.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test clean

demo: .venv-demo/installed
	.venv-demo/bin/maxlm train configs/quickstart.py --run-dir runs/quickstart

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest $(PARALLEL) $(FLAGS) $(TESTS)

.venv-demo/installed: setup.cfg pyproject.toml
	@echo "Installing maxlm into .venv-demo ($$($(PYTHON) --version))"
	$(PYTHON) -m venv --clear .venv-demo
	.venv-demo/bin/python $(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/installed: setup.cfg pyproject.toml
	@echo "Installing maxlm[test] into $(VENV) ($$($(PYTHON) --version))"
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv-demo .venv-test* build dist *.egg-info
