# One word per chore; CI runs the same words. Each sets up .venv by itself.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: demo test slow check bench clean

demo: $(INSTALLED)
	$(BIN)/howfine demo

test: $(INSTALLED)
	$(PYTEST) -m "not slow" -n 2

slow: $(INSTALLED)
	$(PYTEST) -m slow -n 2

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy src
	$(PYTEST) tests/test_layers.py tests/test_chores.py tests/test_docs.py

bench: $(INSTALLED)
	$(BIN)/python bench/run.py

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The constraints pin every package, so each machine gets the same ones.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("howfine needs Python 3.11 or newer; name one with `make PYTHON=...`")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo,serve,peft,gguf,images,onnx,postgres,dev]"
	touch $@
