# Two commands do everything, set-up included: `make audit` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

.PHONY: audit test touched check types lint unit fuzz compat test-flower test-nvflare test-lightning test-huggingface test-mlflow test-priors bench-flower generate clean

audit: $(STAMP) ## Attack bundled photos in four set-ups; writes leak-report/report.html
	$(BIN)/leakatlas audit --out leak-report

test: $(STAMP) browser ## The whole gate: style, types, architecture, tests with coverage
	$(BIN)/python scripts/check.py

touched: $(STAMP) ## Only what your changes reach, against BASE (main)
	$(BIN)/python scripts/touched.py --base $(or $(BASE),main)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	$(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable ".[test]"
	touch $(STAMP)

.PHONY: browser
browser: # The site's tests drive a real browser; Debian's is installed where there is none.
ifeq ($(CHROMIUM),)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; \
	else echo "No Chromium found: install it (Debian: apt-get install chromium) for the site's tests."; fi
endif

# The campaign of hostile inputs, with a limit on its time; the gate tries a few hundred a door.
INPUTS ?= 30000
SEED ?= 0
MINUTES ?= 60
fuzz: $(STAMP) ## Tens of thousands of hostile inputs at every door
	$(BIN)/python scripts/fuzz.py --inputs $(INPUTS) --seed $(SEED) --minutes $(MINUTES)

compat: $(STAMP) ## The fast tests with the lowest and the newest versions, on every Python
	$(BIN)/python scripts/compat.py
	$(BIN)/python scripts/compat.py --extra flower

# Frameworks that cannot share our pins, or would slow every test: an environment each, outside of
# the repository. LOWEST=1 takes the oldest release that we allow.
test-flower test-nvflare test-lightning test-huggingface test-mlflow test-priors: test-%: $(STAMP) ## The adapter for a framework, in an environment of its own
	$(BIN)/python scripts/frameworks.py $* $(if $(LOWEST),--lowest)

bench-flower: $(STAMP) ## What the page of frameworks says of Flower, measured under its engine
	$(BIN)/python scripts/frameworks.py flower --study flower

generate: $(STAMP) ## Rebuild the generated tables and pages from the catalogue
	$(BIN)/python scripts/generate.py

clean:
	rm -rf $(VENV) leak-report .mypy_cache .ruff_cache .pytest_cache
