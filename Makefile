# The main commands. `make demo` and `make test` install what they need into .venv.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
# Use all cores with passive waiting: threads that spin while they wait would take cores from other processes.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT  ?= 0
export KMP_BLOCKTIME   ?= 0
PIP     = $(VENV)/bin/pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: demo test check talk smoke faults wer bench gpu big clean lines

demo: $(VENV)/demo        ## train the tiny model on real speech and write samples to out/demo/*.wav (CPU, minutes)
	$(RUN) train.py configs/tiny.py
	$(RUN) sample.py --ckpt out/demo --texts assets/demo.txt --out out/demo
	$(RUN) evaluate.py out/demo
	@echo
	@echo "Made: out/demo/000.wav ... 018.wav (16 digit strings never trained on, 3 phrases), samples.jsonl, curves.png."
	@echo "Next:  $(RUN) sample.py --ckpt out/demo --text \"four nine two seven\" --out x.wav     say something else"
	@echo "       $(RUN) data.py show configs/tiny.py                                             see what the model sees"
	@echo "       make wer                                                                        transcribe the samples and print the word error rate"

# Two processes with one thread each. PLAIN is the oldest instruction set, with other vector sizes and other rounding.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest -n 2 --dist loadfile
PLAIN  = ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 DNNL_MAX_CPU_ISA=SSE41
QUICK  = $(patsubst %,tests/test_%.py,checkpoint data lora loss model streams) tests/generation/test_sample.py tests/audio tests/layers \
         $(patsubst %,tests/families/test_%.py,csm dsaa higgs_v3 moshi_family orpheus parity personaplex qwen qwen_tts) tests/text/test_conversation.py \
         tests/training/test_parallel.py tests/evaluation/test_minimal_pairs.py tests/evaluation/test_sparse_autoencoder.py \
         tests/corpus/test_swap_tokenizer.py

talk: $(VENV)/serve       ## train the tiny conversation (CPU, minutes) and serve it: http://127.0.0.1:8998
	$(RUN) -m corpus.bundled out/cache/digits
	OMP_NUM_THREADS=2 $(RUN) train.py configs/tiny_duplex.py
	$(RUN) serve.py --ckpt out/talk --run out/talk

test: $(VENV)/test        ## lint and the whole test suite; then its quick files under the plainest instruction set
	$(VENV)/bin/ruff check .
	$(PYTEST)
	$(PLAIN) $(PYTEST) -m "not slow" $(QUICK)

check: $(VENV)/test       ## lint and the fast tests
	$(VENV)/bin/ruff check .
	$(PYTEST) -m "not slow"

faults: $(VENV)/test      ## kill each command at every file event, fail every call and allocation, damage 20,000 files (two cores, two hours)
	$(RUN) tests/faults.py --jobs=2
	$(RUN) tests/fuzz.py --cases=20000

smoke: $(VENV)/demo       ## every config's tiny twin: trains, resumes, evaluates on bundled data (CPU, minutes)
	for name in tiny tiny_clone higgs_ar higgs_full moshi_lora moshi_full ivr_qwen ivr_moss ivr_dpo dsaa csm \
		orpheus higgs_v3 qwen_tts personaplex kyutai_tts kyutai_stt hibiki tiny_duplex; do \
		$(RUN) train.py configs/$$name.py --smoke || exit 1; done
	$(RUN) evaluate.py sae configs/dsaa_ae.py --smoke

wer: $(VENV)/test         ## word error rate of the demo's recordings, by an offline speech recogniser
	$(RUN) evaluate.py out/demo

bench: $(VENV)/core       ## benchmarks against other implementations (those not installed are shown as "not measured"; minutes; kept in BENCHMARKS.json)
	$(RUN) bench.py loss --pairs=7 --keep=BENCHMARKS.json
	$(RUN) bench.py higgs --keep=BENCHMARKS.json
	$(RUN) bench.py moshi --keep=BENCHMARKS.json
	$(RUN) bench.py qwen --keep=BENCHMARKS.json
	$(RUN) bench.py decode --model=higgs --peer --width=256 --keep=BENCHMARKS.json
	$(RUN) bench.py decode --model=moshi --peer --width=256 --keep=BENCHMARKS.json
	$(RUN) bench.py decode --model=qwen --peer --width=256 --keep=BENCHMARKS.json
	$(RUN) bench.py tiny --keep=BENCHMARKS.json
	$(RUN) bench.py loader --keep=BENCHMARKS.json
	$(RUN) bench.py kernels --pairs=3 --keep=BENCHMARKS.json
	$(RUN) bench.py scaling --model=higgs --pairs=5 --keep=BENCHMARKS.json

gpu: $(VENV)/core         ## everything that needs a GPU: kernels, graphs, the table of BENCHMARKS.md (9 minutes; without one a rehearsal)
	$(RUN) bench.py gpu

big: $(VENV)/core         ## full-size random Qwen2.5-1.5B and Higgs v2 3B: load, train, sample, merge, export, and their peaks (35 GB of disk)
	$(RUN) tests/big.py

lines:                    ## number of lines: the core path, then each folder
	@wc -l config.py streams.py model.py lora.py loss.py data.py train.py sample.py | tail -1 | sed 's/total/core path/'
	@wc -l *.py | tail -1 | sed 's/total/top level/'
	@for room in */__init__.py; do wc -l $${room%/*}/*.py | tail -1 | sed "s,total,$${room%/*}/,"; done
	@wc -l configs/*.py | tail -1 | sed 's,total,configs/,'
	@find tests -name '*.py' -exec cat {} + | wc -l | sed 's,$$, tests/,'

clean:
	rm -rf out .pytest_cache .ruff_cache

$(VENV)/core: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('multistream needs Python 3.11 or newer, this is ' + sys.version.split()[0]) if sys.version_info < (3, 11) else 0"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

$(VENV)/demo: $(VENV)/core
	$(PIP) -e ".[log]"
	touch $@

$(VENV)/serve: $(VENV)/core
	$(PIP) -e ".[serve]"
	touch $@

$(VENV)/test: $(VENV)/core
	$(PIP) -e ".[dev,eval,speechmos]"
	$(PIP) --no-deps resemblyzer==0.1.4      # the weights of a speaker encoder; its other packages are not used
	touch $@
