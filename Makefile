# make install   .venv with an editable install; all other targets but gpu-check and clean call it
# make demo      fine-tune SmolLM2-135M as a federation of 8 clients, about 5 minutes
# make federate-demo   the same over NVIDIA FLARE: a server and 3 sites, each a process, over TLS
# make test      run the tests
# make test-full run every combination of the kernels' tests, where make test has every pair of
#                values
# make test-interpret   run the kernels' tests in Triton's interpreter; make test does it too
# make bench     run every suite of benchmarks
# make compare   ZorBA beside federated baselines: accuracy, memory, bytes, time (docs/compare.md)
# make gpu-check everything that needs a GPU, under 8 minutes; installs nothing
# make gpu-check-rehearse   the same in small on the CPU: tests the check, measures nothing
# make sass      count the issue slots of the kernels in their machine code, and compare with the
#                recorded counts; needs no GPU (CUDA: what nvcc built; Triton: if it is installed)
# make lint      ruff, mypy, import-linter, clang-format
# make format    write what ruff and clang-format want
# make clean     remove .venv, builds, runs and the cache of models and data

PYTHON ?= python3
VENV ?= .venv
# The version that the tests run with. On a machine with a GPU: make install TORCH=torch
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# A process a core, and one. Tests of a file stay together, as they share what is slow to make, and
# in their order, so that a deployed federation starts early and is waited for beside other tests.
PARALLEL ?= -n auto --dist loadfile --no-loadscope-reorder
INTERPRETED := triton golden equality rank1 perturbed_linear fingerprint special_values table
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: install demo federate-demo test test-full test-interpret bench compare gpu-check gpu-check-rehearse sass lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py Makefile $(SOURCES)
	@echo "zorba: making $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade pip
	@echo "zorba: installing $(TORCH), unless some torch is there (the largest download)"
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -qq $(TORCH)
	@echo "zorba: installing what else is needed, and building the package (a few minutes)"
	@$(BIN)/python -m pip install -qq --editable '.[demo,test,lint]'
	@$(BIN)/python -c "import zorba_kernels as zk; print('zorba: built', zk.build_info())"
	@touch $@

demo: install
	$(BIN)/zorba demo

# The command refuses a folder with something in it: an earlier demo ends, and goes.
federate-demo: install
	@test ! -f runs/federate-demo/server/server.yaml || $(BIN)/zorba federate stop runs/federate-demo >/dev/null
	@rm -rf runs/federate-demo
	$(BIN)/zorba federate demo

test: install
	$(BIN)/python -m pytest tests $(PARALLEL) $(FULL)
	$(MAKE) test-interpret FULL=$(FULL)

test-full:
	$(MAKE) test FULL=--full

# In a process of its own: Triton decides at import whether its kernels are interpreted.
test-interpret: install
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) --server triton $(FULL) $(INTERPRETED:%=tests/kernels/test_%.py)

bench: install
	$(BIN)/python -m pytest benchmarks -p benchmarks.record \
	  --record benchmarks/results/latest.json --benchmark-json=benchmarks/results/latest-server.json

compare: install
	$(BIN)/python -m benchmarks.compare

gpu-check:
	$(PYTHON) -m benchmarks.gpu

gpu-check-rehearse: install
	$(BIN)/python -m benchmarks.gpu --rehearse

sass: install
	$(BIN)/python -m benchmarks.sass

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info runs .cache zorba_kernels/*.so
