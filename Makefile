# make demo        sets everything up, trains a teacher, distils it and compares, on the CPU (3 minutes on two cores)
# make test        sets everything up and runs all tests (14 minutes on two cores that did other work too); prints the 20 slowest
# make test-quick  the same without slow tests and those on two ranks, for every day
# make faults      injects faults into running trainings and reports which survive (half an hour on two cores)
# make lint        checks style and types
# make setup       only creates .venv, with the pinned versions of constraints.txt

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed

FAULTS ?=

.PHONY: demo test test-quick faults lint setup clean
.DELETE_ON_ERROR:

# If the teacher is complete already, its resume only says so.
TEACHER := outputs/quickstart/sft/nli-teacher
demo: $(INSTALLED)
	@if [ -e $(TEACHER)/training_state.json ]; \
	then set -x; $(VENV)/bin/python forge.py --resume $(TEACHER); \
	else set -x; $(VENV)/bin/python forge.py --config configs/quickstart/sft.yaml --run_name nli-teacher --max_steps 180; \
	fi
	$(VENV)/bin/python forge.py --config configs/quickstart/kd.yaml

PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: $(INSTALLED)
	$(PYTEST) --durations=20

test-quick: $(INSTALLED)
	$(PYTEST) -m 'not slow and not multiprocess'

# FAULTS="--quick", FAULTS="--only 'random kills'", FAULTS=--help
faults: $(INSTALLED)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(VENV)/bin/python -m faults $(FAULTS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

setup: $(INSTALLED)

# Debian packages venv separately from python3: root installs it here, and anybody else gets venv's own message.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "forge needs Python 3.11 or newer; set PYTHON=…")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || [ "$$(id -u)" != 0 ] || \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y python3-venv; }
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing torch, transformers and the rest: some GB, a few minutes"
	$(VENV)/bin/python -m pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e '.[test,demo]'
	@touch $@

clean:
	rm -rf $(VENV) build ./*.egg-info
