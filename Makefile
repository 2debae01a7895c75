# `make` and `make help` list the targets: each has one sentence after ## on its line.
#
# The first call makes .venv with everything the targets need, in the versions of requirements.lock.
# To use an environment of your own that has torch: make test PYTHON=python3

PYTHON ?= .venv/bin/python
# This file says that .venv is complete. The venv's python cannot: it links to the system's, whose
# date says nothing about .venv
ENVIRONMENT := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/installed)
BUILD := build/dev
export PATH := $(abspath $(dir $(PYTHON))):$(PATH)
# Where ccache is installed, C++ that has not changed is not compiled again
export CMAKE_CXX_COMPILER_LAUNCHER ?= $(shell command -v ccache)

.PHONY: help demo test test-oldest test-newest test-engines browser lint format bench docs fuzz \
  ladder reproduction build build-cpu configure train gpu gpu-peers kernels-report lock wheels clean

help: ## Print this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build-cpu ## Print the paper's tables and claims on a small task; write a page, two pictures.
	$(PYTHON) -m dmax_kernels demo

test: build browser ## Build the package and run the tests, which need no GPU.
	$(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile

# The suite runs in an environment of its own, build/oldest or build/newest, with the versions at
# that end of the ranges in pyproject.toml. It runs in a copy of the tree, whose libraries are built
# against that environment's torch
PYTHONS = python3.10 python3.11 python3.12 python3.13 python3
OLDEST_PYTHON ?= $(shell for p in $(PYTHONS); do $$p -c '' 2>/dev/null && echo $$p && break; done)
NEWEST_PYTHON ?= python3
test-oldest: build/oldest/installed ## Run the tests with the oldest supported versions.
test-newest: build/newest/installed ## Run the tests with the newest versions in the package index.
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

# The code of the engines as they were released, each in a folder of its own. Of SGLang and vLLM the
# wheel is unpacked and no more: what they require needs a GPU. 5.11 is the first transformers that
# has DiffusionGemma
test-engines: build-cpu build/engines/installed ## Test the adapters beside the engines' releases.
	$(PYTHON) -m pytest python_tests/test_engine_sglang.py python_tests/test_engine_recipes.py
	PYTHONPATH=build/engines/transformers-oldest $(PYTHON) -m pytest $(TRANSFORMERS_TESTS)
	PYTHONPATH=build/engines/transformers-newest $(PYTHON) -m pytest $(TRANSFORMERS_TESTS)
TRANSFORMERS_TESTS := python_tests/test_integrations_transformers.py

build/engines/installed: Makefile
	rm -rf build/engines
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 \
	  --platform manylinux_2_34_x86_64 -d build/engines sglang==0.5.23
	$(PYTHON) -m zipfile -e build/engines/sglang-*.whl build/engines/sglang
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 \
	  --platform manylinux_2_28_x86_64 -d build/engines vllm==0.33.0
	$(PYTHON) -c "import glob, zipfile; wheel = zipfile.ZipFile(*glob.glob('build/engines/vllm-*'));\
	  wheel.extractall('build/engines/vllm', [n for n in wheel.namelist() if 'diffusion' in n])"
	rm build/engines/*.whl
	$(PYTHON) -m pip install -q --target build/engines/transformers-oldest transformers==5.11.0
	$(PYTHON) -m pip install -q --target build/engines/transformers-newest transformers
	@touch $@

# The test of the demo's page needs a browser: Debian's is installed where this user may do that
browser:
	@which chromium chromium-browser google-chrome 2>/dev/null | grep -q . || \
	  { [ "$$(id -u)" = 0 ] && which apt-get >/dev/null && \
	    apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } || \
	  echo "No browser could be installed: the tests of the demo's page will be skipped."

fuzz: build-cpu ## Test every op on random inputs and for growing memory, for some minutes.
	DMAX_FUZZ_EXAMPLES=1000 $(PYTHON) -m pytest python_tests/test_fuzz.py -m "slow or not slow"

train: build-cpu ## Train the demo's base, oput and control from nothing.
	$(PYTHON) -m dmax_kernels train --config ring_walk

# Hours of a CPU core; LADDER="--device cuda --workers 16" takes minutes of a GPU. It goes on where it
# was, and at the end puts what ships into the package
ladder: build-cpu ## Train every method at several lengths, decode, judge, and renew what ships.
	$(PYTHON) -m dmax_kernels train --config ring_walk_ladder --output build/ladder $(LADDER)
	$(PYTHON) -c "from pathlib import Path; from dmax_kernels.ring_walk import record; \
	  record.ship(Path('build/ladder'))"

# This takes about 15 minutes. BENCH=--quick takes one: a shape an op, without torch.compile.
bench: build-cpu ## Time every op beside its best peer; print a table, write JSON and pictures.
	$(PYTHON) bench/run.py --output build/bench/results.json $(BENCH)

kernels-report: build ## Print what nvcc made of the kernels, and the times that follow (no GPU).
	$(PYTHON) bench/kernels.py $(KERNELS)

docs: build-cpu ## Render the pages and the docstrings as HTML into build/docs.
	$(PYTHON) -m sphinx -q -W --keep-going docs build/docs

reproduction: build-cpu ## Write docs/reproduction.md from the recorded figures.
	PYTHONPATH=. $(PYTHON) docs/reproduction/page.py

# This downloads nothing: GPU_PYTHON is the Python that has this machine's CUDA build of PyTorch.
# GPU="smoke key test --seconds 540" runs some of the stages within nine minutes. Libraries built
# elsewhere for every architecture (make build; with CUDAFLAGS=-lineinfo for the profiler) are used
# with GPU=--carried.
GPU_PYTHON ?= python3
gpu: ## Build, check, measure, test and sanitize on this machine's NVIDIA GPU.
	$(GPU_PYTHON) bench/gpu_session.py $(GPU)

# For the machine above, where GPU_PYTHON has a network, nvcc and the same torch
gpu-peers: ## Pack the GPU peers into .peers, to be timed beside ours on a machine without a network.
	$(GPU_PYTHON) bench/carry_peers.py

CXX_FILES = git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'python_tests/*.cpp'

lint: $(ENVIRONMENT) ## Check the style, the spelling and the types of the sources.
	ruff check .
	ruff format --check .
	codespell
	mypy
	$(CXX_FILES) | xargs clang-format --dry-run -Werror

format: $(ENVIRONMENT) ## Format the sources.
	ruff check --fix .
	ruff format .
	$(CXX_FILES) | xargs clang-format -i

build: configure ## Compile what has changed into dmax_kernels/lib, beside the Python sources.
	@cmake --build $(BUILD)
	@cmake --install $(BUILD) --prefix . >/dev/null

build-cpu: configure ## Compile without the CUDA kernels, which take nvcc some minutes.
	@cmake --build $(BUILD) --target dmax_cpu
	@cmake --install $(BUILD) --prefix . --component cpu >/dev/null

configure: $(ENVIRONMENT)
	@test -f $(BUILD)/build.ninja || cmake -S . -B $(BUILD) -G Ninja \
	  -DPython_EXECUTABLE="$$($(PYTHON) -c 'import sys; print(sys.executable)')"

# Every version comes from requirements.lock, those of indirect requirements too
.venv/installed: pyproject.toml requirements.lock
	python3 -m venv .venv
	.venv/bin/python -m pip install -q -c requirements.lock pip
	.venv/bin/python -m pip install -q --group dev -c requirements.lock
	@touch $@

lock: $(ENVIRONMENT) ## Renew requirements.lock from the ranges of pyproject.toml.
	$(PYTHON) -m uv pip compile -q --universal --python-version 3.10 --upgrade --no-annotate \
	  --custom-compile-command "make lock" --group release -o requirements.lock

wheels: $(ENVIRONMENT) ## Build, audit and try out the CPU and the CUDA wheel, in dist/.
	$(PYTHON) -m pip install -q --group release -c requirements.lock
	$(PYTHON) release/wheels.py

clean: ## Remove what was built, except .venv.
	rm -rf build dist dmax_kernels/lib .pytest_cache .ruff_cache
