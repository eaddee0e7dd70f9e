# The two commands: `make demo` runs the main job, `make test` passes the tests.
# Both set up .venv here and work on a fresh machine with Python 3.11+; the tests need a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
# Files stay whole: their tests share what is dear to make.
WORKERS := --numprocesses auto --maxprocesses 4 --dist loadfile
LLAMA_CMAKE := -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/cmake/llama-runtime-only.cmake

.PHONY: demo test test-slow check format docs clean

demo: $(VENV)/.runtime
	rm -rf demo
	$(BIN)/medmo-edge demo -o demo

test: $(VENV)/.dev check
	$(BIN)/python -m pytest -m "not slow and not gpu" $(WORKERS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow and not gpu"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Export and run need neither torch nor a compiler: ONNX Runtime comes as a wheel.
$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[cpu,export]"
	touch $@

# torch first and pinned: what comes after must not choose another build of it.
# llama-cpp-python compiles once, a few minutes on two cores.
$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) torch
	CMAKE_ARGS="$(LLAMA_CMAKE) $(CMAKE_ARGS)" $(PIP) --editable ".[cpu,llamacpp,tensorrt-rtx,export,dicom,serve,data,optimum,train,trl,dev]"
	touch $@

docs: $(VENV)/.runtime
	$(BIN)/python docs/write_modules.py

clean:
	rm -rf $(VENV) demo build dist *.egg-info
