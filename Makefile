PYTHON ?= python3
SOURCES = jax_flash tests tools examples benchmarks
CPP = $(wildcard bindings/*.cc bindings/*.h bindings/kernels/*.cc bindings/kernels/*.h) $(shell find cuda tests -name '*.h' -o -name '*.cuh' -o -name '*.cc')

.PHONY: help native test lint format bench resources sass sanitize fuzz docs

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

native:  ## build the extension in the source tree
	PYTHON=$(PYTHON) tools/build_native.sh

test:  ## all tests that this machine can run
	$(PYTHON) -m pytest

lint:  ## ruff, mypy and clang-format, changing nothing
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m mypy
	clang-format --dry-run -Werror $(CPP)

format:  ## let ruff and clang-format rewrite the sources
	$(PYTHON) -m ruff check --fix $(SOURCES)
	$(PYTHON) -m ruff format $(SOURCES)
	clang-format -i $(CPP)

bench:  ## speed on this machine, against its peers
	$(PYTHON) -m benchmarks

resources:  ## registers, spills and shared memory of every variant, by NVRTC without a GPU: rewrites tests/resources.csv
	$(PYTHON) tools/resources.py

sass:  ## machine code of a call, by NVRTC and nvdisasm without a GPU: make sass CALL="--head-dim 128 --causal --arch 9.0"
	$(PYTHON) tools/sass.py $(CALL)

sanitize:  ## every kernel under compute-sanitizer, on this machine's GPU
	$(PYTHON) tools/sanitize.py

fuzz:  ## random calls against the reference, on this machine's GPU
	$(PYTHON) tools/fuzz.py

docs:  ## the pages under docs/, in site/
	$(PYTHON) -m mkdocs build --strict
