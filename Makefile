# nanoSteer: lists of plain commands; paste any of them. `make toy SEED=1` for another seed.
SEED ?= 0
OUT ?= out/toy
PY = .venv/bin/python
SHELL = bash
# One torch thread each: two threads beside another busy process wait for each other, 20 times slower.
export OMP_NUM_THREADS = 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

# The toy world's hyper-parameters. Strategies: two for SFT, six for RL; the bench has all eight.
SFT_STRATEGIES = yes_ladder hypothetical_escalation
RL_STRATEGIES = $(SFT_STRATEGIES) sunk_cost_anchor gradual_desensitisation authority_escalation emotional_appeal
STUDENT = --threads 1 --max_tokens 1024
LORA = --lora_r 8 --lora_alpha 16
EVAL = $(PY) eval.py --model $(OUT)/world/base --data $(OUT)/data/bench.jsonl --judge toy --tutor toy \
	--attacker adaptive static --max_new 40 $(STUDENT)

.PHONY: toy test torture ablation
toy: .venv/toy
	rm -rf $(OUT)
	$(PY) toy.py make --out $(OUT)/world --seed $(SEED) --threads 1 $(WORLD)
	$(PY) synth.py --seeds $(OUT)/world/seeds.jsonl --generator toy --out $(OUT)/data --seed $(SEED) \
		--sft_strategies $(SFT_STRATEGIES) --rl_strategies $(RL_STRATEGIES)
	$(EVAL) --out $(OUT)/eval/base --name base > $(OUT)/base.log 2>&1 & other=$$!; \
	$(PY) sft.py --model $(OUT)/world/base --data $(OUT)/data/sft.jsonl --out $(OUT)/sft --seed $(SEED) \
		--batch 16 --lr 3e-3 --epochs 6 --patience 3 --eval_every 25 --micro_tokens 1500 --no-checkpointing \
		$(LORA) $(STUDENT) $(SFT) && wait $$other || { tail $(OUT)/base.log; exit 1; }
	$(EVAL) --adapter $(OUT)/sft --out $(OUT)/eval/sft --name sft > $(OUT)/sft.log 2>&1 & other=$$!; \
	$(PY) grpo.py --model $(OUT)/world/base --adapter $(OUT)/sft --data $(OUT)/data/rl.jsonl --out $(OUT)/grpo \
		--tutor toy --strategies $(RL_STRATEGIES) --seed $(SEED) --prompts 8 --group 5 --epochs 2 --lr 1e-3 \
		--beta 0.05 --max_new 40 --micro_tokens 2500 --no-checkpointing $(STUDENT) $(GRPO) && wait $$other || { tail $(OUT)/sft.log; exit 1; }
	$(EVAL) --adapter $(OUT)/grpo --out $(OUT)/eval/grpo --name grpo
	$(PY) eval.py compare $(OUT)/eval/base $(OUT)/eval/sft $(OUT)/eval/grpo $(OUT)/world $(OUT)/data $(OUT)/sft \
		$(OUT)/grpo --out $(OUT)

test: .venv/test
	$(PY) -m pytest -q tests

# file by file; a file that passed is not run again until out/torture is removed, so a stopped run can be resumed
torture: .venv/test
	mkdir -p out/torture
	for t in tests/test_*.py; do test -e out/$${t/tests/torture} || \
		{ $(PY) -m pytest -q $$t -m torture || [ $$? -eq 5 ]; } && touch out/$${t/tests/torture} || exit 1; done

# every arm of the reward, five seeds each: about 100 minutes; what is finished is not run again
ablation: .venv/toy
	$(PY) tests/ablation.py

# torch first and by itself: what else is installed must not bring another one
.venv/toy: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install -q $$(grep torch== requirements.txt)
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/test: .venv/toy tests/requirements.txt
	.venv/bin/pip install -q -r tests/requirements.txt
	touch $@
