# Every target sets itself up in .venv. PYTHON=python3 NO_VENV=1 uses the interpreter at hand (an offline GPU host).
PYTHON ?= python3
ifdef NO_VENV
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(PYTHONPATH)
else
PY := .venv/bin/python
READY := .venv/.ready
endif
OLDEST := .venv-oldest/bin/python
ifdef NO_VENV
PEERS := $(PY)
PEERS_READY :=
else
PEERS := .venv-peers/bin/python
PEERS_READY := .venv-peers/.ready
endif
comma := ,
SOURCES := byol_fast kernels tests benchmarks

.PHONY: demo test test-oldest test-peers check bench format docs dry gpu clean
.DELETE_ON_ERROR:

define install # folder, constraints, what, sizes
	@echo 'Installing into $(1): $(4).'
	$(PYTHON) -m venv --clear $(1)
	$(1)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt uv
	$(1)/bin/uv pip install -q --compile-bytecode --python $(1)/bin/python -c $(2) -b constraints.txt $(3)
	touch $(1)/.ready
endef

.venv/.ready: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,-e '.[dev]',3.5 GB to download and 7.4 GB on disk (0.3 and 1 GB without CUDA: see docs/install.md))

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(call install,.venv-oldest,constraints-oldest.txt,-e '.[dev]',3.2 GB to download and 6.2 GB on disk)

.venv-peers/.ready: pyproject.toml constraints.txt
	$(call install,.venv-peers,constraints.txt,-e '.[dev$(comma)peers]',3.7 GB to download and 8.2 GB on disk)

.venv-docs/.ready: pyproject.toml constraints.txt
	$(call install,.venv-docs,constraints.txt,--group docs,70 MB to download and 230 MB on disk)

demo: $(READY)
	$(PY) -m byol_fast demo

# All tests, then those of a GPU rehearsed on the CPU (those of the kernels run there already).
test: $(READY)
	$(PY) -m pytest -q -n auto --dist worksteal --durations=25 -m "not slow and not peers and not browser"
	BYOL_FAST_REHEARSE=1 $(PY) -m pytest -q -n auto --dist worksteal -m gpu tests/test_gpu.py tests/data tests/training tests/utils

# The kernels, the numbers, what is compiled, what a step asks of CUDA, and what uses torch's own parts (recomputation,
# pickled and traced models), on the oldest supported torch and triton.
test-oldest: .venv-oldest/.ready
	$(OLDEST) -m pytest -q -n auto --dist worksteal --durations=25 -m "not slow and not peers and not browser" tests/kernels tests/numbers tests/test_compiled.py tests/models/test_split_batchnorm_processes.py tests/test_cuda_operators.py tests/training/test_activation_checkpoint.py tests/models/test_changed_models.py

# Beside the other packages, in at most ten minutes on two CPU cores. Results go to bench/DATE-TIME.
bench: $(PEERS_READY)
	$(PEERS) -m byol_fast bench

# Numbers equal to those of the other packages.
test-peers: $(PEERS_READY)
	$(PEERS) -m pytest -q -m peers

check: $(READY)
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix $(SOURCES)
	$(PY) -m ruff format $(SOURCES)

# The documentation as a site, in site/; a warning is an error. In an environment of its own without torch (230 MB).
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build
	@echo 'site/index.html; with search: python3 -m http.server -d site'

# What only a GPU can show, in order of value, within MINUTES (6.3): results in benchmarks/results/GPU and OUT/results.tgz.
# LIST=1 shows the plan; ONLY=NAME,NAME some items; AGAIN=1 what was answered, too; REHEARSE=1 tiny sizes on the CPU.
gpu: $(READY)
	$(PY) -m benchmarks.gpu $(if $(MINUTES),--minutes $(MINUTES)) $(if $(OUT),--out $(OUT)) $(if $(ONLY),--only $(ONLY)) \
	  $(if $(LIST),--list) $(if $(AGAIN),--again) $(if $(REHEARSE),--rehearse)

# The GPU code without a GPU, in at most 12 minutes on two CPU cores; renews tests/cuda_operators.json. Not in CI.
dry:
ifdef SHIM
	$(SHIM)/run python -m tests.dry
else
	@echo 'make dry: SHIM must be a folder with a launcher `run`, got nothing, so nothing was tried. The launcher runs a program'
	@echo 'of a Python environment with a CUDA runtime that does nothing; tests/dry/__init__.py says what that takes.'
endif

clean:
	rm -rf .venv .venv-oldest .venv-peers .venv-docs site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
