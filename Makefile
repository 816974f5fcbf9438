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

.DEFAULT_GOAL := help
.PHONY: help run tail test test-systemd check fmt lint types cover bench install uninstall clean lock

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "whaled needs Python 3.11 or newer; set PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(STAMP) ## run whaled against the bundled simulator, or MEMPOOL=ws://host:8999/api/v1/ws
	@mkdir -p var
	@echo "in a second terminal: make tail"
	$(BIN)/whaled run --config config/dev.yaml $(if $(MEMPOOL),--mempool-url $(MEMPOOL),--simulate)

tail: $(STAMP) ## watch the alerts of `make run` in this terminal
	$(BIN)/whaled tail

check: $(STAMP) lint types ## lint, types and the fast tests
	$(BIN)/pytest -q -n auto -m 'not slow'

test: $(STAMP) lint types ## the whole suite
	$(BIN)/pytest -q -n auto

test-systemd: $(STAMP) dist/wheels ## as root: whaled in a real systemd, booted in namespaces
	$(BIN)/pytest -q -m systemd tests/systemd

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

lock: $(STAMP) ## write constraints.txt from what is installed
	$(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable --exclude pip | LC_ALL=C sort -f > constraints.txt

dist/wheels: $(STAMP) $(shell find whaled -name '*.py') pyproject.toml
	rm -rf $@
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --constraint constraints.txt --wheel-dir $@ .
	@touch $@

install: dist/wheels ## as root: program to PREFIX, configuration to SYSCONFDIR (an edited one is kept), key ring, unit
	@$(INSTALL_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(INSTALL_PYTHON) is older than Python 3.11; set INSTALL_PYTHON" >&2; exit 1; }
	$(INSTALL_PYTHON) -m venv $(DESTDIR)$(PREFIX)/venv
	$(DESTDIR)$(PREFIX)/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-index --find-links dist/wheels --force-reinstall whaled
	$(DESTDIR)$(PREFIX)/venv/bin/python -m compileall -q $(DESTDIR)$(PREFIX)/venv/lib
	install -d $(DESTDIR)$(SYSCONFDIR) $(DESTDIR)$(UNITDIR) $(DESTDIR)$(BINDIR)
	test -e $(DESTDIR)$(SYSCONFDIR)/whaled.yaml || install -m 0644 config/whaled.example.yaml $(DESTDIR)$(SYSCONFDIR)/whaled.yaml
	test -e $(DESTDIR)$(SYSCONFDIR)/keys.json || $(DESTDIR)$(PREFIX)/venv/bin/python -m whaled keys generate --key-ring $(DESTDIR)$(SYSCONFDIR)/keys.json
	sed 's|/opt/whaled|$(PREFIX)|g; s|/etc/whaled|$(SYSCONFDIR)|g' deploy/systemd/whaled.service > $(DESTDIR)$(UNITDIR)/whaled.service
	sed -i '1s|^\#!$(DESTDIR)/|\#!/|' $(DESTDIR)$(PREFIX)/venv/bin/whaled
	ln -sf $(PREFIX)/venv/bin/whaled $(DESTDIR)$(BINDIR)/whaled
	@echo "installed. Next: set upstream.url in $(SYSCONFDIR)/whaled.yaml, then: systemctl daemon-reload && systemctl enable --now whaled"

uninstall: ## as root: remove program and unit; configuration, keys and data stay
	rm -f $(DESTDIR)$(UNITDIR)/whaled.service $(DESTDIR)$(BINDIR)/whaled
	rm -rf $(DESTDIR)$(PREFIX)/venv
	@echo "removed. $(SYSCONFDIR) and /var/lib/whaled are still there"

bench: $(STAMP) ## measure speed and size (docs/performance.md); BENCH_ARGS=--quick for less
	$(BIN)/python -m bench $(BENCH_ARGS)

clean: ## remove the virtual environment and everything generated
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov build dist var
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
