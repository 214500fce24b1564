# make demo    per-user adapters that learn while they serve, on handwritten digits
# make test    the proof: style, types, tests
# make bench   latencies against peers, pytest-benchmark
# make gpu     on a machine with a CUDA GPU: op tests there, times, one JSON; no network, no .venv
# make full    the tests again, with far more drawn cases
# make fire    the C library under sanitizers and valgrind, fuzzed for twenty minutes
# Each makes or reuses .venv; nothing but Python >= 3.10, pip and a C++17 compiler is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A build in pip's isolation is pinned too, under the name that old and new pips know.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc cmake -type f)

.PHONY: demo test lint bench gpu full fire lanes emulate format clean

demo: $(VENV)/.demo
	$(BIN)/lora-engine demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc examples tests/c bench -name '*.[ch]' -o -name '*.[ch]pp')

bench: $(VENV)/.bench
	$(BIN)/python -m pytest bench
	$(BIN)/python -m bench.table

# With the Python that has torch and Triton; bench/README.md says what else it needs.
gpu:
	$(PYTHON) -m bench.gpu

full: lint lanes
	LORA_ENGINE_TEST_PROFILE=full $(BIN)/python -m pytest

# With clang and valgrind, or it says what it skips.
fire: $(VENV)/.test
	LORA_ENGINE_TEST_PROFILE=full $(BIN)/python -m pytest tests/test_fire.py -v -rP

# The op tests on the avx512 kernels, their 16 lanes made of AVX2 instructions.
LANES := $(CURDIR)/build/lanes
SITE = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
lanes: $(VENV)/.test
	$(BIN)/python -m venv $(LANES)
	echo '$(SITE)' > $(LANES)/lib/$(notdir $(abspath $(SITE)/..))/site-packages/of_test.pth
	$(LANES)/bin/python -m pip install --quiet --no-deps . \
		-C cmake.define.LORA_ENGINE_AVX512_ON_AVX2=ON -C build-dir=build/lanes/build
	cd tests && for isa in avx512 avx512_bf16; do \
		LORA_ENGINE_ISA=$$isa $(LANES)/bin/python -m pytest -q test_lora_delta.py \
			test_batched_lora_delta.py test_batched_adapt.py test_ewc.py test_ewc_delta.py \
			test_float16.py \
			test_fisher.py test_nf4_linear.py test_nf4_autograd.py test_nf4_tensor.py || exit; \
	done

# Every op on the avx512 kernels' own instructions, in an emulator: Debian 12, as root.
EMULATOR := build/emulator
emulate: $(VENV)/bin/python
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(EMULATOR)/wheel . \
		-C cmake.define.LORA_ENGINE_CHECK=ON -C cmake.define.LORA_ENGINE_PYTHON=OFF \
		-C build-dir=$(EMULATOR)/build
	for isa in avx512 avx512_bf16; do \
		tests/emulator/run.sh $(EMULATOR)/build/check LORA_ENGINE_ISA=$$isa || exit; \
	done

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc examples tests/c bench -name '*.[ch]' -o -name '*.[ch]pp')

# One stamp an extra: .venv/.test holds when .[test] is installed from these sources.
$(VENV)/.%: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build
