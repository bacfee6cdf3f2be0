# The commands of Ratchet; `make help` lists them. Everything is installed from the locks in requirements/,
# into .venv; the build for NVIDIA GPUs, where there is one, into .venv-gpu. Tests always use the CPU build.

BUILD := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
VENV := $(if $(filter gpu,$(BUILD)),.venv-gpu,.venv)
PYTHON := .venv/bin/python
LOCK := uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock"
LOCK_CPU := $(LOCK) pyproject.toml requirements/needs.in --overrides requirements/overrides.txt --extra cpu

.PHONY: help up demo test fuzz check bench-gateway bench-durability bench-scale bench-transfer bench-ppo bench-duel bench-learning bench-swap bench-fleet bench-worse bench-page clean lock

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 24

up: ## set everything up and run it on http://127.0.0.1:8000, until Ctrl-C
	@sh deploy/setup.sh $(BUILD)
	@exec $(VENV)/bin/python -m service.cli up

demo: ## simulated users chat and vote, and the terminal shows the loop learn; TASTE=warm SEEDS="0 1 2" CYCLES=2 VOTES=480
	@sh deploy/setup.sh $(BUILD)
	@exec $(VENV)/bin/python -m trainer.simulate $(if $(TASTE),--taste $(TASTE)) $(if $(SEEDS),--seeds $(SEEDS)) \
		$(if $(CYCLES),--cycles $(CYCLES)) $(if $(VOTES),--votes $(VOTES))

test: ## set everything up and run all tests: real PostgreSQL, vLLM and browser
	@sh deploy/setup.sh test
	@exec $(PYTHON) -m pytest -n 3 --no-loadscope-reorder

fuzz: ## 10,000 cases without keys and 10,000 with, made from the OpenAPI document; CASES=10000 SEED=0
	@sh deploy/setup.sh test
	@FUZZ_CASES=$(or $(CASES),10000) FUZZ_SEED=$(or $(SEED),0) $(PYTHON) -m pytest -q -s tests/service/test_fuzz.py

check: ## formatting, lint, types and the quick tests
	@sh deploy/setup.sh test
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy
	@$(PYTHON) -m pytest -q -m "not database and not engine and not browser"

bench-gateway: ## Ratchet beside bare vLLM, LiteLLM and TensorZero, in three quarters of an hour; PART=mock or vllm, ROUNDS=5, ONE_BY_ONE=1
	@sh deploy/setup.sh test
	@exec $(PYTHON) -m tests.benchmarks.gateway $(PART) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(ONE_BY_ONE),--one-by-one)

bench-durability: ## kill -9 every part again and again while users vote, and see that no acknowledged vote is lost
	@sh deploy/setup.sh test
	@exec $(PYTHON) -m tests.benchmarks.durability

bench-scale: ## a million stored replies: what calls take, how statements are planned, what exports cost
	@sh deploy/setup.sh test
	@exec $(PYTHON) -m tests.benchmarks.scale

bench-transfer: ## exports and imports: rows a second, CPU, memory, and what other requests wait; VOTES=100000
	@sh deploy/setup.sh test
	@exec $(PYTHON) -m tests.benchmarks.transfer $(VOTES)

bench-ppo: ## our PPO beside TRL's: samples a second, peak memory, and the arithmetic that neither can do without; ROUNDS=3 LAYERS=0.5
	@sh deploy/setup.sh test
	@sh deploy/setup.sh trl
	@exec $(PYTHON) -m tests.benchmarks.ppo $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(LAYERS),--layers $(LAYERS))

bench-duel: ## simulated duels: how often they err with a look after every vote, and how many votes they take; DUELS=10000
	@sh deploy/setup.sh test
	@exec $(PYTHON) -m tests.benchmarks.duel $(if $(DUELS),--duels $(DUELS))

bench-learning: ## what is learnt from 450 noisy votes by ours, TRL's PPO and DPO, best-of-16, in hours; TASTES="warm brief thorough" SEEDS="0 1 2 3 4" METHODS="ours best-of-16" VOTES=225 FLIP=0.25 CYCLES=5 RESUME=1
	@sh deploy/setup.sh test
	@sh deploy/setup.sh trl
	@exec $(PYTHON) -m tests.benchmarks.learning $(if $(TASTES),--tastes $(TASTES)) $(if $(SEEDS),--seeds $(SEEDS)) \
		$(if $(METHODS),--methods $(METHODS)) $(if $(VOTES),--votes $(VOTES)) $(if $(FLIP),--flip $(FLIP)) $(if $(CYCLES),--cycles $(CYCLES)) \
		$(if $(RESUME),--resume)

bench-swap: ## 20 swaps under 32 streams: failed and mixed replies, gaps, delays; beside reloading in place and restarting; TURNS=10
	@sh deploy/setup.sh test
	@exec $(PYTHON) -m tests.benchmarks.swap $(if $(TURNS),--turns $(TURNS))

bench-fleet: ## two replicas under load, swapped, then killed with -9 again and again: replies cut, failed, mixed; DELIVERY=merged KILLS=10 SWAPS=5 CLIENTS=8
	@sh deploy/setup.sh test
	@exec $(PYTHON) -m tests.benchmarks.fleet $(if $(DELIVERY),--delivery $(DELIVERY)) $(if $(KILLS),--kills $(KILLS)) \
		$(if $(SWAPS),--swaps $(SWAPS)) $(if $(CLIENTS),--clients $(CLIENTS))

bench-page: ## the pages in a real browser: weight, time to use, and dropped frames while two answers stream for a minute
	@sh deploy/setup.sh test
	@exec $(PYTHON) -m tests.benchmarks.page

bench-worse: ## a policy that was trained to be worse: what the gate, a trial and the watch after a forced promotion make of it; TASTE=warm SEED=0
	@sh deploy/setup.sh test
	@exec $(PYTHON) -m tests.benchmarks.worse $(if $(TASTE),--taste $(TASTE)) $(if $(SEED),--seed $(SEED))

clean: ## remove what was installed and cached; the state folder stays
	rm -rf .venv .venv-gpu .venv-peers .venv-trl tests/clients/node/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

lock: ## renew the pinned versions in requirements/ and of tests/clients/node (needs uv and npm)
	$(LOCK_CPU) --output-file requirements/cpu.txt
	$(LOCK_CPU) --extra test --output-file requirements/test.txt --constraints requirements/cpu.txt
	$(LOCK) pyproject.toml --extra gpu --output-file requirements/gpu.txt
	$(LOCK) requirements/service.in --output-file requirements/service.txt --constraints requirements/cpu.txt
	$(LOCK) requirements/uv.in --output-file requirements/uv.txt
	$(LOCK) requirements/peers.in --output-file requirements/peers.txt
	$(LOCK) requirements/trl.in requirements/needs.in --overrides requirements/overrides.txt --output-file requirements/trl.txt
	cd tests/clients/node && npm update --package-lock-only
