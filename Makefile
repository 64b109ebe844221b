# Everything runs in a virtual environment of its own, .venv; the first target that needs it makes it.

PYTHON  ?= python3
MACHINE ?= $(shell uname -n)
BASE    ?= main
COMMIT  ?= HEAD
BENCH   ?= ^(?!.*(cold|networks))
FACTOR  ?= 1.1
TABLE   ?= /dev/null
JOBS    ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
# OpenBLAS takes another CPU's kernels where this is set, and timings of im2col and tensordot would mean little.
TIMED   := env -u OPENBLAS_CORETYPE
# Tests run in JOBS processes, whose idle threads leave the cores to the others.
PYTEST  := env OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-adapters test-pages test-peers nightly soak mutants lint docs report build bench bench-compare \
	bench-noise bench-record dashboard clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/with-compare,examples  ## train on handwritten digits, then compare strategies on real layers
	$(BIN)/python examples/digits.py --out digits.png
	$(TIMED) $(BIN)/nhwconv compare --workload lenet5 --workload resnet50 --pass weight_grad \
		--strategies loop,winograd,im2col,tensordot --seconds 0.2

test: $(VENV)/with-test  ## run all tests, in JOBS processes; ARGS goes to pytest
	$(PYTEST) $(ARGS)

test-adapters: $(VENV)/with-adapters  ## test the adapters for PyTorch, JAX and Dask; none may be skipped
	$(PYTEST) -o 'norecursedirs=.*' tests/adapters $(ARGS)

test-pages: $(VENV)/with-pages  ## test the pages that it makes in Chromium, which it finds, brings, or says how to get
	$(BIN)/python tests/support/browser.py
	$(BIN)/python -m pytest -o 'norecursedirs=.*' tests/pages $(ARGS)

test-peers: $(VENV)/with-peers  ## run suites of PyTorch, JAX, ONNX, Keras and SciPy on nhwconv, and networks of torchvision and timm
	env OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -c tests/peers/pytest.ini tests/peers $(ARGS)

nightly: $(VENV)/with-test  ## run all tests in their long forms: more problems, more threads, more calls
	NHWCONV_TESTS=nightly $(PYTEST) $(ARGS)

soak: $(VENV)/with-test  ## ten minutes of random problems against the oracle; ARGS goes to tests/support/soak.py
	$(BIN)/python tests/support/soak.py $(ARGS)

mutants: $(VENV)/with-test  ## make chosen mistakes in copies of the package, and see the tests notice each
	$(BIN)/python tests/support/mutate.py $(ARGS)

lint: $(VENV)/with-dev  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/with-docs  ## build the documentation into build/site; a warning is an error
	$(BIN)/python -m sphinx --builder html --fresh-env --fail-on-warning --keep-going -d build/doctrees docs build/site

report: $(VENV)/with-report  ## time layers and networks against PyTorch and JAX; fill docs/performance.md and docs/report.svg
	$(TIMED) OMP_PROC_BIND=true $(BIN)/python tools/report.py $(ARGS)

build: $(VENV)/with-dev  ## a wheel and a source distribution in dist/
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

bench: $(VENV)/with-bench  ## run the asv benchmarks once on this checkout, keeping no times: those that match BENCH
	$(BIN)/asv machine --yes
	mkdir -p .asv && sed 's|"benchmarks/results"|".asv/quick"|' asv.conf.json > .asv.quick.json
	$(TIMED) $(BIN)/asv run --config .asv.quick.json --python=same --dry-run -a rounds=1 -a repeat=5 -b '$(BENCH)' $(ARGS); \
		status=$$?; rm -f .asv.quick.json; exit $$status

bench-compare: $(VENV)/with-bench  ## compare this commit with BASE by FACTOR; fails where it is slower; ARGS goes to asv continuous
	$(BIN)/asv machine --yes
	$(TIMED) $(BIN)/asv continuous --factor $(FACTOR) --split --show-stderr $(ARGS) $(BASE) HEAD; status=$$?; \
		$(BIN)/python tools/bench_table.py --factor $(FACTOR) $(BASE) HEAD | tee $(TABLE); exit $$status

bench-noise: $(VENV)/with-bench  ## record COMMIT twice, apart, and print thresholds for asv.conf.json; ARGS goes to asv run
	$(BIN)/asv machine --yes
	$(TIMED) $(BIN)/python tools/noise.py --commit $(COMMIT) $(ARGS)

bench-record: $(VENV)/with-bench  ## record the benchmarks of COMMIT in benchmarks/results, as MACHINE; ARGS goes to asv run
	$(BIN)/python tools/machine.py $(MACHINE)
	$(TIMED) $(BIN)/asv run --machine $(MACHINE) --show-stderr $(ARGS) "$(COMMIT)^!"

dashboard: $(VENV)/with-bench  ## publish what is recorded as a dashboard, serve it and print its address
	$(BIN)/python tools/dashboard.py

clean:  ## remove the environment and all that was built
	rm -rf $(VENV) build dist src/*.egg-info .asv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras, renewed when the requirements change.
$(VENV)/with-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@
