# Everything happens in .venv; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MEMPOOL ?=

# `make install`: outside home directories, because the unit's sandbox hides those.
INSTALL_PYTHON ?= /usr/bin/python3
PREFIX ?= /opt/whaled
SYSCONFDIR ?= /etc/whaled
UNITDIR ?= /etc/systemd/system
BINDIR ?= /usr/local/bin
# Where the runbook links of the installed alert rules lead; /runbook.md#alert is appended.
DOCS_URL ?= file://$(PREFIX)/share/docs

# Optional parts of the program, by comma: eddsa (EdDSA keys). After a change remove dist/wheels.
EXTRAS ?=

# Most tests wait for something now and then: half as many workers again as cores.
WORKERS ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) * 3 / 2 )))
# Otherwise every process that a test starts compiles all of the program, and every worker all of the tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: configuration dashboards picture help run tail test test-long test-faults test-systemd fuzz soak check fmt lint types cover bench attack wheels install install-share uninstall clean lock

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "whaled needs Python 3.11 or newer; set PYTHON=python3.x" >&2; exit 1; }
	@echo "the first time: installing into $(VENV), about a minute"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(STAMP) ## run whaled against the bundled simulator, or MEMPOOL=ws://host:8999/api/v1/ws
	@mkdir -p var
	@echo "in a second terminal: make tail"
	$(BIN)/whaled run --config config/dev.yaml $(if $(MEMPOOL),--mempool-url $(MEMPOOL),--simulate --db-path var/demo.db)

tail: $(STAMP) ## watch the alerts of `make run` in this terminal
	$(BIN)/whaled tail

check: $(STAMP) lint types ## lint, types and the fast tests
	$(BIN)/pytest -q -n $(WORKERS) -m 'not slow'

test: $(STAMP) lint types ## the suite, without what runs for long
	$(BIN)/pytest -q -n $(WORKERS)

test-long: $(STAMP) ## the tests of the suite that take many seconds each
	$(BIN)/pytest -q -n $(WORKERS) -m long

test-systemd: $(STAMP) dist/wheels ## as root: whaled in a real systemd, booted in namespaces
	$(BIN)/pytest -q -m systemd tests/systemd

test-faults: $(STAMP) ## real processes under faults, compared with what was really sent (10 minutes)
	rm -rf var/faults
	FAULT_SEEDS=$(or $(FAULT_SEEDS),1-10) $(BIN)/pytest -q -n 6 -m faults tests/faults $(FAULT_ARGS) # they wait more than they compute: more than the cores of a small machine

fuzz: $(STAMP) ## hunt for frames and messages that break the parsers; FUZZ_SECONDS each (default 120)
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),120) $(BIN)/pytest -q -n 3 -k 'mutation' tests/suites/test_fuzz_upstream.py tests/suites/test_fuzz_clients.py

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict on the package, the tests and the benchmarks
	$(BIN)/mypy

fmt: $(STAMP) ## format and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

cover: $(STAMP) ## the suite with branch coverage
	$(BIN)/pytest -q --cov --cov-report=term-missing:skip-covered

configuration: $(STAMP) ## write config/whaled.example.yaml and the tables of docs/configuration.md from the keys
	$(BIN)/python -m tools.configuration

dashboards: $(STAMP) ## write deploy/grafana/dashboards from tools/dashboards (docs/grafana.md)
	$(BIN)/python -m tools.dashboards

picture: $(STAMP) ## draw docs/images/overview.png (7 minutes); NODE_PATH: where the packages of tools/picture are
	PYTHONPATH=tests $(BIN)/python tests/grafana/watch.py 7 node tools/picture/render.js deploy/grafana/dashboards/overview.json docs/images/overview.png 400 20s

lock: $(STAMP) ## write constraints.txt from what is installed
	$(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable --exclude pip | LC_ALL=C sort -f > constraints.txt

# By the Python that will run them: wheels with compiled code fit one version only.
dist/wheels: $(shell find whaled -name '*.py') pyproject.toml constraints.txt
	rm -rf $@ build/wheels-venv
	$(INSTALL_PYTHON) -m venv build/wheels-venv
	build/wheels-venv/bin/python -m pip wheel --quiet --disable-pip-version-check --constraint constraints.txt --wheel-dir $@ '.$(if $(EXTRAS),[$(EXTRAS)])'
	rm -rf build/wheels-venv
	@touch $@

INSTALL = INSTALL_PYTHON='$(INSTALL_PYTHON)' PREFIX='$(PREFIX)' SYSCONFDIR='$(SYSCONFDIR)' UNITDIR='$(UNITDIR)' BINDIR='$(BINDIR)' DESTDIR='$(DESTDIR)' DOCS_URL='$(DOCS_URL)' EXTRAS='$(EXTRAS)' WHEELS=dist/wheels deploy/install.sh

wheels: dist/wheels ## what `make install` installs; the only step that needs the network

install: dist/wheels ## as root: program, units, key ring, and a configuration where there is none; an upgrade too
	@$(INSTALL) install

install-share: ## as root: docs, alert rules and dashboards only, for the machine of Prometheus or Grafana; DOCS_URL=https://...
	@$(INSTALL) share

uninstall: ## as root: remove program and units; configuration, keys and data stay, nothing is stopped
	@$(INSTALL) uninstall

bench: $(STAMP) ## measure speed and size (docs/performance.md); BENCH_ARGS=--quick for less
	$(BIN)/python -m bench $(BENCH_ARGS)

soak: $(STAMP) ## an hour at 20 times the main network's rate under faults and churn; SOAK_ARGS='--minutes 3' for less
	PYTHONPATH=tests $(BIN)/python -m bench.soak $(SOAK_ARGS)

attack: $(STAMP) ## attack it on loopback (docs/security.md; 25 minutes); ATTACK_ARGS='--quick', --only NAME, --list, --json FILE
	$(BIN)/python -m bench.attack $(ATTACK_ARGS)

clean: ## remove the virtual environment and everything generated
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov build dist var
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
