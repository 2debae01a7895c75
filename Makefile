# make demo | test | lint | format | bench | docs | fuzz | build | train | gpu | wheels | clean
#
# The first call makes .venv with everything the targets need. To use an environment of your own,
# with torch in it: make test PYTHON=python3

PYTHON ?= .venv/bin/python
BUILD := build/dev
export PATH := $(abspath $(dir $(PYTHON))):$(PATH)

.PHONY: demo test lint format bench docs fuzz build build-cpu configure train gpu wheels clean

demo: build-cpu
	$(PYTHON) -m dmax_kernels demo

test: build
	$(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile

# Minutes long: random inputs for every op and backend, and 10^5 steps of flat memory
fuzz: build-cpu
	DMAX_FUZZ_EXAMPLES=1000 $(PYTHON) -m pytest python_tests/test_fuzz.py -m "slow or not slow"

train: build-cpu
	$(PYTHON) -m dmax_kernels train --config ring_walk

bench: build-cpu
	$(PYTHON) bench/run.py --output build/bench/results.json

# Pages and docstrings as HTML, in build/docs
docs: build-cpu
	$(PYTHON) -m sphinx -q -W --keep-going docs build/docs

# Offline, with the Python that has this machine's CUDA build of PyTorch: build, test, sanitize, time
GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) bench/gpu_session.py

CXX_FILES = git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh'

lint: $(PYTHON)
	ruff check .
	ruff format --check .
	codespell
	mypy
	$(CXX_FILES) | xargs clang-format --dry-run -Werror

format: $(PYTHON)
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

configure: $(PYTHON)
	@test -f $(BUILD)/build.ninja || cmake -S . -B $(BUILD) -G Ninja \
	  -DPython_EXECUTABLE="$$($(PYTHON) -c 'import sys; print(sys.executable)')"

# dependency groups came with pip 25.1
.venv/bin/python: pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install -q --upgrade "pip>=25.1"
	.venv/bin/python -m pip install -q --group dev
	@touch $@

# dist/cpu and dist/cuda, audited and tried out in an empty environment
wheels: $(PYTHON)
	$(PYTHON) -m pip install -q --group release
	$(PYTHON) release/wheels.py

clean:
	rm -rf build dist dmax_kernels/lib .pytest_cache .ruff_cache
