# make demo | test | check | docs | bench | report: each sets up .venv once, and re-uses it.
PYTHON ?= python3
BIN := .venv/bin
# One file stands for "set up": it is older than pyproject.toml when that changed.
READY := .venv/.ready

.PHONY: help demo test test-oldest check docs bench report clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    BatchNorm, GroupNorm and Kalman Normalization at two samples a batch (2 to 4 minutes)"
	@echo "make test    run the tests"
	@echo "make test-oldest  run the core's tests on the oldest torch that is supported, in .venv-oldest (a large download)"
	@echo "make check   ruff and mypy"
	@echo "make docs    the site, into docs/_build/html; a warning is an error"
	@echo "make report  the tables and figures of docs again, from the files of runs"
	@echo "make bench   speed and memory beside torch's layers, into docs/results/speed (10 to 25 minutes)"

# Python compiles what is imported, at its first import: a minute less than compiling all that is installed.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -e ".[lab,dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/kalmannorm run demo

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

# The core's tests alone: the laboratory, the examples, the benchmarks and the pages need other packages, and newer ones.
# The interpreter of Triton that comes with this torch fails with numpy 2.4.
test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check --no-compile \
		-e . "torch==2.11.*" torchvision "numpy<2.4" pytest pytest-xdist "hypothesis>=6.100" expecttest
	.venv-oldest/bin/python -m pytest -n auto tests \
		--ignore tests/lab --ignore tests/integrations --ignore tests/test_benchmarks.py --ignore tests/test_evalnorm.py \
		--ignore tests/test_coverage.py --ignore tests/test_examples.py --ignore tests/short_trainings.py \
		--ignore tests/test_docs.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# --fresh-env: a notebook runs again when the package changed, and not only when its own text did.
docs: $(READY)
	$(BIN)/python -m sphinx --fresh-env -W --keep-going -q -j auto -d docs/_build/doctrees docs docs/_build/html

bench: $(READY)
	$(BIN)/python -m benchmarks --device cpu --anew --output docs/results/speed/cpu.csv
	$(BIN)/python -m benchmarks.plot docs/results/speed/*.csv --page docs/speed.md --figures docs/results/speed
	$(BIN)/python -m benchmarks.operations --output docs/results/operations.csv

report: $(READY)
	for study in $$(ls docs/results/studies); do $(BIN)/kalmannorm run $$study --report --output docs/results/studies; done
	$(BIN)/python docs/figures/make.py

clean:
	rm -rf .venv .venv-oldest
