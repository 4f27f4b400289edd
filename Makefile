# Everything is installed into a virtual environment in this folder.
VENV ?= .venv

# For scripts/install.sh, which finds both by itself.
export PYTHON TORCH_BACKEND

# Not from the environment, where HOST is the machine's name or a compiler's triplet.
HOST = 127.0.0.1
PORT ?= 8000
# More arguments for the server or for pytest.
ARGS ?=
# Processes that run tests; 0: no others, as a debugger needs it.
JOBS ?= 2

PACKAGES := adapters server tocom training
SOURCES := $(PACKAGES) $(wildcard benchmarks examples scripts tests)

# What has been installed is stamped, so that a second call only starts.
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev

.PHONY: help serve test lint format docs reference wheel clean

help:
	@echo 'make serve    serve the bundled model on http://$(HOST):$(PORT) (HOST=, PORT=, ARGS=)'
	@echo 'make test     run every test (ARGS="-k merging", JOBS=2)'
	@echo 'make lint     ruff and mypy, changing nothing'
	@echo 'make format   put the code into the shape that lint asks for'
	@echo 'make docs     build the site of docs/ in build/site; a link that leads nowhere fails'
	@echo 'make reference  write the pages of docs/reference anew, from the code'
	@echo 'make wheel    build dist/tocom_serve-*.whl'
	@echo 'make clean    remove what was built and cached ($(VENV) stays)'

$(BASE): pyproject.toml scripts/install.sh
	@sh scripts/install.sh '$(VENV)' openvino
	@touch $@

# The base is part of it.
$(DEV): pyproject.toml scripts/install.sh
	@sh scripts/install.sh '$(VENV)' train,dev
	@touch $(BASE) $@

# Offline from here on: all that is served comes with the package.
serve: export HF_HUB_OFFLINE ?= 1
serve: export TOCOM_HOST = $(HOST)
serve: export TOCOM_PORT = $(PORT)
serve: $(BASE)
	@exec $(VENV)/bin/tocom-serve $(ARGS)

# Many processes import the same: the first one compiles it for all.
test: export PYTHONDONTWRITEBYTECODE =
test: $(DEV)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(DEV)
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/mypy

format: $(DEV)
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

# What mkdocs-material says of its successors is no fault of a page.
docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

reference: $(DEV)
	$(VENV)/bin/python -m scripts.reference

wheel: $(DEV)
	rm -rf build
	$(VENV)/bin/python -m build --wheel --no-isolation

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
