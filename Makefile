# `make train` and `make test` set up everything they need in .venv, once.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON  ?= python3
EXTRAS  ?= dev,mujoco,box2d,plot
WORKERS ?= 2

comma := ,
VENV  := .venv
PY    := $(VENV)/bin/python
# One stamp for each set of extras: a run of make with others installs those too.
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: help install train test check format test-slow clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "pgrl needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(VENV)/bin/pip || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	@echo "Installing pgrl[$(EXTRAS)] into $(VENV); the first time takes minutes."
	@$(PY) -m pip install --disable-pip-version-check --no-input $(if $(CI),--quiet) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

install: $(STAMP) ## Create .venv and install pgrl and its pinned dependencies there

train: $(STAMP) ## Train PPO on CartPole-v1 until it is solved, then evaluate it
	@run=runs/ppo/CartPole-v1/$$(date +%Y%m%d-%H%M%S); \
	$(PY) -m pgrl.train algo=ppo env=CartPole-v1 run_dir=$$run && \
	$(PY) -m pgrl.evaluate run=$$run && \
	printf '\n%s\n' 'Next:' \
	    '  source $(VENV)/bin/activate' \
	    '  tensorboard --logdir runs' \
	    '  python -m pgrl.train algo=ppo env=HalfCheetah-v5      # Ctrl-C stops it after a checkpoint,' \
	    '  python -m pgrl.train resume=RUN_DIR                   # and this goes on from there'

test: check ## Lint, check types, and run the fast tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)

check: $(STAMP) ## Lint and check types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(STAMP) ## Format the code, and mend what the linter can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

test-slow: $(STAMP) ## Run the slow tests too: faults, learning, packaging
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m "not gpu and not peers" -n $(WORKERS) --dist loadgroup

clean: ## Remove caches and built packages (.venv and runs/ stay)
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	@find src scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
