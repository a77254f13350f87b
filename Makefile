# Everything that CI runs and people need. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PROTO_VENV := .venv-proto
PROTO  := vqserve/v1/tokenizer.proto vqserve/v1/admin.proto

.DEFAULT_GOAL := help
.PHONY: help setup demo serve console-pictures test test-fast test-busy test-search test-grpcio test-old soak coverage bench bench-behaviour bench-capacity bench-data-sets bench-gpu bench-sdk bench-search check format proto lock image image-test sbom docs docs-serve clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

# One install for every target: the stamp is remade when what it installs or compiles changes.
COMPILED := hatch_build.py $(wildcard server/vqserve_server/search/native/*.[ch])
$(VENV)/.installed: pyproject.toml constraints.txt $(COMPILED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vqserve needs Python 3.11 or later: make PYTHON=python3.11")'
	@echo 'installing into $(VENV), torch too: takes minutes'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.installed  ## make .venv with everything in it

demo: $(VENV)/.installed  ## tokenize a real picture with a real server
	$(BIN)/python examples/demo.py

serve: $(VENV)/.installed  ## serve the demo codebook on localhost:50051
	$(BIN)/vqserved serve

console-pictures: $(VENV)/.installed  ## make the pictures of the console in docs/assets again, from a server under load
	$(BIN)/python scripts/console_pictures.py

test: $(VENV)/.installed  ## run all tests, on all cores (`ARGS` narrows them)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

# For the inner loop: nothing that starts processes or is long, and fewer cases of the largest tests. `ARGS` narrows these two.
FAST ?= tests/wire tests/server tests/client --ignore=tests/client/bench
test-fast: $(VENV)/.installed  ## quick tests of SDK and server, on all cores (FAST=tests/tools: of the tools)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m 'not process and not long and not slow' \
		--search-rows 2000 --wire-cases 2000 $(FAST) $(ARGS)

test-busy: $(VENV)/.installed  ## run all tests while every core has other work
	$(BIN)/python scripts/busy.py $(ARGS)

ROWS ?= 10000000
test-search: $(VENV)/.installed  ## compare every search backend with an oracle on ROWS rows
	$(BIN)/python -m pytest tests/server/search/test_many_rows.py --search-rows $(ROWS) --timeout 0

# The ends of the range that server/vqserve_server/grpcio_release.py says is tested. Everything else comes from
# constraints.txt but protobuf, which the oldest grpcio-health-checking holds below 7. A release of grpcio that mends
# something need not have one of grpcio-health-checking and grpcio-reflection beside it.
GRPCIO_OLDEST := 1.72.2
GRPCIO_NEWEST := 1.85.3
.venv-grpcio-oldest/.installed: GRPCIO := $(GRPCIO_OLDEST)
.venv-grpcio-newest/.installed: GRPCIO := $(GRPCIO_NEWEST)
.venv-grpcio-%/.installed: pyproject.toml constraints.txt $(COMPILED) Makefile
	$(PYTHON) -m venv --clear $(@D)
	grep -vE '^(grpcio.*|protobuf)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt -e '.[dev]' \
		grpcio==$(GRPCIO) $(patsubst %,'%<=$(GRPCIO)',grpcio-health-checking grpcio-reflection)
	@touch $@

test-grpcio: .venv-grpcio-oldest/.installed .venv-grpcio-newest/.installed  ## rpc and client tests on the oldest and newest grpcio
	.venv-grpcio-oldest/bin/python -m pytest tests/server/rpc tests/client
	.venv-grpcio-newest/bin/python -m pytest tests/server/rpc tests/client

OLD ?= HEAD~1
test-old: $(VENV)/.installed  ## clients, servers and pickles of the commit OLD with these
	$(BIN)/python scripts/old_release.py $(OLD)

SOAK_SECONDS ?= 600
soak: $(VENV)/.installed  ## swap codebooks under load for SOAK_SECONDS, one a second
	$(BIN)/python -m pytest tests/server/repository/test_soak.py --soak-seconds $(SOAK_SECONDS) --timeout 0

# The science: what these lines do not reach cannot be trusted to compute what docs/quantizers.md says.
coverage: $(VENV)/.installed  ## tests of the server; fails below 95 % of the quantizers' and codebooks' lines
	$(BIN)/python -m pytest tests/server --cov vqserve_server.quantizers --cov vqserve_server.codebooks \
		--cov-report term-missing:skip-covered --cov-fail-under 95

bench-search: $(VENV)/.bench-installed  ## exact search beside the inexact ones (CODEBOOKS=DIR: on those)
	$(BIN)/python benchmarks/search.py $(if $(CODEBOOKS),--codebooks $(CODEBOOKS))

# Each in an environment of its own, with our search inside: the same wheel and the same torch.
PEERS := mosec pytriton
bench: $(VENV)/.bench-installed $(PEERS:%=benchmarks/peers/%/.venv/.installed)  ## serving beside its floors and peers
	$(BIN)/python benchmarks/serving.py $(CELLS)

bench-capacity: $(VENV)/.bench-installed benchmarks/peers/mosec/.venv/.installed  ## what one core serves, by h2load (Debian: nghttp2-client); ARGS="--split"
	$(BIN)/python benchmarks/capacity.py $(ARGS)

bench-data-sets: $(VENV)/.bench-installed  ## `vqserve encode` of data sets beside the load generator
	$(BIN)/python benchmarks/data_sets.py $(ARGS)

bench-sdk: $(VENV)/.bench-installed  ## what the SDK adds to a bare gRPC stub
	$(BIN)/python benchmarks/sdk_cost.py $(CELLS)

MINUTES ?= 8
bench-gpu: $(VENV)/.installed  ## exactness, search and server on a GPU, in MINUTES (ARGS)
	$(BIN)/python benchmarks/gpu.py --minutes $(MINUTES) $(ARGS)

bench-behaviour: $(VENV)/.bench-installed  ## latency, random arrivals, batching, workers, memory
	$(BIN)/python benchmarks/behaviour.py

benchmarks/peers/%/.venv/.installed: benchmarks/peers/%/requirements.txt $(VENV)/.installed
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $< '.[server]' $$(grep -m1 ^torch== constraints.txt)
	if [ -f benchmarks/peers/$*/mend.py ]; then $(@D)/bin/python benchmarks/peers/$*/mend.py; fi
	@touch $@

$(VENV)/.bench-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

check: $(VENV)/.installed $(PROTO_VENV)/.installed  ## what a change must pass beside the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/mypy
	$(BIN)/lint-imports
	@rm -rf build/proto && mkdir -p build/proto && $(call generate,build/proto)
	@diff -r -x __init__.py -x '*.proto' -x __pycache__ build/proto/vqserve/v1 proto/vqserve/v1 \
		|| { echo 'generated code is out of step with the .proto files: run `make proto`'; exit 1; }

format: $(VENV)/.installed  ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The generated code's version is the floor of the runtime, so it comes from the oldest tools that are
# supported, in an environment of their own.
$(PROTO_VENV)/.installed:
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check grpcio-tools==1.72.2 'setuptools<81'
	@touch $@

generate = $(PROTO_VENV)/bin/python -m grpc_tools.protoc -I proto --python_out=$(1) --pyi_out=$(1) \
	--grpc_python_out=$(1) $(PROTO)

proto: $(PROTO_VENV)/.installed  ## regenerate the code of proto/vqserve/v1/*.proto
	$(call generate,proto)

lock: $(VENV)/.installed  ## make constraints.txt again from the newest releases that fit together
	$(BIN)/python scripts/lock.py

image:  ## build the container image (IMAGE, BUILDER and BUILD_ARGS can be set)
	$(BUILDER) $(BUILD_ARGS) $(IMAGE_ARGS) -t $(IMAGE) .
IMAGE   ?= vqserve
BUILDER ?= docker build
# The time is always the same (the first that a zip can hold), so that a layer differs only if its content does.
IMAGE_ARGS = --build-arg SOURCE_DATE_EPOCH=315532800 \
	--build-arg VERSION=$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' proto/vqserve/__init__.py) \
	--build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null)

image-test: $(VENV)/.installed  ## build the image with buildah, run it, measure rebuilds (needs root and Debian's buildah)
	$(BIN)/python scripts/image_test.py

sbom: $(VENV)/.installed  ## list what the image installs in build/sbom.json (CycloneDX)
	$(BIN)/python scripts/sbom.py build/sbom.json

# Material's notice about its successor is no warning about our pages.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed  ## build the documentation's site into build/site; any warning fails
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.installed  ## show the site on http://127.0.0.1:8000, built anew when a page changes
	$(BIN)/mkdocs serve --livereload

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(PROTO_VENV) .venv-grpcio-* build dist out
	rm -f server/vqserve_server/search/native/libsearch.so
