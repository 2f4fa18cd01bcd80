# Everything from a fresh machine with python3 (3.10 or newer), g++ and make:
#   make demo    build, verify, a quick benchmark, and a training on real digits
#   make test    build, lint and the whole test suite
# Settings: PYTHON=python3.12  VENV=.venv  TORCH="torch==2.13.0"  MAX_JOBS=2
#   TORCH may carry pip options, such as TORCH="torch --index-url https://download.pytorch.org/whl/cpu"

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
ABI_TORCH ?= torch==2.11.0
OUT ?= out
GPU_ARCHS ?= 9.0
PIP_FLAGS ?= -q
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := $(abspath $(VENV))/bin
SOURCES := $(shell find csrc -type f) setup.py
CXX_SOURCES := $(filter-out %.py,$(filter csrc/%,$(SOURCES))) $(wildcard tests/cuda_host/*.cpp tests/cuda_host/*.h tests/native/*.cpp tests/native/*.h)
# These run again for every instruction set.
KERNEL_TESTS := tests/ops tests/nn
# One process per core, each with one thread, is the fastest use of a small machine.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4
VERIFY := $(BIN)/fastda verify --out

.PHONY: help demo test build wheel lint format check isa triton-check cuda-check neon-check gpu abi-check sanitize bench docs mutation clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

# -- environment --------------------------------------------------------------------------------------------------

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastda needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) 'setuptools>=77' wheel ninja
	$(BIN)/pip install $(PIP_FLAGS) $(TORCH)
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	FASTDA_REQUIRE_NATIVE=1 $(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(VENV)/.packages: pyproject.toml | $(VENV)/.built
	FASTDA_REQUIRE_NATIVE=1 $(BIN)/pip install $(PIP_FLAGS) --no-build-isolation -e '.[test]'
	# Without what it depends on: a torchvision that would bring a torch of its own, a torchmetrics of 2022.
	$(BIN)/pip install $(PIP_FLAGS) --no-deps pytorch-adapt==0.0.83 pytorch-metric-learning==1.6.3
	touch $@

build: $(VENV)/.built $(VENV)/.packages ## make the environment and compile the extension in place

# -- checks -------------------------------------------------------------------------------------------------------

test: lint check isa ## lint, the whole suite, and the kernels again on every instruction set

check: build
	$(PYTEST)

# tests/conformance has them all already.
isa: build
	$(VERIFY) $(OUT)/verify
	for isa in avx2 base; do \
	  FASTDA_CPU_ISA=$$isa $(PYTEST) -m "not slow and not isa_independent" $(KERNEL_TESTS); \
	done

lint: build ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: build ## rewrite all sources in the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

triton-check: build ## every Triton kernel compiled for NVIDIA and AMD, no GPU needed: registers, spills
	$(BIN)/python -m tests.triton.compile_all

cuda-check: build ## every CUDA kernel compiled by nvcc, no GPU needed: registers, spills, occupancy
	$(BIN)/python -m tests.cuda.compile_all

neon-check: ## the CPU kernels for 64-bit Arm, cross-compiled, against double loops under qemu
	$(PYTHON) tests/native/cross_check.py

# No environment is made: $(PYTHON) has torch, and nothing is fetched. DRY=1 walks all stages on the CPU,
# PREBUILT=1 takes the fastda/_C.abi3.so that is there.
gpu: ## with PYTHON's torch, offline: built in place for GPU_ARCHS, verified and timed, into out/gpu
ifndef PREBUILT
	FASTDA_CUDA_ARCHS="$(GPU_ARCHS)" FASTDA_REQUIRE_NATIVE=1 $(PYTHON) setup.py -q build_ext --inplace
endif
	$(PYTHON) -m tests.gpu --out $(OUT)/gpu $(if $(DRY),--dry-run)

# -- what users get -----------------------------------------------------------------------------------------------

demo: build ## verify, a quick benchmark, DANN and SimGAN trained on real digits, each with a report page
	$(BIN)/fastda info
	$(VERIFY) $(OUT)/demo --backend cpp
	$(BIN)/fastda bench --quick --out $(OUT)/demo
	$(BIN)/fastda dann --preset demo --overwrite --out $(OUT)/dann
	$(BIN)/fastda simgan train --preset demo --overwrite --out $(OUT)/simgan

docs: build ## the documentation as a site, in site/; any warning is an error
	$(BIN)/pip install $(PIP_FLAGS) --no-build-isolation -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

bench: build ## every operator against all that computes the same, and how its cost grows, as a report page
	$(BIN)/pip install $(PIP_FLAGS) --no-build-isolation -e '.[peers]'
	$(BIN)/python -m benchmarks --out $(OUT)/bench
	$(BIN)/python -m benchmarks --out $(OUT)/bench --growth

wheel: $(VENV)/.built ## one wheel for every torch from 2.11 and every Python from 3.10, in dist/
	rm -f dist/*.whl
	FASTDA_REQUIRE_NATIVE=1 FASTDA_AUTOGRAD_EXTENSION=0 \
	  $(BIN)/pip wheel $(PIP_FLAGS) --no-build-isolation --no-deps -w dist .

# One unpacked wheel, the same files under both: the torch of $(VENV) and $(ABI_TORCH) in an environment of its own.
# Then the package built from source there, with the objects of the kernels, which see no torch, that are there.
ABI := $(abspath $(VENV))-abi/bin/python
abi-check: wheel build $(VENV)-abi/.torch ## the wheel verifies on the oldest torch and on this one; a build from source there
	rm -rf build/abi build/abi-source && mkdir -p build/abi
	$(BIN)/pip install $(PIP_FLAGS) --no-deps --target build/abi dist/*.whl
	for python in $(BIN)/python $(ABI); do \
	  (cd build/abi && export PYTHONPATH=$$PWD FASTDA_AUTOGRAD_EXTENSION=0 OMP_NUM_THREADS=1 && \
	   $$python -W error:fastda -c 'import fastda, os, torch; file = fastda.backend.native.__file__; \
	     print(torch.__version__, file); assert file.startswith(os.getcwd())' && \
	   $$python -m fastda verify --backend cpp); \
	done
	FASTDA_REQUIRE_NATIVE=1 FASTDA_CUDA=0 $(ABI) setup.py -q build --build-lib build/abi-source
	cd build/abi-source && export PYTHONPATH=$$PWD OMP_NUM_THREADS=1 && $(ABI) -W error:fastda -c 'import fastda, os; \
	  assert fastda.backend.autograd_module.__file__.startswith(os.getcwd())' && $(ABI) -m fastda verify --backend cpp

$(VENV)-abi/.torch:
	$(PYTHON) -m venv $(VENV)-abi
	$(abspath $(VENV))-abi/bin/pip install $(PIP_FLAGS) $(ABI_TORCH) rich 'setuptools>=77' wheel ninja
	touch $@

sanitize: build ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	FASTDA_REQUIRE_NATIVE=1 FASTDA_AUTOGRAD_EXTENSION=0 FASTDA_SANITIZE=address,undefined \
	  $(BIN)/python setup.py -q build --build-lib build/sanitize
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  PYTHONPATH=build/sanitize:. OMP_NUM_THREADS=2 \
	  FASTDA_TEST_LANE=$$($(BIN)/python -c 'from fastda import backend; print(backend.native.cpu_isa())') \
	  $(BIN)/pytest -o pythonpath= -p no:cacheprovider -m "not slow and not isa_independent" \
	  $(KERNEL_TESTS) tests/conformance

mutation: build ## faults planted one by one in a copy of the tree: do the tests see them? (about an hour)
	$(BIN)/python -m tests.mutation --out $(OUT)/mutation.json

clean: ## remove build products, but not the environment
	rm -rf build dist out site *.egg-info fastda/*.so $(VENV)/.built
