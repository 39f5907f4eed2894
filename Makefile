# `make demo` and `make test` do all the set-up themselves, on a machine with Python >= 3.11 and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 3

.PHONY: install demo test test-simulated simulated lint

install: $(VENV)/.installed

# torch goes first: a package that asks for any torch must find the tested one. What pip would compile file after file,
# all cores compile at last; some packages come with files that are none of Python's, which pip passes over, too.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch==2.13.0 numpy
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

demo: install
	$(BIN)/autosp demo $(DEMO)

# One worker more than a small machine has cores, for some tests wait; each with one thread: tests have tiny tensors, and
# threads that wait for cores.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS)

# The tests that need an accelerator, on one that a CPU simulates and that finds races. Needs g++; compiled once, a minute.
test-simulated: install
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p simulated.plugin -m gpu -n $(WORKERS) $(TESTS)

# A study on that accelerator: make simulated RUN="studies/zoo.py --types bert". An access that nothing orders raises; with
# SIMULATED_SANITIZE=0 none is looked for, and SIMULATED_GBPS is the pace of its link: see tests/simulated/device.py.
simulated: install
	PYTHONPATH=tests:tests/simulated/site SIMULATED_SANITIZE=$${SIMULATED_SANITIZE-2} $(BIN)/python $(RUN)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy autosp studies
