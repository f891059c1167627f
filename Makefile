# quickstart   set everything up, run the whole method on the embedded default, end with the report
# test         set everything up, run the quick tests          (make test-slow: the slow ones)
# check        ruff and pyright
# openpi       the real openpi-client plays episodes of CHECKPOINT=... through the policy server
# groot        and a client of GR00T's wire that is not ours, of strands-robots
# env-metaworld  env-libero  env-robocasa   a simulator's own environment, .venv-NAME, without torch
# setup        Debian packages for headless rendering and a browser, virtual environment, CPU torch, agra

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEBIAN_PACKAGES := libegl1 libgl1-mesa-dri
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow check openpi groot setup system opencv clean env-metaworld env-libero env-robocasa

quickstart: setup
	PATH="$(abspath $(BIN)):$$PATH" bash runs/quickstart.sh

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check src tests benchmarks runs
	$(BIN)/ruff format --check src tests benchmarks runs
	$(BIN)/pyright

openpi groot: setup
	PATH="$(abspath $(BIN)):$$PATH" bash runs/foreign_client.sh $@ $(CHECKPOINT) 5

setup: system $(VENV)/.installed

# Debian and its relatives only; elsewhere the system's own OpenGL serves.
system:
	@if command -v dpkg-query >/dev/null && ! dpkg-query -W $(DEBIAN_PACKAGES) >/dev/null 2>&1; then \
		$(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y --no-install-recommends $(DEBIAN_PACKAGES); fi
	@if ! $(PYTHON) -c 'import ensurepip' 2>/dev/null && command -v apt-get >/dev/null; then \
		$(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y python3-venv; fi
	@if command -v apt-get >/dev/null && ! command -v chromium google-chrome >/dev/null; then \
		$(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y --no-install-recommends chromium \
		|| echo "no Chromium from this system's packages: the tests of the report's page will be skipped"; fi

# torch first and alone: a later resolver run then finds it there and does not fetch another build.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[demo,dev]'
	@touch $@

# Suites pin versions that contradict each other, so each has an environment; agra evaluate --python uses it.
env-metaworld env-libero env-robocasa: env-%: system .venv-%/.installed

# robosuite imports the whole of OpenCV, which even without a screen is linked against these two.
env-libero env-robocasa: opencv
opencv:
	@if command -v dpkg-query >/dev/null && \
		! $(PYTHON) -c 'import ctypes; [ctypes.CDLL(f"lib{name}.so.{n}") for name, n in (("GL", 1), ("glib-2.0", 0))]' 2>/dev/null; \
		then $(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y --no-install-recommends libgl1 libglib2.0-0; fi

.venv-%/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install -q -e '.[$*,client]' pytest
	@touch $@

clean:
	rm -rf $(VENV) .venv-clients outputs build dist
