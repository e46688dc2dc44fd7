# Every target first makes .venv when it is missing or older than settings.ini or setup.py; an active virtual environment is left alone.
#   make demo     draw VI-Synth, train on it, evaluate: minutes on 2 CPU cores, nothing to download
#   make test     what CI runs
#   make torture  kills at random moments and ten thousand malformed inputs: about 20 minutes, with tables
#   make lab      JupyterLab on the notebooks
#   make prepare  before a commit: modules, clean notebooks and README.md from the notebooks

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport PYTHONHOME

.PHONY: demo test torture lab prepare
.DEFAULT_GOAL := demo

$(INSTALLED): settings.ini setup.py
	@echo "== installing vireid_nb and its tools into .venv (some minutes, about 7 GB; only the first time)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else f"Python {v[0]}.{v[1]} is too old; name another one: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[cpu,dev]"
	@touch $@

demo: $(INSTALLED)
	@echo "== vireid demo"
	@$(BIN)/vireid demo

torture: export OMP_NUM_THREADS = 1
torture: $(INSTALLED)
	@echo "== kills, malformed inputs, memory"
	@$(BIN)/python tests/torture.py

lab: $(INSTALLED)
	@echo "== JupyterLab on nbs/"
	@$(BIN)/jupyter lab --notebook-dir=nbs

prepare: $(INSTALLED)
	@echo "== modules, clean notebooks and README.md from the notebooks"
	@$(BIN)/python tests/tree.py

test: export OMP_NUM_THREADS = 1
test: export TQDM_DISABLE = 1
test: $(INSTALLED)
	@echo "== 1/4 modules, clean notebooks and README.md are those the notebooks make"
	@$(BIN)/python tests/tree.py --check
	@echo "== 2/4 ruff"
	@$(BIN)/ruff check --quiet --output-format concise vireid_nb tests || { echo "repair: in a module, mend its notebook and run 'make prepare'; elsewhere: $(BIN)/ruff check --fix tests"; exit 1; }
	@echo "== 3/4 every notebook runs"
	@$(BIN)/nbdev_test --n_workers 2 --timing || { echo "repair: open the notebook named above ('make lab'), or run it alone: $(BIN)/nbdev_test --path nbs/NAME.ipynb"; exit 1; }
	@echo "== 4/4 pytest"
	@$(BIN)/python tests/browser.py
	@$(BIN)/python -m pytest -n 2 --dist loadfile || { code=$$?; echo "repair: run a failing test alone: $(BIN)/python -m pytest -k NAME"; exit $$code; }
