# The developer's interface; each target makes what it needs, and is quick the second time.
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
STAMP := .venv/.installed
SERVER := .venv/.installed-server
KERNEL := $(wildcard hessquik/backends/cpu/*.[ch])
TARGET ?= cpu
# A Python with torch for CUDA, triton and, for comparison, JAX.
GPU_PYTHON ?= python3
LOCK := $(BIN)/uv pip compile pyproject.toml --extra server --extra otel --constraint constraints.txt --generate-hashes \
	--python-version 3.11 --no-header --quiet --python-platform
# Where torch's CPU build is found: PyTorch's own index, or TORCH_CPU="--find-links FOLDER".
TORCH_CPU ?= --torch-backend cpu
# Tests start hundreds of processes that import torch: without cached bytecode each would compile it again, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve test quick bench chaos gpu sanitize fuzz check format docs wheels lock image image-test compose-test clean

# Two installs: what serving needs, and all that the tests need besides, which is several times as much.
define INSTALL
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable
endef

$(SERVER): pyproject.toml constraints.txt $(KERNEL)
	$(INSTALL) '.[server]'
	touch $@

$(STAMP): pyproject.toml constraints.txt $(KERNEL)
	$(INSTALL) '.[dev]'
	touch $(SERVER) $@

serve: $(SERVER)  ## serve models/ on http://127.0.0.1:8000 (PORT= changes it)
	$(BIN)/hessquik serve models --port $(PORT)

# Files are begun in the order of tests/conftest.py, those that take long first; pytest-xdist's own is by numbers of tests.
# Two processes test at once: threads of OpenMP that wait for a core make products ten times as slow.
test quick chaos: export OMP_NUM_THREADS = 1

test: $(STAMP)  ## all tests but those marked whole, counts in their short form
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

quick: $(STAMP)  ## the first case of each test that starts no process, for the inner loop; about a minute
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --quick -q

chaos: $(STAMP)  ## every test with every count in full, and those that take longest; about two hours, one of them simulated
	CHAOS=whole $(BIN)/python -m pytest --timeout 7200

sanitize: $(STAMP)  ## the C kernel under AddressSanitizer, UBSan and ThreadSanitizer
	$(BIN)/python tools/sanitize.py

fuzz: $(STAMP)  ## look for input that is not handled, a minute for each reader; finds go to build/fuzz
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python tools/fuzz.py

check: $(STAMP)  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## repair formatting and what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## engine and service against their peers; tables and plots into build/; needs wrk and haproxy
	mkdir -p build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	test -d .venv/original || $(BIN)/python -m pip install --quiet --no-deps --target .venv/original hessQuik==0.0.6
	PYTHONPATH=.venv/original $(BIN)/python -m benchmarks.engine --output build
	$(BIN)/python -m benchmarks.imported --output build
	$(BIN)/python -m benchmarks.serving --output build
	$(BIN)/python -m benchmarks.node --output build

# A part that fails or takes too long keeps the others from nothing: each writes what it has found as it goes.
gpu: export XLA_PYTHON_CLIENT_PREALLOCATE = false
gpu:  ## on a machine with a GPU: tests, times against JAX and a soak of the service, into build/; eight minutes at most
	mkdir -p build
	failed=0; \
	timeout -k 15 -s INT 140 $(GPU_PYTHON) -m pytest tests/gpu -q -n 4 --noconftest -p no:cacheprovider -c /dev/null --rootdir=. \
		--junitxml build/gpu-tests.xml || failed=1; \
	timeout -k 15 160 $(GPU_PYTHON) -m benchmarks.gpu --profile --seconds 110 --output build || failed=1; \
	timeout -k 15 -s INT 175 $(GPU_PYTHON) -m benchmarks.gpu_soak --seconds 75 --output build || failed=1; \
	exit $$failed

docs: $(STAMP)  ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheels: $(STAMP)  ## wheels for x86-64 and aarch64 with the kernel, and the source distribution, into dist/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[wheels]'
	$(BIN)/python deploy/wheels/build.py
	$(BIN)/python -m pytest deploy/wheels

lock: $(STAMP)  ## lock what the images install, CPU and CUDA, x86-64 and arm64, and list it in bills of materials
	$(LOCK) x86_64-manylinux_2_28 $(TORCH_CPU) --output-file requirements/cpu.lock
	$(LOCK) x86_64-manylinux_2_28 --output-file requirements/cuda.lock
	$(LOCK) aarch64-manylinux_2_28 --output-file requirements/cuda-arm64.lock
	echo mypy | $(BIN)/uv pip compile - --constraint constraints.txt --generate-hashes --python-version 3.11 \
		--no-header --quiet --output-file requirements/build.lock
	$(BIN)/python deploy/sbom.py requirements/c*.lock

image:  ## build the container image (TARGET=cuda for GPUs)
	docker build --build-arg TARGET=$(TARGET) --build-arg REVISION=$$(git rev-parse HEAD) --tag hessquik:$(TARGET) .

image-test: $(STAMP)  ## build the CPU image without a Docker engine, run it confined and question it
	deploy/image/build $(BIN)/python
	$(BIN)/python -m pytest deploy/image

compose-test: $(STAMP) image  ## with a Docker engine: build the CPU image, deploy the compose files and question them
	$(BIN)/python -m pytest deploy/compose

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info
