# Each target makes what it needs: the virtual environment in .venv, all packages, the C++ extension.
#   make demo | test | test-integrations | test-versions | sanitize | bench | lint | docs | build | wheel | gpu-compile | gpu-check | clean
# TORCH=2.13.0        the torch to install
# NUMPY='<2.4'        bounds of the numpy to install; none are set
# PYTHON=python3      the interpreter that makes .venv; gpu-check uses it as it is
# PYTHON12=python3.12 the interpreter that makes the environments of test-versions
# FUZZ_SECONDS=120, FUZZ_CALLS, FUZZ_SEED=1   how long sanitize runs, and from which case; FUZZ_SECONDS=0: until FUZZ_CALLS
# PYTEST_ARGS, BENCH_ARGS, FUZZ_ARGS, GPU_CHECK_ARGS   further arguments

TORCH ?= 2.13.0
PYTHON ?= python3
PYTHON12 ?= python3.12
NUMPY ?=
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed-torch-$(TORCH)
export SHIRA_BUILD ?= auto
BUILT := $(VENV)/.built-torch-$(TORCH)-$(SHIRA_BUILD)
# So that the ninja of the environment is found, which compiles only what changed.
BUILD_ENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
INTEGRATIONS := .venv-integrations
INTEGRATIONS_STAMP := $(INTEGRATIONS)/.installed-torch-$(TORCH)
DOCS_STAMP := $(VENV)/.installed-docs-torch-$(TORCH)
SOURCES := setup.py $(shell find csrc -type f)
RESULTS ?= bench-results
SANITIZED := build/sanitize
FUZZ_SECONDS ?= 120
FUZZ_CALLS ?= 0
FUZZ_SEED ?= 1
# The oldest Triton that pyproject.toml allows, beside the newest that is installed.
OLDEST_TRITON := 3.6.0
TRITON_STAMP := $(VENV)/.triton-$(OLDEST_TRITON)

.PHONY: demo test test-integrations test-versions sanitize bench lint docs build wheel gpu-compile gpu-check clean
.DELETE_ON_ERROR:

demo: $(BUILT)
	$(VENV)/bin/shira demo --force $(DEMO_ARGS)

# A process for each of two cores, with one thread where a test does not ask for more. The wheel is for tests/test_wheel.py.
test: wheel
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# Trainers and other hosts, in an environment of their own; `make test` skips what it lacks.
test-integrations: $(BUILT) $(INTEGRATIONS_STAMP)
	OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python -m pytest tests/integrations $(PYTEST_ARGS)

$(INTEGRATIONS_STAMP): $(STAMP)
	test -x $(INTEGRATIONS)/bin/python || $(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) "setuptools>=77" ninja
	SHIRA_BUILD=0 $(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		--constraint $(VENV)/constraints.txt --editable ".[dev,integrations]"
	touch $@

# The oldest versions that are supported, 5 GB each. With nvcc of CUDA 13 nothing builds for torch 2.10, whose CUDA is 12.8.
test-versions:
	MAKE="$(MAKE)" PYTHON="$(PYTHON12)" bash tools/test_versions.sh 2.10.0:cpu 2.11.0:auto

# Every op with hostile arguments, in a build that AddressSanitizer and UndefinedBehaviorSanitizer watch, in a folder of its own.
# Memory is Python's from malloc too, and C++ is preloaded so that its exceptions are seen.
sanitize: $(SANITIZED)/lib/shira_kernels/_C.abi3.so
	rm -rf $(SANITIZED)/package
	mkdir $(SANITIZED)/package
	cp -r shira_kernels $(SANITIZED)/package
	rm -f $(SANITIZED)/package/shira_kernels/_C.*.so
	cp $< $(SANITIZED)/package/shira_kernels
	PYTHONPATH=$(SANITIZED)/package PYTHONMALLOC=malloc \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
		$(PY) tools/fuzz_ops.py --seconds $(FUZZ_SECONDS) --calls $(FUZZ_CALLS) --seed $(FUZZ_SEED) $(FUZZ_ARGS)

$(SANITIZED)/lib/shira_kernels/_C.abi3.so: $(STAMP) $(SOURCES)
	SHIRA_BUILD=sanitize $(BUILD_ENV) $(PY) setup.py --quiet build_ext \
		--build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp
	touch $@

bench: $(BUILT)
	mkdir -p $(RESULTS)
	$(PY) -m pytest bench --benchmark-json=$(RESULTS)/bench.json $(BENCH_ARGS)
	$(PY) bench/harness/report.py $(RESULTS)/bench.json -o $(RESULTS)

lint: $(BUILT)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
	$(PY) tools/check_repository.py

# The site, in build/docs; a link that leads nowhere is an error. Building and reading it need no network.
docs: $(BUILT) $(DOCS_STAMP)
	$(PY) tools/docs_reference.py
	$(PY) tools/docs_pictures.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

$(DOCS_STAMP): $(STAMP)
	SHIRA_BUILD=0 $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		--constraint $(VENV)/constraints.txt --editable ".[dev,docs]"
	touch $@

build: $(BUILT)

# dist/shira_kernels-VERSION-cp310-abi3-PLATFORM.whl, for every Python from 3.10 and every torch from 2.10; with CUDA kernels
# it is 1cuMAJOR-cp310-abi3, and needs a torch of that CUDA. Objects of an earlier build are linked again, and no other file
# of it is taken: what has been deleted since would stay.
wheel: $(BUILT)
	rm -rf build/lib* build/bdist* dist/shira_kernels-*.whl
	$(BUILD_ENV) $(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index --wheel-dir dist .

# torch first and pinned, so that no other package chooses it.
$(STAMP): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check torch==$(TORCH) "setuptools>=77" ninja
	printf '%s\n' "torch==$(TORCH)" "numpy$(NUMPY)" > $(VENV)/constraints.txt
	SHIRA_BUILD=0 $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		--constraint $(VENV)/constraints.txt --editable ".[dev]"
	rm -f $(VENV)/.installed-* $(VENV)/.built-* && touch $@

# All environments import the one extension in shira_kernels.
$(BUILT): $(STAMP) $(SOURCES)
	rm -f shira_kernels/_C.*.so .venv*/.built-*
	$(BUILD_ENV) $(PY) setup.py --quiet build_ext --inplace
	touch $@

# Every kernel for GPUs, compiled with none: CUDA C++, and Triton with its newest and its oldest version.
gpu-compile: $(BUILT) $(TRITON_STAMP)
	$(PY) tools/compile_gpu.py
	PYTHONPATH=$(VENV)/triton-$(OLDEST_TRITON) $(PY) tools/compile_gpu.py --no-cuda --targets sm_90

$(TRITON_STAMP): $(STAMP)
	rm -rf $(VENV)/triton-$(OLDEST_TRITON)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/triton-$(OLDEST_TRITON) \
		triton==$(OLDEST_TRITON)
	touch $@

# On a machine with a GPU, with the python and packages that are there: no installation, no network.
gpu-check:
	$(PYTHON) tools/gpu_check.py $(GPU_CHECK_ARGS)

clean:
	rm -rf build dist $(RESULTS) shira_kernels/_C.*.so *.egg-info .mypy_cache .pytest_cache .ruff_cache .venv .venv-integrations .venv-torch-*
