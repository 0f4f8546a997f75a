# Each target makes .venv if it is missing, installs the pinned environment once, and does its job.
# Needs only Python >= 3.11, make and a package index. Another interpreter: make test PYTHON=python3.12
# More cores: make test JOBS=8

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test prove lint install results wheel clean

demo: $(READY) ## draw a sheet, caption it, answer questions; writes demo.png
	$(BIN)/pisces demo --out demo.png

# As `pisces train` starts itself (open_pisces/cli/large_pages.py): small pages of memory can be slow on a virtual machine.
test: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=17179869184:glibc.malloc.mmap_threshold=1073741824
test: $(READY) ## every test that runs on every change
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

prove: $(READY) ## long proofs: kills, many processes, large imports; writes docs/proof.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m prove --timeout 3600 tests/prove

results: $(READY) ## the shipped model's figures, docs/results.md (half an hour; needs `pisces data build artwork`)
	$(BIN)/pisces eval scenes
	$(BIN)/pisces eval scenes --split pairs --limit 300
	$(BIN)/pisces eval scenes --split style --limit 300
	$(BIN)/pisces eval placement
	$(BIN)/pisces eval drawing
	$(BIN)/pisces eval drawing --split pairs
	$(BIN)/pisces eval diagnose
	$(BIN)/pisces eval report runs/eval --out docs/results.md

lint: $(READY) ## format, rules and types
	$(BIN)/ruff format --check open_pisces tests
	$(BIN)/ruff check open_pisces tests
	$(BIN)/mypy

wheel: $(READY) ## dist/open_pisces-*.whl
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist > build.log || { cat build.log; exit 1; }
	rm -rf build build.log

install: $(READY)

# torch first: a later install then keeps it. No build isolation: the build uses the pinned setuptools as well.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the pinned environment (minutes, once)"
	@$(INSTALL) torch setuptools
	@$(INSTALL) --no-build-isolation --editable '.[data,dev,eval,lab,ray,serve]'
	@touch $@

clean: ## everything that can be made again, except data/ and runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo.png
