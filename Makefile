# Everything a newcomer or CI runs. Each target sets up all that it needs.

# uv where it is installed; otherwise pip puts a copy into .tools/.
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
PYTHON ?= python3
BENCH := .bench-venv/bin
MPIS := openmpi mpich
WORKERS ?= 5

export UV_PYTHON_DOWNLOADS = never
# Bytecode is written at set-up: where PYTHONDONTWRITEBYTECODE is set, as in most containers, each of
# the thousands of processes that the tests start would compile everything again.
export UV_COMPILE_BYTECODE = 1
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup test check demo bench docs wheels clean

help:
	@echo "make demo    train a digits model with DDP on 4 ranks; writes demo.png"
	@echo "make test    run the tests"
	@echo "make check   lint, format, types"
	@echo "make bench   measure against torch gloo, Open MPI and MPICH; writes benchmarks/results/"
	@echo "make docs    write the generated parts of docs/ again, and the site of all pages into site/"
	@echo "make wheels  build one wheel per distribution into dist/"

.tools/bin/uv:
	$(PYTHON) -m pip install --quiet --target .tools uv

setup: $(filter .tools/bin/uv,$(UV))
	$(UV) sync --quiet --locked --all-groups --no-group openmpi
	UV_PROJECT_ENVIRONMENT=.venv-openmpi $(UV) sync --quiet --locked --no-default-groups --group openmpi
	.venv/bin/python -m compileall -q core/src plugins/*/src examples tests

# Side by side, for most tests wait. One BLAS thread each: on a small machine a test of several ranks
# with a pool of threads in each takes four times as long.
# pytest rewrites the assertions of all tests: once, before the workers start, and not in each of them.
test: setup
	-.venv/bin/python -m pytest -q --collect-only > /dev/null
	OPENBLAS_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(WORKERS) --dist worksteal

check: setup
	.venv/bin/ruff format --check --quiet
	.venv/bin/ruff check --quiet
	.venv/bin/mypy

demo: setup
	.venv/bin/ferro run -n 4 examples/digits.py --plot demo.png --compare

# torch comes by pip, never by uv: it is a peer to measure against, not a dependency.
$(BENCH)/torchrun:
	$(MAKE) setup
	$(UV) venv --quiet --seed --clear .bench-venv
	$(BENCH)/pip install --quiet torch==2.13.0 matplotlib
	$(BENCH)/pip install --quiet -e core -e plugins/gloo -e plugins/strategies -e plugins/testing -e plugins/bench -e plugins/checkpoint

# Open MPI and MPICH both bring an mpiexec, so each has an environment of its own.
.bench-openmpi/bin/mpiexec .bench-mpich/bin/mpiexec: .bench-%/bin/mpiexec:
	$(MAKE) setup
	$(UV) venv --quiet --seed --clear .bench-$*
	.bench-$*/bin/pip install --quiet numpy mpi4py $*
	.bench-$*/bin/pip install --quiet -e core -e plugins/mpi -e plugins/bench

# A part of it: make bench BENCH_OPTIONS="--only collectives --ranks 2 --ops all_reduce,barrier"
OPENMPI := .bench-openmpi/bin/python
bench: $(BENCH)/torchrun $(MPIS:%=.bench-%/bin/mpiexec)
	$(BENCH)/python benchmarks/run.py $(BENCH_OPTIONS) \
	  --compare torch-gloo,openmpi=$(OPENMPI),openmpi-sm=$(OPENMPI),mpich=.bench-mpich/bin/python

docs: setup
	.venv/bin/python docs/generate.py
	.venv/bin/python docs/build_site.py

wheels: $(filter .tools/bin/uv,$(UV))
	$(UV) build --quiet --all-packages --wheel --out-dir dist

clean:
	rm -rf .venv .venv-openmpi .bench-venv .bench-openmpi .bench-mpich .tools dist build demo.png
	rm -rf site plugins/gloo/build plugins/gloo/src/*.egg-info plugins/gloo/src/ferro_gloo/shm/*.so
