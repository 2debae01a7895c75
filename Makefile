# make demo | test | lint | format | bench | docs | fuzz | build | train | gpu | wheels | clean
# make test-oldest | test-newest | lock
#
# The first call makes .venv with everything the targets need, in the versions of requirements.lock.
# To use an environment of your own, with torch in it: make test PYTHON=python3

PYTHON ?= .venv/bin/python
# Says that .venv is complete. Not python itself: that is a link to the system's, whose date is not ours
ENVIRONMENT := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/installed)
BUILD := build/dev
export PATH := $(abspath $(dir $(PYTHON))):$(PATH)
# C++ that has not changed is not compiled again, where ccache is installed
export CMAKE_CXX_COMPILER_LAUNCHER ?= $(shell command -v ccache)

.PHONY: demo test test-oldest test-newest browser lint format bench docs fuzz build build-cpu \
  configure train gpu lock wheels clean

demo: build-cpu
	$(PYTHON) -m dmax_kernels demo

test: build browser
	$(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile

# The suite in an environment of its own, build/oldest or build/newest, at that end of the ranges in
# pyproject.toml; in a copy of the tree, since its libraries are built against that torch
PYTHONS = python3.10 python3.11 python3.12 python3.13 python3
OLDEST_PYTHON ?= $(shell for p in $(PYTHONS); do $$p -c '' 2>/dev/null && echo $$p && break; done)
NEWEST_PYTHON ?= python3
test-oldest: build/oldest/installed
test-newest: build/newest/installed
test-oldest test-newest: test-%:
	@mkdir -p build/$*/tree
	@find build/$*/tree -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	@git ls-files -z | tar -c --null --ignore-failed-read -T - | tar -x -C build/$*/tree
	@git -C build/$*/tree init -q && git -C build/$*/tree add .
	$(MAKE) -C build/$*/tree test PYTHON=$(abspath build/$*/bin/python)

build/oldest/installed build/newest/installed: build/%/installed: pyproject.toml
	$(if $(filter oldest,$*),$(OLDEST_PYTHON),$(NEWEST_PYTHON)) -m venv --clear build/$*
	build/$*/bin/python -m pip install -q --upgrade "pip>=25.3"
	build/$*/bin/python -m pip install -q --group $*
	@touch $@

# A browser for the test of the demo's page: Debian's, where this user may install it
browser:
	@which chromium chromium-browser google-chrome 2>/dev/null | grep -q . || \
	  { [ "$$(id -u)" = 0 ] && which apt-get >/dev/null && \
	    apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } || \
	  echo "No browser could be installed: the tests of the demo's page will be skipped."

# Minutes long: random inputs for every op and backend, and 10^5 steps of flat memory
fuzz: build-cpu
	DMAX_FUZZ_EXAMPLES=1000 $(PYTHON) -m pytest python_tests/test_fuzz.py -m "slow or not slow"

train: build-cpu
	$(PYTHON) -m dmax_kernels train --config ring_walk

# Twelve minutes for every cell beside its best peer, and some more for loops; BENCH=--quick: one
bench: build-cpu
	$(PYTHON) bench/run.py --output build/bench/results.json $(BENCH)

# Pages and docstrings as HTML, in build/docs
docs: build-cpu
	$(PYTHON) -m sphinx -q -W --keep-going docs build/docs

# Offline, with the Python that has this machine's CUDA build of PyTorch. Some of the stages, within
# nine minutes: make gpu GPU="smoke key test --seconds 540"; bench/gpu_session.py says what there is.
# Libraries made elsewhere, for every architecture, can be brought along: there, with CUDAFLAGS=-lineinfo
# for the profiler, `make build`; here, GPU="--carried ..."
GPU_PYTHON ?= python3
GPU ?=
gpu:
	$(GPU_PYTHON) bench/gpu_session.py $(GPU)

CXX_FILES = git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh'

lint: $(ENVIRONMENT)
	ruff check .
	ruff format --check .
	codespell
	mypy
	$(CXX_FILES) | xargs clang-format --dry-run -Werror

format: $(ENVIRONMENT)
	ruff check --fix .
	ruff format .
	$(CXX_FILES) | xargs clang-format -i

# Compiles what has changed and puts the libraries into dmax_kernels/lib, beside the Python sources
build: configure
	@cmake --build $(BUILD)
	@cmake --install $(BUILD) --prefix . >/dev/null

# Without the CUDA kernels, which take nvcc some minutes: enough for the demo and for training
build-cpu: configure
	@cmake --build $(BUILD) --target dmax_cpu
	@cmake --install $(BUILD) --prefix . --component cpu >/dev/null

configure: $(ENVIRONMENT)
	@test -f $(BUILD)/build.ninja || cmake -S . -B $(BUILD) -G Ninja \
	  -DPython_EXECUTABLE="$$($(PYTHON) -c 'import sys; print(sys.executable)')"

# Every version, of what is needed indirectly too, from requirements.lock
.venv/installed: pyproject.toml requirements.lock
	python3 -m venv .venv
	.venv/bin/python -m pip install -q -c requirements.lock pip
	.venv/bin/python -m pip install -q --group dev -c requirements.lock
	@touch $@

# The newest versions that the ranges of pyproject.toml allow together, for every Python from 3.10 on
lock: $(ENVIRONMENT)
	$(PYTHON) -m uv pip compile -q --universal --python-version 3.10 --upgrade --no-annotate \
	  --custom-compile-command "make lock" --group release -o requirements.lock

# dist/cpu and dist/cuda, audited and tried out in an empty environment
wheels: $(ENVIRONMENT)
	$(PYTHON) -m pip install -q --group release -c requirements.lock
	$(PYTHON) release/wheels.py

clean:
	rm -rf build dist dmax_kernels/lib .pytest_cache .ruff_cache
