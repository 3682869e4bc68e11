# Every target says what it is for in `make help`. What has been done is remembered in build/*.stamp.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest
PACKAGES := fuse3 libfuse3-dev pkg-config gcc libc6-dev python3-dev python3-venv busybox-static cpio
NATIVE := $(wildcard emulator/native/*.[ch] emulator/guest/*.[ch] fakefs/fuse/*.[ch] fakefs/mirror/*.[ch])

.PHONY: help setup kernel run test test-unit test-native soak bench clients ftracetest lint docs man reference clean \
	distclean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: build/installed.stamp ## install Debian packages, Python packages and the C parts (what is missing of them)

build/packages.stamp:
	@mkdir -p build
	if ! command -v dpkg-query >/dev/null; then
		echo "setup: not a Debian system; going on in the hope that it has: $(PACKAGES)"
		touch $@
		exit
	fi
	there=$$(dpkg-query -W -f '$${Package} $${db:Status-Status}\n' $(PACKAGES) 2>/dev/null || true)
	missing=
	for package in $(PACKAGES); do
		[[ $$'\n'$$there$$'\n' == *$$'\n'"$$package installed"$$'\n'* ]] || missing+=" $$package"
	done
	if [[ $$missing && $$(id -u) != 0 ]]; then
		echo "setup: Debian packages are missing; as root: apt-get install$$missing" >&2
		exit 1
	elif [[ $$missing ]]; then
		echo "setup: apt-get install$$missing"
		export DEBIAN_FRONTEND=noninteractive
		install() { apt-get install -qq -y --no-install-recommends $$missing >build/apt.log 2>&1; }
		install || { apt-get update -qq >build/apt.log 2>&1 && install; } || {
			cat build/apt.log >&2
			echo "setup: apt-get could not install$$missing" >&2
			exit 1
		}
	fi
	touch $@

$(BIN)/python: | build/packages.stamp
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
		echo "setup: $(PYTHON) is not Python 3.11 or newer: make PYTHON=/path/to/python3 setup" >&2
		exit 1
	}
	echo "setup: .venv"
	$(PYTHON) -m venv .venv

build/dependencies.stamp: pyproject.toml | build/packages.stamp $(BIN)/python
	@echo "setup: what fakefs needs"
	read='import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]
	print("setuptools>=77", *project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")'
	$(BIN)/python -c "$$read" >build/requirements.txt
	$(BIN)/python -m pip --disable-pip-version-check install -r build/requirements.txt >build/pip.log 2>&1 || {
		cat build/pip.log >&2
		echo "setup: pip could not install what fakefs needs: see above" >&2
		exit 1
	}
	touch $@

# Without build isolation, which would ask the network for setuptools after each change to C. The dependencies need it
# (pyfuse3 is built here, and does not know its version without setuptools-scm), so they come before.
build/installed.stamp: setup.py $(NATIVE) build/dependencies.stamp
	@echo "setup: fakefs"
	$(BIN)/python -m pip --disable-pip-version-check install --no-build-isolation --no-deps -e . >build/pip.log 2>&1 || {
		cat build/pip.log >&2
		echo "setup: pip could not install fakefs: see above" >&2
		exit 1
	}
	touch $@

kernel: setup ## fetch the default kernel into the user's cache, unless it is there
	@path=$$(tail -n 1 build/kernel.stamp 2>/dev/null || true)
	if [[ ! -e $$path ]]; then
		$(BIN)/fakefs kernel fetch >build/kernel.stamp || { rm -f build/kernel.stamp; exit 1; }
	fi

run: setup kernel ## a short demonstration
	@PATH="$$PWD/$(BIN):$$PATH" examples/demo.sh

# Both are run in any case, so that one report tells all; pytest's closing line is the last.
test: setup kernel ## linters, then the tests: unit, guest, mount
	@status=0
	$(MAKE) lint || status=$$?
	$(PYTEST) -m "not slow and not bench" tests/unit tests/guest tests/mount || status=$$?
	exit $$status

test-unit: setup ## tests that need neither kernel nor mount
	@$(PYTEST) -m "not slow and not bench" tests/unit

test-native: setup ## the C parts alone, under AddressSanitizer and UBSan
	@$(PYTEST) -rP tests/unit/test_native.py

soak: setup kernel ## the slow tests
	@$(PYTEST) -m slow tests

bench: setup kernel ## measure; the numbers go to build/bench.json
	@$(BIN)/python bench/run.py

lint: setup ## ruff, mypy --strict, and shellcheck if it is installed
	@status=0
	$(BIN)/ruff check -q . || status=1
	$(BIN)/ruff format -q --check . || { echo 'run ruff format'; status=1; }
	$(BIN)/mypy --no-error-summary || status=1
	if command -v shellcheck >/dev/null; then
		scripts=$$(grep -rlsE '^#!.*[/ ](ba|da)?sh( |$$)' --include='*.sh' --include=run .ci examples bench tests || true)
		shellcheck $$scripts || status=1
	fi
	exit $$status

clients: setup kernel ## real clients in the view of `fakefs run`; installs their Debian packages
	@status=0
	for client in container trace-cmd libtracefs perf-tools perf kernelshark; do tests/clients/$$client.sh || status=1; done
	exit $$status

ftracetest: setup ## the kernel's own tests in it; writes tests/clients/ftracetest.tsv
	@$(BIN)/python -m tests.clients.ftracetest

docs: build/docs.stamp ## the user guide, build/docs/index.html; warnings are errors
	@$(BIN)/sphinx-build -q -W --keep-going -E -d build/doctrees docs build/docs
	echo "build/docs/index.html"

build/docs.stamp: pyproject.toml | build/installed.stamp
	@echo "docs: what the user guide needs"
	read='import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]
	print(*project["optional-dependencies"]["docs"], sep="\n")'
	$(BIN)/python -c "$$read" >build/docs-requirements.txt
	$(BIN)/python -m pip --disable-pip-version-check install -r build/docs-requirements.txt >build/pip.log 2>&1 || {
		cat build/pip.log >&2
		echo "docs: pip could not install what the user guide needs: see above" >&2
		exit 1
	}
	touch $@

man: setup ## man pages, in build/man
	@$(BIN)/python docs/manual.py man build/man
	echo "man -l build/man/fakefs.1"

reference: setup ## docs/commands.md anew, after a change to the command line
	@$(BIN)/python docs/manual.py markdown docs/commands.md

clean: ## remove everything built, but for .venv
	@rm -rf build dist ./*.egg-info emulator/_core*.so fakefs/fuse/_shim*.so fakefs/mirror/_notes*.so emulator/guest/agent emulator/guest/stub
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	@rm -rf .venv
