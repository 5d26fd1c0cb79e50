# Every target sets itself up: a fresh clone, python3 and make are enough.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help demo test check
help:
	@echo "make demo    distil the embedded teacher, export, verify, evaluate: demo/report.html (no GPU, no download of models)"
	@echo "make test    the tests"
	@echo "make check   ruff and mypy"

demo: $(INSTALLED)
	$(BIN)/fewstep demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(if $(CI),-v --durations=10)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp is written last: an interrupted set-up is done again.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fewstep needs Python 3.11 or newer as '$(PYTHON)'. Name another one: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "'$(PYTHON)' cannot make virtual environments (no ensurepip). On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "Installing fewstep and its dependencies into .venv (the first time: several GB, some minutes)"
	$(BIN)/python -m pip install $(if $(CI),--quiet) --no-input --editable '.[dev]'
	@$(BIN)/python -c 'import torchvision' \
		|| { echo "torch and torchvision in .venv are not of one build. Remove .venv and run make again."; exit 1; }
	@touch $@
