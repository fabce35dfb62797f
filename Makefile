# Everything runs in .venv, which `make setup` creates. Any of these may be given on the command
# line: make setup PYTHON=python3.12 TORCH="torch==2.14.1" TORCHVISION="torchvision==0.29.1"
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
NEWER ?= torch==2.14.1
PRESETS ?= release

# As in pyproject.toml's [build-system]: needed here because the build is not isolated.
BUILD_TOOLS := "setuptools>=77" "ninja>=1.11" "pybind11>=2.13" "cmake>=3.25"
# What the tests compare with. Without dependencies where those would replace the torch above.
PEERS := pytorch-ood==0.4.0 $(TORCHVISION)
MODELS := timm==1.0.22 transformers==5.24.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo demo-train greg-study test test-cpp cuda-check cuda-report gpu-check bench lint \
  format check-install check-aarch64 clean

help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(READY)  ## create .venv with torch, the package (editable) and every tool

$(READY): Makefile pyproject.toml setup.py tools/cuda_toolkit.py $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "grood-fast needs Python 3.10 or later; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@for cxx in $$CXX c++ g++ clang++; do command -v $$cxx >/dev/null && exit 0; done; \
	  echo "grood-fast needs a C++20 compiler (GCC 11 or Clang 14, or later): install one" \
	    "(Debian, Ubuntu: apt install g++) or name it in CXX."; exit 1
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH) $(BUILD_TOOLS)
	$(BIN)/pip install --no-build-isolation --editable ".[cli,plot,data,test,bench,lint]"
	$(BIN)/pip install --no-deps $(PEERS)
	$(BIN)/pip install $(MODELS)
	@touch $@

demo: setup  ## score near and far OOD data with every detector, print the table, draw the picture
	$(BIN)/grood-fast demo

demo-train: setup  ## fine-tune the demo's network with GReg+ and print before and after
	$(BIN)/grood-fast demo-train

greg-study: setup  ## GReg against its baselines, three seeds; hours, and goes on where it stopped
	while $(BIN)/python benchmarks/greg_study.py next; do :; done
	$(BIN)/python benchmarks/greg_study.py table

test: setup  ## the Python tests, and the C++ tests where GoogleTest is installed
	$(BIN)/python -m pytest
	@if echo '#include <gtest/gtest.h>' | $${CXX:-c++} -E -x c++ - >/dev/null 2>&1; then \
	  $(MAKE) --no-print-directory test-cpp; \
	else \
	  echo "C++ tests skipped: they need GoogleTest (Debian, Ubuntu: apt install libgtest-dev)."; \
	fi

test-cpp: setup  ## the C++ tests; PRESETS="debug release asan-ubsan tsan" for more than release
	@set -e; for preset in $(PRESETS); do \
	  cmake --preset $$preset; cmake --build --preset $$preset; ctest --preset $$preset; \
	done

cuda-check: setup  ## the CUDA kernels without a GPU: races, bounds, planted bugs, the GPU check's dry run
	@if echo '#include <gtest/gtest.h>' | $${CXX:-c++} -E -x c++ - >/dev/null 2>&1; then \
	  set -e; for preset in tsan asan-ubsan; do \
	    cmake --preset $$preset; \
	    cmake --build --preset $$preset --target grood_fast_cuda_tests; \
	    build/$$preset/grood_fast_cuda_tests --gtest_brief=1; \
	  done; \
	  $(BIN)/python tools/check_planted_bugs.py; \
	else \
	  echo "Races and planted bugs not checked: that needs GoogleTest (apt install libgtest-dev)."; \
	fi
	@$(BIN)/python -c 'import sys; sys.path.insert(0, "tools"); import cuda_toolkit; \
	  print("compiled with", cuda_toolkit.find().nvcc)' 2>/dev/null || \
	  echo "Machine code not checked: there is no nvcc here."
	$(BIN)/python -m pytest python_tests/cuda
	$(BIN)/python tools/gpu_check.py --device emulated --report build/gpu-report-dry-run.md

cuda-report: setup  ## what the CUDA kernels take, and a prediction (nothing is run) of their times
	$(BIN)/python tools/cuda_report.py

gpu-check: setup  ## on a machine with a GPU: test, compare and time the CUDA kernels, write a report
	$(BIN)/python tools/gpu_check.py

bench: setup  ## the benchmarks, on an otherwise idle machine
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: setup  ## ruff, mypy, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

format: setup  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(SOURCES)

check-install:  ## prove what installing does, in throw-away environments; NEWER= saves gigabytes
	$(PYTHON) tools/check_install.py --torch "$(TORCH)" --newer "$(NEWER)"

check-aarch64: setup  ## cross-compile for 64-bit ARM and run the C++ tests under qemu
	@command -v aarch64-linux-gnu-g++ qemu-aarch64 >/dev/null && test -d /usr/src/googletest || \
	  { echo "Needs: apt install g++-aarch64-linux-gnu qemu-user libgtest-dev"; exit 1; }
	@$(MAKE) --no-print-directory test-cpp PRESETS=aarch64

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info grood_fast/*.so $(READY)
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
