# Every target makes the environment it needs in .venv; nothing else has to be installed first.
# Variables: PYTHON (3.10 to 3.13), ARGS (passed on to the command of demo, test, bench), PYTHON37 (for
# test-clients: the newest Python that transformers 2.5.1 runs on).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
CLIENTS := .venv-clients
DOCS   := .venv-docs
BIN    := $(VENV)/bin
TEST_PYTHON = $(if $(VENV),$(BIN)/python,$(PYTHON))
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TORCH  := torch==2.13.0
PYTHON37 ?= python3.7
ARGS   ?=
# One more than there are cores, because many tests wait for others; at most 4, because of memory.
PROCESSES ?= $(shell echo $$(( $$(nproc) < 4 ? $$(nproc) + 1 : 4 )))
# A whole window of the sample, because whole windows are what it memorises.
SAMPLE_WINDOW := 清晨的湖面上升起一层薄薄的雾气，渔船慢慢划向对岸。老人把渔网撒进[MASK]里，耐心地等待着第一缕阳光。孩子们在岸边追逐嬉戏，笑声传得
# What the tokenizer and shard benchmarks read: prose first, then mixed, then Latin-heavy text. By default
# the development data beside the checkout; any text files and any vocab.txt of BERT will do.
BENCH_DATA ?= ../shared/data
BENCH_TEXTS ?= $(addprefix $(BENCH_DATA)/corpora/,laws_zh.txt.gz uer_CLUECorpusSmall_bert_sampled.txt.gz \
	d2l_zh.txt.gz paddle_docs_zh.txt.gz)
BENCH_VOCAB ?= $(BENCH_DATA)/vocab/vocab_google_chinese.txt
# Numeric tests that run on a GPU where there is one, in Triton's interpreter elsewhere.
KERNEL_TESTS := $(addprefix tests/test_,$(addsuffix .py,layer_norm bias_dropout_add_layer_norm \
	masked_softmax bias_gelu embedding_layer_norm registered tiles kernel_modules))

OTHER_PYTHONS := 3.10 3.12 3.13
LIGHT_TESTS := $(addprefix tests/test_,$(addsuffix .py,diagnosis ds_configs formats fuzz_inputs heartbeat \
	manifest masking order program restarts run_lock sample_index schedule stop stream_version tag_files))
# What setup.cfg requires, without torch, what is built on it, and TensorBoard.
LIGHT_REQUIREMENTS = import configparser; config = configparser.ConfigParser(); config.read("setup.cfg"); \
	heavy = ("torch", "deepspeed", "transformers", "datasets", "tensorboard"); \
	print(*(line.replace(" ", "") for line in config["options"]["install_requires"].split("\n") if line and not line.startswith(heavy)))

.PHONY: help demo sample test test-heavy test-pythons test-cluster test-clients test-gpu soak bench lint docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(VENV)/.demo  ## the main job on real text, start to finish, in under 10 minutes on 2 cores
	$(BIN)/clue-ds demo $(ARGS)

sample: $(VENV)/.demo  ## the smallest run: memorise four documents to an MLM accuracy of 1.0
	mkdir -p runs/sample
	$(BIN)/clue-ds vocab learn docs/examples/sample.txt --output runs/sample/vocab.txt \
		--size 600 --min-frequency 1
	$(BIN)/clue-ds shard docs/examples/sample.txt --vocab runs/sample/vocab.txt \
		--output runs/sample/corpus --force
	$(BIN)/clue-ds pretrain --config docs/examples/sample.yaml --data.corpus runs/sample/corpus \
		--run_dir runs/sample/run $(ARGS)
	$(BIN)/clue-ds predict --model runs/sample/run --fill-mask "$(SAMPLE_WINDOW)"

# One thread each, because threads of several processes that share cores wait for each other, busily.
PYTEST_ON_ALL_CORES = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev  ## the tests that need no GPU and no cluster, without the heavy ones; ends with the list of skips
	$(PYTEST_ON_ALL_CORES) -m "not heavy" $(ARGS)

test-heavy: $(VENV)/.dev  ## the tests that `make test` leaves out because each takes 15 seconds or more
	$(PYTEST_ON_ALL_CORES) -m heavy $(ARGS)

# All tests there: `make test VENV=.venv-3.12 PYTHON=python3.12`, which is 5 GB where torch has no CPU build.
# LIGHT_TESTS need no torch and no fixtures of conftest.py, which does.
test-pythons:  ## Python 3.10, 3.12 and 3.13, as far as they are here: the tests that need no torch
	@for version in $(OTHER_PYTHONS); do \
		python=; \
		for one in python$$version $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python 2>/dev/null); do \
			if $$one --version > /dev/null 2>&1; then python=$$one; break; fi; \
		done; \
		if [ -z "$$python" ]; then echo "there is no Python $$version on this machine: not tested"; continue; fi; \
		PYTHONPYCACHEPREFIX=build/pycache $$python -W error -m compileall -q -f clue_ds kernels launcher benchmarks tests docs || exit 1; \
		$$python -m venv build/python-$$version && own=build/python-$$version/bin/python || exit 1; \
		$$own -m pip --disable-pip-version-check install --quiet $$($$own -c '$(LIGHT_REQUIREMENTS)') \
			pytest pytest-timeout pytest-xdist hypothesis || exit 1; \
		$$own -m pip --disable-pip-version-check install --quiet --no-deps --editable . || exit 1; \
		$$own -m pytest --noconftest --numprocesses $(PROCESSES) --dist loadfile $(LIGHT_TESTS) $(ARGS) || exit 1; \
		DS_ACCELERATOR=cpu $$own -m clue_ds.launcher.launch --local 2 --dry-run -- pretrain --config run.yaml > /dev/null || exit 1; \
		echo "$$($$python --version) passes"; \
	done

test-clients: $(VENV)/.dev $(CLIENTS)/.done  ## TensorFlow, bert4keras and keras-bert read our exports
	CLIENTS_PYTHON=$(CLIENTS)/bin/python TRANSFORMERS4_PYTHON=$(CLIENTS)/4/bin/python \
		TRANSFORMERS2_PYTHON=$(wildcard $(CLIENTS)/2/bin/python) \
		TRANSFORMERS3_PYTHON=$(wildcard $(CLIENTS)/3/bin/python) \
		ONNXRUNTIME114_PYTHON=$(wildcard $(CLIENTS)/onnxruntime114/bin/python) \
		ONNXRUNTIME116_PYTHON=$(wildcard $(CLIENTS)/onnxruntime116/bin/python) \
		TRACKERS_PACKAGES=$(wildcard $(CURDIR)/$(CLIENTS)/trackers/lib/python*/site-packages) \
		MANIFESTS_PYTHON=$(wildcard $(CLIENTS)/manifests/bin/python) \
		$(BIN)/pytest tests/clients $(ARGS)

test-cluster: $(VENV)/.dev  ## real Slurm, ssh, mpirun: needs root and Debian packages (.ci/run names them)
	$(BIN)/pytest tests/cluster --numprocesses 2 --dist loadfile $(ARGS)

# Without a network: `make test-gpu VENV= PYTHON=python3`, with a Python that has torch for CUDA, triton,
# transformers, pytest and pytest-xdist, and this package (pip install --no-deps --no-build-isolation
# --editable .). Several processes, because compiling some 700 kernels takes longer than running them.
test-gpu: $(if $(VENV),$(VENV)/.dev)  ## what needs CUDA
	@failed=0; \
	$(TEST_PYTHON) -m pytest --numprocesses 8 --dist worksteal $(KERNEL_TESTS) $(ARGS) || failed=1; \
	$(TEST_PYTHON) -m pytest tests/gpu $(ARGS) || failed=1; \
	exit $$failed

soak: $(VENV)/.dev  ## an hour of kills and faults beside an undisturbed run; ARGS="--steps 1000" for less
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py $(ARGS)

bench: $(VENV)/.dev $(CLIENTS)/streaming/.done  ## the figures in benchmarks/results, made again on this machine
	$(BIN)/clue-ds bench pretrain --output benchmarks/results/pretrain.json $(ARGS)
	$(BIN)/python -c "from pathlib import Path; from clue_ds.demo import write_texts; write_texts(Path('build/text'))"
	$(BIN)/clue-ds bench tokenizer $(BENCH_TEXTS) --vocab $(BENCH_VOCAB) --output benchmarks/results/tokenizer.json
	$(BIN)/clue-ds bench shard $(firstword $(BENCH_TEXTS)) --vocab $(BENCH_VOCAB) --memory-megabytes 300 \
		--output benchmarks/results/shard.json
	$(BIN)/clue-ds bench loader --text build/text/news.txt --output benchmarks/results/loader.json \
		$(addprefix --transformers4-python ,$(wildcard $(CLIENTS)/4/bin/python)) \
		--streaming-python $(CLIENTS)/streaming/bin/python $(ARGS)
	$(BIN)/clue-ds bench scale --output benchmarks/results/scale.json
	$(BIN)/clue-ds bench cold --directory build --output benchmarks/results/cold.json
	$(BIN)/clue-ds bench finetune --data $(BENCH_DATA)/clue --vocab $(BENCH_DATA)/vocab/vocab_clue.txt \
		--output benchmarks/results/finetune.json
	$(BIN)/clue-ds bench finetune --data $(BENCH_DATA)/clue --vocab $(BENCH_DATA)/vocab/vocab_clue.txt \
		--task cmrc2018 --num-examples 32 --output benchmarks/results/finetune_span.json
	$(BIN)/clue-ds bench finetune --data $(BENCH_DATA)/clue --vocab $(BENCH_DATA)/vocab/vocab_clue.txt \
		--task cluener --output benchmarks/results/finetune_tag.json
	$(BIN)/clue-ds bench finetune --data $(BENCH_DATA)/clue --vocab $(BENCH_DATA)/vocab/vocab_clue.txt \
		--task c3 --num-examples 12 --output benchmarks/results/finetune_choice.json
	$(BIN)/clue-ds bench finetune --data $(BENCH_DATA)/clue --vocab $(BENCH_DATA)/vocab/vocab_clue.txt \
		--task chid --num-examples 48 --output benchmarks/results/finetune_cloze.json

lint: $(VENV)/.dev  ## ruff and mypy; mypy sees the mapped packages on an installed tree only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/tree build/lib build/bdist.* && $(PIP) install --quiet --no-deps --target build/tree .
	$(BIN)/mypy build/tree/clue_ds

docs: $(DOCS)/.done  ## the documentation as a site in build/site; strict: a broken link or anchor ends it
	$(DOCS)/bin/python docs/render_site.py $(ARGS)

clean:  ## the environments and build products
	rm -rf $(VENV) $(CLIENTS) $(DOCS) build dist *.egg-info

# torch comes first, because anything else that needs it would choose a build for us. Without a GPU we
# ask for the CPU build by its label and take the registry's default where it has no build so labelled.
# A CUDA build asks for the triton it was made with: our pin is for builds that bring none.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	@if nvidia-smi -L 2>/dev/null | grep -q GPU; then \
		echo "installing $(TORCH) (a GPU is present: the CUDA build)"; \
		$(PIP) install --quiet $(TORCH); \
	else \
		echo "installing $(TORCH) (no GPU: the CPU build where the registry has one)"; \
		$(PIP) install --quiet "$(TORCH)+cpu" 2>/dev/null || $(PIP) install --quiet $(TORCH); \
	fi
	@if $(PIP) show torch | grep -q '^Requires:.*triton'; then \
		grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt; \
	else \
		cp constraints.txt $(VENV)/constraints.txt; \
	fi
	touch $@

$(VENV)/.demo: $(VENV)/.torch setup.cfg
	$(PIP) install --quiet --constraint $(VENV)/constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch setup.cfg
	$(PIP) install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	touch $(VENV)/.demo $@

$(DOCS)/.done: docs/site/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	touch $@

# Peers of the loader benchmark that want other versions than ours.
$(CLIENTS)/streaming/.done:
	$(PYTHON) -m venv $(CLIENTS)/streaming
	$(CLIENTS)/streaming/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)+cpu" 2>/dev/null \
		|| $(CLIENTS)/streaming/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH)
	$(CLIENTS)/streaming/bin/python -m pip --disable-pip-version-check install --quiet mosaicml-streaming==0.13.0 litdata==0.2.76
	touch $@

# TensorFlow takes 1.4 GB; nothing of ours imports it, so it has an environment of its own.
$(CLIENTS)/.done: tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps bert4keras==0.11.5
	$(PYTHON) -m venv $(CLIENTS)/4
	$(CLIENTS)/4/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)+cpu" 2>/dev/null \
		|| $(CLIENTS)/4/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH)
	$(CLIENTS)/4/bin/python -m pip --disable-pip-version-check install --quiet transformers==4.57.6 \
		sentence-transformers==5.7.0 "optimum-onnx[onnxruntime]==0.1.0" MNN==3.6.1
	$(PYTHON) -m venv $(CLIENTS)/trackers
	$(CLIENTS)/trackers/bin/python -m pip --disable-pip-version-check install --quiet wandb==0.31.0 \
		swanlab==0.10.3 mlflow-skinny==3.17.2 SQLAlchemy==2.1.9 alembic==1.20.1
	$(PYTHON) -m venv $(CLIENTS)/manifests
	$(CLIENTS)/manifests/bin/python -m pip --disable-pip-version-check install --quiet kubeflow-training==1.9.4 \
		skypilot==0.14.1
	$(PYTHON) -m venv $(CLIENTS)/onnxruntime116
	@$(CLIENTS)/onnxruntime116/bin/python -m pip --disable-pip-version-check install --quiet onnxruntime==1.16.3 "numpy < 2" \
		|| { echo "no onnxruntime 1.16.3 for this Python: it will not be checked"; rm -r $(CLIENTS)/onnxruntime116; }
	@if $(PYTHON37) --version > /dev/null 2>&1; then \
		echo "installing transformers 2.5.1 and 3.5.1 and onnxruntime 1.14.1 with $(PYTHON37)"; \
		$(PYTHON37) -m venv $(CLIENTS)/2 \
		&& $(CLIENTS)/2/bin/python -m pip --disable-pip-version-check install --quiet torch==1.4.0 transformers==2.5.1 "protobuf < 4" \
		&& $(PYTHON37) -m venv $(CLIENTS)/3 \
		&& $(CLIENTS)/3/bin/python -m pip --disable-pip-version-check install --quiet torch==1.7.1 transformers==3.5.1 "protobuf < 4" \
		&& $(PYTHON37) -m venv $(CLIENTS)/onnxruntime114 \
		&& $(CLIENTS)/onnxruntime114/bin/python -m pip --disable-pip-version-check install --quiet onnxruntime==1.14.1; \
	else echo "no $(PYTHON37): transformers 2.5.1 and 3.5.1 and onnxruntime 1.14.1 will not be checked"; fi
	touch $@
