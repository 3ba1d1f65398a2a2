# The commands of smattn. The first two need only Python 3.10+, a C++ compiler and make; each installs into .venv what it needs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/smattn.stamp
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: bench test test-all bench-full lint aot clean

bench: $(INSTALLED)  ## exactness, time and memory of every backend beside plain PyTorch's
	$(BIN)/python bench/run.py

test: $(INSTALLED)  ## the fast tier
	$(BIN)/pytest -m "not slow"

test-all: $(INSTALLED)
	$(BIN)/pytest

bench-full: $(INSTALLED)
	$(BIN)/python bench/run.py --full

lint: $(INSTALLED)  ## mypy reads a copy laid out as installed: it cannot follow the map kernels/ -> smattn.kernels
	$(BIN)/ruff check .
	rm -rf $(VENV)/lint
	$(BIN)/python setup.py --quiet build_py --build-lib $(VENV)/lint
	cd $(VENV)/lint && ../bin/mypy --config-file ../../pyproject.toml -p smattn

aot: $(INSTALLED)  ## every Triton kernel through the real compiler, without a GPU
	env -u TRITON_INTERPRET $(BIN)/python -m smattn.kernels.aot

clean:
	rm -rf $(VENV) build smattn/_C.so smattn.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit("smattn needs Python 3.10 or newer; choose one: make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	touch $@

$(INSTALLED): $(VENV)/torch.stamp $(BUILD_FILES)
	$(BIN)/pip install "setuptools>=77" "cmake>=3.24" ninja
	$(BIN)/pip install --no-build-isolation --editable ".[dev]"
	@$(BIN)/python -c 'import smattn.native as n; print("\n".join(["C++ extension:", *(n.reasons() or ["built and loaded"])]))'
	test ! -e smattn/_C.so || touch $@  # without it, the next make tries again: a compiler may have come
