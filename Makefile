# make demo [JSON=out.json] [ARGS="..."]   everything set up in .venv, then `taper demo`
# make test [ARGS="-k slack"]              ruff, mypy and every test, the engine's too
# make fuzz [STEPS=100000] [SEED=...]      the fuzz tests at length, no engine
# make setup [EXTRA=cpu|cuda] [PYTHON=...] only the set-up
#
# VLLM=0.28.0 with any of them: that release of vLLM, in an environment of its own (.venv-0.28.0)

SHELL := bash
.DEFAULT_GOAL := help
BIN := .venv$(addprefix -,$(VLLM))/bin
VERSIONS := 0.28.0
STEPS := 100000
export EXTRA PYTHON TORCH_INDEX_URL VLLM

.PHONY: help setup setup-versions demo test test-fast test-versions fuzz seams lint format bench-decide bench-neutrality bench-visibility supply audit doctor model clean \
	distclean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## everything into .venv: Python packages, vLLM, repairs (EXTRA=cuda for the CUDA build)
	@scripts/setup.sh

demo: setup ## serve a real model and compare off, eager and taper (JSON=PATH keeps the numbers)
	@$(BIN)/taper demo $(if $(JSON),--json "$(JSON)") $(ARGS)

test: lint ## lint, types and all tests, with real engines (20 to 50 minutes on 2 cores)
	@$(BIN)/python -m pytest $(ARGS)

test-fast: setup ## the tests that start no engine
	@$(BIN)/python -m pytest -m "not engine" $(ARGS)

setup-versions: ## the environments of `test-versions`
	@set -e; for version in $(VERSIONS); do VLLM=$$version scripts/setup.sh; done

test-versions: setup-versions ## seams and scheduler on the other releases of vLLM that we test (VERSIONS), no engine
	@set -e; for version in $(VERSIONS); do \
	  .venv-$$version/bin/python -m pytest tests/vllm $(ARGS); \
	done

fuzz: setup ## new random steps, half of STEPS for the controller and half for the scheduler, and 20 x the usual inputs
	@TAPER_FUZZ_STEPS=$$(( ($(STEPS) + 1) / 2 )) TAPER_FUZZ_SEED=$(SEED) \
	  $(BIN)/python -m pytest tests/fuzz -o timeout=7200 $(ARGS)

seams: ## which seams moved in a new release of vLLM (VLLM=0.34.0)
	@scripts/seams.sh $(VLLM)

lint: setup ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/mypy

format: setup ## let ruff rewrite the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench-decide: setup ## how long one decision takes at 256 and 4096 rows
	@$(BIN)/python benchmarks/decide.py $(ARGS)

bench-neutrality: setup ## throughput without branches, TAPER against a stock server
	@$(BIN)/python benchmarks/neutrality.py $(ARGS)

bench-visibility: setup ## throughput while watched (trace, metrics, live page), against unwatched
	@$(BIN)/python benchmarks/visibility.py $(ARGS)

supply: setup ## constraints.txt and docs/licences.md, from what is in .venv
	@$(BIN)/python scripts/supply.py

audit: setup ## known vulnerabilities of what is in .venv (pip-audit, from an environment of its own)
	@$(BIN)/python -m venv .venv-audit && .venv-audit/bin/python -m pip install -q --disable-pip-version-check pip-audit
	@.venv-audit/bin/pip-audit --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" $(ARGS)

doctor: setup ## what works here and what does not
	@$(BIN)/taper doctor $(ARGS)

model: setup ## bring the embedded model into the cache
	@$(BIN)/taper model $(ARGS)

clean: ## caches and build output
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also the environments; the model cache stays
	rm -rf .venv .venv-* .venv.lock
