# The commands of smattn. The first two need only Python 3.10+, a C++ compiler and make; each installs into .venv what it needs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/smattn.stamp
PYTEST := $(BIN)/pytest -n auto --dist worksteal
PROBLEMS := 25  # of endless lists, by `make emulate`, and of the driver's by `make sanitize` and `make arm64`
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: bench test test-all bench-readme bench-full gpu tune lint ruff mypy clang-format format docs wheel aot emulate sanitize arm64 clean

bench: $(INSTALLED)  ## exactness, time and memory of every backend beside plain PyTorch's
	$(BIN)/python -m bench.run

test: $(INSTALLED)  ## the fast tier
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED)
	$(PYTEST)

bench-readme: $(INSTALLED)  ## every measurement that docs/measured.md shows, and both pages from them: three quarters of an hour on a quiet machine
	touch $(VENV)/began
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.run --dtypes bfloat16
	! grep -qw avx2 /proc/cpuinfo || $(BIN)/python -m bench.run --device cpu --kernels avx2
	$(BIN)/python -m bench.run --workloads windows pair384 --dtypes float32 bfloat16
	$(BIN)/python -m bench.studies.nk_sweep
	$(BIN)/python -m bench.studies.variants
	$(BIN)/python -m bench.studies.variants --dtype bfloat16
	$(BIN)/python -m bench.reporting.measured $$(find bench/results -name '*.jsonl' -newer $(VENV)/began | xargs ls -tr)

bench-full: bench-readme  ## those, and every named workload
	$(BIN)/python -m bench.run --full

# On a machine with an NVIDIA GPU, torch and triton already there; no network and no environment of its own. PART="suite bench": only these.
gpu:  ## everything that only a GPU can show, in nine minutes: bench/gpu/run.py lists its parts
	$(PYTHON) -m bench.gpu.run $(PART) --minutes $(or $(MINUTES),8.5)

tune:  ## search the tiles of kernels/tiles.csv by timing them, and write the fastest there; goes on where it stopped
	$(PYTHON) -m bench.gpu.run tune --minutes $(or $(MINUTES),60)

lint: ruff mypy clang-format  ## the checks of a commit, which pre-commit runs as well

ruff: $(INSTALLED)
	$(BIN)/ruff check .

mypy: $(INSTALLED)  ## reads a copy laid out as installed: it cannot follow the map kernels/ -> smattn.kernels
	rm -rf $(VENV)/lint
	$(BIN)/python setup.py --quiet build_py --build-lib $(VENV)/lint
	cd $(VENV)/lint && ../bin/mypy --config-file ../../pyproject.toml -p smattn

clang-format: $(INSTALLED)
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(INSTALLED)  ## puts right what clang-format finds
	$(BIN)/clang-format -i $(CPP)

docs: $(INSTALLED)  ## the guides and the API as one site, into build/docs; a link that leads nowhere fails
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --conf-dir docs . build/docs
	cp build/docs/README.html build/docs/index.html

# The wheel is built from the sdist, which therefore has all that a build needs. SMATTN_HOME: the repository's address, for the index page.
wheel: $(INSTALLED)  ## the sdist and a manylinux wheel into dist/; the wheel states the C library it needs, and torch's libraries stay torch's
	rm -rf build/wheel dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude "libtorch*" --exclude "libc10*" --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

# AOT=--sample: a fifth of them, in eight minutes; AOT="--sample --every 3": a third of those, which the tests compile.
aot: $(INSTALLED)  ## every Triton kernel through the real compiler, without a GPU, and what bounds each workload
	env -u TRITON_INTERPRET $(BIN)/python -m smattn.kernels.tools.aot $(AOT)
	env -u TRITON_INTERPRET $(BIN)/python -m smattn.kernels.tools.amd
	$(BIN)/python -m bench.gpu.roofline

emulate: $(INSTALLED)  ## the compiled kernels in an emulator of PTX: PROBLEMS drawn by SEED, and what Triton's execute
	TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(BIN)/python -m tests.gpu_emulator.emulate --problems $(PROBLEMS) --seed $(or $(SEED),0) $(EMULATE)

# The C++ kernels in a driver of their own (csrc/driver): odd problems on every instruction set at hand, against naive loops in long double.
# -O1: at -O2 the sanitizers' checks inside the unrolled products take gcc minutes.
# Matrix tiles in software: a sanitizer sees nothing of what the processor's read.
DRIVER := $(BIN)/cmake -S . -DSMATTN_DRIVER=ON -DSMATTN_AMX=EMULATED $(CMAKE_ARGS)
ARM64_TOOLS := aarch64-linux-gnu-g++ qemu-aarch64-static

sanitize: $(INSTALLED)  ## the driver under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer
	set -e; for checks in address,undefined thread; do \
	  $(DRIVER) -B build/$$checks -DCMAKE_CXX_FLAGS_RELEASE="-O1 -g -fsanitize=$$checks -fno-sanitize-recover=all"; \
	  $(BIN)/cmake --build build/$$checks --parallel; \
	  build/$$checks/smattn_driver 0 $(PROBLEMS); \
	done

arm64: $(INSTALLED)  ## the driver built for arm64 and run in an emulator
	@for tool in $(ARM64_TOOLS); do command -v $$tool > /dev/null || { \
	  echo "make arm64 needs $$tool: apt-get install g++-aarch64-linux-gnu qemu-user-static"; exit 1; }; done
	$(DRIVER) -B build/arm64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	  -DCMAKE_EXE_LINKER_FLAGS=-static
	$(BIN)/cmake --build build/arm64 --parallel
	qemu-aarch64-static build/arm64/smattn_driver 0 $(PROBLEMS)

clean:
	rm -rf $(VENV) build smattn/_cpu.so smattn/_cuda.so smattn.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit("smattn needs Python 3.10 or newer; choose one: make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	touch $@

$(INSTALLED): $(VENV)/torch.stamp $(BUILD_FILES)
	$(BIN)/pip install "setuptools>=77" "cmake>=3.24" ninja
	$(BIN)/pip install --no-build-isolation --editable ".[dev]"
	@$(BIN)/python -c 'import smattn.cpu as n; print("\n".join(["C++ extension:", *(n.reasons() or ["built and loaded"])]))'
	test ! -e smattn/_cpu.so || touch $@  # without it, the next make tries again: a compiler may have come
