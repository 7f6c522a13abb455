# The two commands a new user needs are `make quickstart` and `make test`; `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The virtual environment that is active, or one of our own.
VENV ?= $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
PYTHON ?= python3
NPROC ?= 2
PORT ?= 29500
# torch for this machine: a CUDA build where the driver answers.
TORCH := $(if $(shell nvidia-smi -L 2>/dev/null),requirements-gpu.txt,requirements-cpu.txt)
DATA := data/quickstart
CORPORA := PythonSource PythonDocs
STAMP := $(VENV)/.based_mp_installed

export OMP_NUM_THREADS ?= 1
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help install quickstart quickstart-data tensorboard test test-fast lint bench kernels clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

install: $(STAMP) ## the package and its dependencies, in the active virtual environment or in .venv

$(STAMP): setup.py requirements-cpu.txt requirements-gpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11: install a newer one and pass PYTHON=python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { echo "error: cannot create $(VENV): install python3-venv (apt-get install python3-venv)" >&2; exit 2; }
	$(BIN)/pip install --disable-pip-version-check -q -r $(TORCH)
	BASED_MP_CUDA=0 $(BIN)/pip install --disable-pip-version-check -q -c $(TORCH) -e '.[test]'
	@touch $@

quickstart: quickstart-data ## train a small BASED on this machine: corpus, tokenizer, training, TensorBoard, checkpoint, text
	@echo "== training on $(NPROC) CPU processes"
	DS_ACCELERATOR=cpu deepspeed --num_accelerators $(NPROC) --master_port $(PORT) launch/pretrain.py \
	  --config configs/smoke_cpu.yaml
	@echo "== generating from the checkpoint"
	python launch/generate.py --checkpoint runs/smoke_cpu/checkpoints --prompt "def __init__(self, " --max-new-tokens 64
	@echo "== done: checkpoints in runs/smoke_cpu/checkpoints, curves with: make tensorboard"

quickstart-data: $(DATA)/.done

$(DATA)/.done: $(STAMP)
	@echo "== corpus from the Python standard library, tokenizer, indexed datasets"
	rm -rf $(DATA)
	python -m data_prep.demo_corpus --output $(DATA)
	python -m data_prep.train_tokenizer --input $(CORPORA:%=$(DATA)/%_train.jsonl.zst) \
	  --model-prefix $(DATA)/tokenizer --vocab-size 2048
	for part in $(CORPORA:%=%_train) $(CORPORA:%=%_val); do \
	  python -m data_prep.tokenize --input $(DATA)/$$part.jsonl.zst --output-prefix $(DATA)/$$part \
	    --tokenizer-type sentencepiece --tokenizer-model $(DATA)/tokenizer.model --workers $(NPROC); \
	  python -m data_prep.verify $(DATA)/$$part; \
	done
	@touch $@

tensorboard: $(STAMP) ## watch the runs at http://localhost:6006
	tensorboard --logdir runs

test: $(STAMP) ## every test this machine can run
	python -m pytest tests

test-fast: $(STAMP) ## the tests that need one process
	python -m pytest tests/cpu tests/parity

lint: $(STAMP) ## ruff
	ruff check .

bench: $(STAMP) ## time linear attention on this machine's Hopper GPU, after a correctness check (`make kernels` first)
	python benchmarks/linear_attention.py

kernels: $(STAMP) ## build csrc/ as based_mp._C (nvcc and a CUDA build of torch)
	$(BIN)/pip install -q setuptools wheel
	BASED_MP_CUDA=1 $(BIN)/pip install --no-build-isolation --no-deps -e .

clean: ## remove what the quick start wrote
	rm -rf $(DATA) runs/smoke_cpu
