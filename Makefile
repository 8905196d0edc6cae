# `make demo` trains and samples a small model in a new environment; it only needs `make` and Python 3.10 or newer.
# `make help` lists all targets. Variables can be set on the command line: `make demo PYTHON=python3.12 THREADS=4`.

PYTHON  ?= python3
VENV    ?= .venv
# `accelerate launch` sets OMP_NUM_THREADS to 1 unless it is set.
THREADS ?= $(or $(OMP_NUM_THREADS),$(shell getconf _NPROCESSORS_ONLN))

# The demo. No `--cpu`: with these flags Accelerate uses a GPU if there is one and needs no configuration file.
DEMO_DIR     ?= runs/digits
TRAIN_FLAGS  ?= --output_dir $(DEMO_DIR) --overwrite_output_dir
SAMPLE_FLAGS ?= --model $(DEMO_DIR) --num_images 100 --seed 1 --output $(DEMO_DIR)/more_samples.png
LAUNCH_FLAGS ?= --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
                --num_cpu_threads_per_process $(THREADS)

# Flags for pytest: `make test PYTEST_FLAGS="-n 2 -k hub"`. By default two tests run at a time, with one thread each.
PYTEST_FLAGS ?= -n 2 --dist worksteal
test test-slow test-all test-oldest: export OMP_NUM_THREADS = 1

# The newest pins need Python 3.11; the oldest ones install on 3.10 too.
CONSTRAINTS ?= $(shell $(PYTHON) -c "import sys; print('constraints.txt' if sys.version_info >= (3, 11) else 'constraints-oldest.txt')")
OLDEST      := $(VENV)-oldest
BIN         := $(VENV)/bin

.PHONY: help demo test test-slow test-all test-oldest lint style types docs gpu-report wheel clean
.DELETE_ON_ERROR:

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed-train  ## train on the bundled digits, then sample
	$(BIN)/python -m accelerate.commands.launch $(LAUNCH_FLAGS) examples/train.py $(TRAIN_FLAGS)
	$(BIN)/python examples/sample.py $(SAMPLE_FLAGS)

test: $(VENV)/.installed-test  ## run the default test suite: every test except those marked slow
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-slow: $(VENV)/.installed-test  ## run only the tests marked slow: they train, or start many processes
	$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

test-all: $(VENV)/.installed-test  ## run every test
	$(BIN)/python -m pytest -m "" $(PYTEST_FLAGS)

test-oldest: $(OLDEST)/.installed-test  ## run the default test suite on the oldest supported dependencies
	$(OLDEST)/bin/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.installed-test  ## check style rules and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

style: $(VENV)/.installed-test  ## repair what ruff can repair
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.installed-types  ## check the types of the package with pyright
	$(BIN)/basedpyright --project pyproject.toml

# The variable turns off an advertisement of mkdocs-material.
docs: $(VENV)/.installed-docs  ## build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

gpu-report: $(VENV)/.installed-train  ## measure on a GPU and write gpu_report.json, to be sent back
	$(BIN)/python benchmarks/gpu_report.py $(GPU_REPORT_FLAGS)

wheel:  ## build dist/diffusers_vdm-VERSION-py3-none-any.whl
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	rm -rf build/lib build/bdist.*  # otherwise removed modules would end up in the wheel
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:  ## remove caches and build products, but not environments and runs/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# One stamp per set of extras, so that a second call installs nothing. The extra `test` includes `train`.
$(VENV)/.installed-train: setup.cfg pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[train]" -c $(CONSTRAINTS)
	touch $@

$(VENV)/.installed-test: setup.cfg pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[test]" -c $(CONSTRAINTS)
	touch $(VENV)/.installed-train $@

$(VENV)/.installed-types: setup.cfg pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[test,types]" -c $(CONSTRAINTS)
	touch $(VENV)/.installed-train $(VENV)/.installed-test $@

$(VENV)/.installed-docs: setup.cfg pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[docs]" -c $(CONSTRAINTS)
	touch $@

$(OLDEST)/.installed-test: setup.cfg pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/pip || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -e ".[test]" -c constraints-oldest.txt
	touch $@
