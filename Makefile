# make demo     the main job, to watch (installs what is missing)
# make test     everything, on real QEMU 7.2 and 10
# make check    ruff, mypy --strict, import-linter, the house tests
# make setup    .venv and the system's packages
# make chaos    crashes and faults chosen by a seed, for as long as asked: make chaos SECONDS=3600 [SEED=7]
# make fuzz     1,050,000 inputs to all that reads what others write: about a minute of processor time a target, two at a time
#               (21 minutes at a load of 20); FUZZ="--inputs 5000000 qmp api" for more of some
# make power    the power fails at every flush of every operation: make power [SEED=7]
# make bench    benchmarks/, half an hour, with a libvirtd of its own beside it (BENCH="--docs" writes the figures of
#               docs/performance.md; BENCH="--quick" is for trying)
SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.blockferry-stamp
WORKERS ?= 2
# Some containers set it: every command that a test runs would compile all its modules, half of its time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check setup bench chaos power fuzz packages test-tools clean

setup: packages $(STAMP)

packages:
	@scripts/system-packages.sh demo
	@scripts/guest-kernel.sh >/dev/null

# After a change of dependencies in pyproject.toml:
#   uv pip compile --extra dev --generate-hashes --no-emit-index-url --no-header --no-annotate \
#       --python-version 3.11 pyproject.toml -o requirements.txt
$(STAMP): requirements.txt pyproject.toml | packages
	python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# What only the tests need: QEMU 10 beside the distribution's, and an agent for their guests.
test-tools: setup
	@scripts/system-packages.sh tests
	@scripts/qemu10.sh >/dev/null
	@scripts/guest-agent.sh >/dev/null

demo: setup
	@$(BIN)/python -m blockferry.testing.demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest tests/house

test: test-tools
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 15

SECONDS ?= 60
chaos: test-tools
	@$(BIN)/python tests/chaos/run.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

power: test-tools
	@$(BIN)/python tests/power/run.py $(if $(SEED),--seed $(SEED))

FUZZ ?=
fuzz: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r fuzz/requirements-atheris.txt
	@$(BIN)/python fuzz/run.py $(FUZZ)

# libvirt takes part where it can be had; without it, or its binding, the benchmark says so.
BENCH ?=
bench: setup
	-@scripts/system-packages.sh bench
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r benchmarks/requirements-plot.txt
	-@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes \
		-r benchmarks/requirements-libvirt.txt
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/storage.py $(BENCH)
	$(BIN)/python benchmarks/moves.py $(BENCH)
	$(BIN)/python benchmarks/many.py $(BENCH)

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache
