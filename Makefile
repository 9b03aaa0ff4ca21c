# Outside a virtual environment every verb first fills .venv (torch and the pins of constraints.txt); inside one it uses
# that one, which `make install` fills. PYTHON=... names another interpreter: `make gpu` needs one with a CUDA torch.
# DATA=DIR gives the tests the folder of real data, which they otherwise skip. One process per core runs them, a file at
# a time and in the order of their names: the longest, test_build.py, is among the first.

ifndef VIRTUAL_ENV
ifeq ($(origin PYTHON),undefined)
environment := .venv/installed
export PATH := $(CURDIR)/.venv/bin:$(PATH)
endif
endif
PYTHON ?= python
built := build/built
pip = $(PYTHON) -m pip --quiet --disable-pip-version-check

.PHONY: install demo test test-ptx bench gpu lint docs
.DELETE_ON_ERROR:
.SILENT:

install: $(or $(environment),fill)

demo: $(built)
	$(PYTHON) -m qrm_fast.cli demo

test: $(built)
	$(PYTHON) -m pytest $(if $(DATA),--real-data $(DATA)) -rs --durations=10 \
		-n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# The tests of Triton kernels on their PTX for sm_90, those of the heads for sm_80 as well; instructions per row.
test-ptx: export PYTHONPATH := tests:.
test-ptx: $(built)
	$(PYTHON) -m pytest -q tests/ptx
	EMULATED=90 $(PYTHON) -m pytest -q -n auto --maxprocesses 8 tests/ptx/mutants.py $$(grep -l triton_device tests/*.py)
	EMULATED=80 $(PYTHON) -m pytest -q -n auto --maxprocesses 8 tests/ptx/mutants.py tests/test_linear_*.py
	EMULATED=90 $(PYTHON) -m ptx.instructions

bench: $(built)
	$(PYTHON) -m bench

gpu: $(built)
	$(PYTHON) -m bench --device cuda --tests $(if $(DATA),--real-data $(DATA))

lint: $(environment)
	ruff check && ruff format --check && clang-format --dry-run -Werror $$(git ls-files csrc 'tests/ptx/*.cpp' 'tests/ptx/*.h') && mypy

docs: $(environment)
	$(PYTHON) -m bench --render
	$(PYTHON) tests/rl/test_architectures.py

$(built): setup.py $(shell find csrc -type f) | $(environment)
	echo "compiling the kernels (build/log)"
	mkdir -p $(@D)
	$(PYTHON) setup.py -q build_ext --inplace >build/log 2>&1 || { cat build/log; exit 1; }
	touch $@

.venv/installed: pyproject.toml constraints.txt
	python3 -m venv .venv
	$(MAKE) --no-print-directory fill PYTHON=python
	touch $@

# An installed torch is kept, and with it the Triton that a CUDA build of torch asks for by exact version.
.PHONY: fill
fill:
	echo "installing into $$($(PYTHON) -c 'import sys; print(sys.prefix)')"
	mkdir -p build
	$(PYTHON) -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' || \
		$(pip) install $$(grep ^torch== constraints.txt)
	$(PYTHON) -m pip show torch | grep -q 'Requires:.*triton' && kept='^torch==|^triton==' || kept='^torch=='; \
		grep -vE "$$kept" constraints.txt >build/constraints.txt
	$(pip) install -c build/constraints.txt setuptools wheel ninja pybind11 numpy
	$(pip) install -c build/constraints.txt --no-build-isolation -e '.[train,bench,test,dev]'
