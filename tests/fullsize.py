"""
Memory and speed at full size: Qwen2.5-VL as it is published, with random weights.

    python tests/fullsize.py --size 3b --plan       by arithmetic, without a GPU
    python tests/fullsize.py --size 3b              measured on the GPU at hand
    python tests/fullsize.py --size 3b --only doctor --model Qwen/Qwen2.5-VL-3B-Instruct

doctor: checks before a real run. sft-4k: a step on 4 dialogues of 4k tokens, one per pass. grpo-8x5:
a step on 8 prompts x 5 rollouts of 6 turns with 200 tokens; -8k: 10 turns, 8k tokens. decode: a
prompt of 1,800 tokens, then tokens/s. Results are appended to out/fullsize/SIZE.jsonl at once.
"""
import argparse
import functools
import json
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo
import sft
import tcsr
import torch
import toy
from transformers import Qwen2_5_VLConfig

OUT, RANK, CUDA = Path("out/fullsize"), 32, torch.cuda.is_available()
# hidden size, MLP, layers, heads, key/value heads, vocabulary
SHAPES = {"3b": (2048, 11008, 36, 16, 2, 151936), "7b": (3584, 18944, 28, 28, 4, 152064),
          "tiny": (128, 256, 2, 4, 2, 1536)}
# rows: of the cache, 5 per prompt; columns: tokens of a dialogue; micro: tokens of a forward pass
SHORT = {"rows": 40, "turns": 6, "user": 50, "reply": 200, "columns": 2048, "micro": 8192}
LONG = {"rows": 40, "turns": 10, "user": 250, "reply": 512, "columns": 8192, "micro": 8192}
ROWS = {"doctor": {"rows": 4, "user": 50, "reply": 32, "columns": 512},
        "sft-2k": {"micro": 2048}, "sft-4k": {"micro": 4096}, "sft-8k": {"micro": 8192},
        "grpo-8x5": SHORT, "grpo-8x5-8k": LONG,
        "grpo-4x5": {**SHORT, "rows": 20}, "grpo-4x5-8k": {**LONG, "rows": 20},
        "decode": {"rows": 80, "user": 1800, "reply": 144, "columns": 2048}}
TINY = {"rows": 10, "turns": 2, "user": 5, "reply": 6, "columns": 400, "micro": 400}

# -----------------------------------------------------------------------------
# by arithmetic


@functools.cache
def published(size):
    """-> the model on the device meta, where weights take no memory, a processor, a tokenizer"""
    tokenizer = toy.make_tokenizer(random.Random(0))
    model, processor = toy.make_model(tokenizer)
    processor.size["longest_edge"] = 12_845_056
    settings = model.config.to_dict()
    text, vision = settings["text_config"], settings["vision_config"]
    del text["layer_types"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size")
    text.update(zip(names, SHAPES[size]))
    vision["out_hidden_size"] = text["hidden_size"]
    if size in ("3b", "7b"):
        text["rope_parameters"].update(rope_theta=1e6, mrope_section=[16, 24, 24])
        vision.update(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                      window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
        settings["tie_word_embeddings"] = size == "3b"
    with torch.device("meta"):
        model = type(model)._from_config(Qwen2_5_VLConfig(**settings), dtype=torch.bfloat16)
    return model, processor, tokenizer


def memory(size, row):
    """{phase: {part: bytes}}: what a GPU holds when the most is in use"""
    hidden, mlp, layers, heads, kv_heads, vocabulary = SHAPES[size]
    kv, linear, lora, nf4 = hidden // heads * kv_heads, 0, 0, 0
    # q, k, v, o, gate, up, down
    for a, b in ((hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden), (hidden, mlp),
                 (hidden, mlp), (mlp, hidden)):
        linear += layers * a * b
        lora += layers * RANK * (a + b)
        # half a byte per weight, a byte of scale for 64 of them, and 4 bytes for 256 scales
        nf4 += layers * (a * b // 2 + a * b // 64 + 4 * -(-a * b // (64 * 256)) + 4)
    other = sum(p.numel() for p in published(size)[0].parameters()) - linear

    rows, tokens, phases = row.get("rows", 0), row.get("micro", 0), {}
    weights = {"NF4": nf4, "bf16": 2 * other,
               "LoRA": 4 * lora * (2 if rows and tokens else 1),        # policy and reference
               "optimizer": (2 + 8 / 256) * lora if tokens else 0,      # 8 bits, scales per block
               "dense copy": 2 * linear if rows else 0}
    if rows:
        # User turns go in as one pass: the first with its picture, later ones with a long history
        # whose keys and values are repeated for every head. The mask is kept twice.
        first, passes = row["user"] + 340, []
        for new, columns in ((first, first), (row["user"] + 8, row["columns"] - row["reply"])):
            attention = 2 * rows * hidden * (2 * columns + 5 * new)
            in_mlp = 2 * rows * new * (3 * mlp + 4 * hidden)
            passes.append(3 * rows * new * columns + max(attention, in_mlp))
        cache = 2 * 2 * layers * rows * row["columns"] * kv
        phases["rollout"] = {**weights, "KV cache": cache, "activations": max(passes)}
    if tokens:
        # A state per layer is kept. The backward pass also needs one layer again, mostly fp32
        # copies of its inputs for the LoRA, or one chunk of logits.
        layer = tokens * (46 * hidden + 14 * mlp + 8 * kv + 24 * RANK) + 2 * hidden * mlp
        logits = 16 * vocabulary * min(tokens, 2 ** 26 // vocabulary)
        phases["update"] = {**weights, "gradients": 4 * lora,
                            "activations": 2 * layers * tokens * hidden + max(layer, logits)}
    return phases


# bf16 FLOP/s and bytes/s of a card; --prompts of grpo.py and --batch of eval.py that fit
CARDS = {"3b": {"RTX 4090 24 GB": (165e12, 1.01e12, 4, 20), "H100 80 GB": (989e12, 3.35e12, 8, 100)},
         "7b": {"L40S 48 GB": (362e12, 0.86e12, 4, 20), "H100 80 GB": (989e12, 3.35e12, 8, 40)}}
# three calls per SFT turn, and one per seed and dialogue; one per turn of a rollout or a bench
CALLS = {"synthesis": 3 * 12_934 * 4.8 + 18_161 * 4 / 3, "GRPO": 2_000 * 5 * 4.8, "bench": 3_227 * 6}
ASSUMED = """
Assumed: the paper's 12,934 SFT, 2,000 RL and 3,227 bench dialogues of 4.8 turns (bench: 6) with 280
tokens, 220 of them the reply, and 350 tokens more; the longest reply of a batch has 400 tokens, its
longest dialogue 7 turns; 2 epochs of SFT, 1 of GRPO. Training reaches 30 % of the card's rate, a
decode step takes twice the time to read weights and cache. Servers: 2,000 tokens a call, 4 calls/s."""


def hours(size, flops, bandwidth, prompts, batch):
    """SFT, rollouts and updates of GRPO, and an evaluation, see ASSUMED"""
    hidden, _, layers, heads, kv_heads, vocabulary = SHAPES[size]
    dense = memory(size, LONG)["rollout"]["dense copy"]                     # bytes
    cached = 4 * layers * hidden // heads * kv_heads * (350 + 6 * 280) / 2  # bytes of a dialogue
    epoch = dense * (350 + 4.8 * 280) / (0.3 * flops) / 3600        # a pass over a dialogue
    turn = 2 * 400 / bandwidth / 3600                               # per byte that is read
    dense += 2 * vocabulary * hidden
    return (2 * 12_934 * 3 * epoch,                 # forward, recomputed, backward
            2_000 / prompts * 7 * turn * (dense + 5 * prompts * cached),
            2_000 * 5 * 4 * epoch,                  # and the reference
            3_227 / batch * 6 * turn * (dense + batch * cached))


def print_plan(size):
    plans = {name: row for name, row in ROWS.items() if "micro" in row}
    for batch in (20, 40, 100):
        plans[f"eval --batch {batch}"] = {**LONG, "rows": batch, "micro": 0}
    parts = [*memory(size, LONG)["rollout"], "gradients"]
    print(f"| {size}, GiB |", " | ".join(parts), "| sum |\n" + "|---" * (len(parts) + 2) + "|")
    for name, row in plans.items():
        for phase, used in memory(size, row).items():
            numbers = [used.get(part, 0) for part in parts] + [sum(used.values())]
            print(f"| {name}, {phase} |", " | ".join(f"{n / 2 ** 30:.1f}" for n in numbers), "|")
    for card, facts in CARDS[size].items():
        print("\n{}, --prompts {}, --batch {}: hours of".format(card, *facts[2:]),
              "SFT {:.1f}, GRPO {:.1f} + {:.1f}, evaluation {:.1f}".format(*hours(size, *facts)))
    for name, n in CALLS.items():
        print(f"{name}: {n:,.0f} calls, {n / 500:,.0f} M tokens, {n / 4 / 3600:.0f} hours")
    print(ASSUMED)


# -----------------------------------------------------------------------------
# measured


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def load(base, nf4=True):
    """A policy and its reference, as grpo.py loads them. No reply ends early."""
    student = grpo.load_policy(argparse.Namespace(model=base, nf4=nf4, adapter=None))
    student.base.activation_checkpointing_enable({"use_reentrant": False})
    student.allowed[student.end] = False
    return student


def opening(student, user, n):
    """The n-th picture and so many words, as a Row. "box" is one token for the toy and for Qwen."""
    path = OUT / f"{n}.png"
    toy.draw("box", "red", True, random.Random(n)).resize((504, 504)).save(path)
    content = [{"type": "image"}, {"type": "text", "text": " box" * user}]
    return sft.user_row(student, content, [str(path)], first=True)


def run_sft(base, row):
    student, length = load(base), row["micro"]
    student.model.delete_adapter("reference")
    args = sft.parse_args(f"--model - --data - --out - --micro_tokens {length}".split())
    optimizer, rows = sft.adamw(student, args.lr), []
    for n in range(4):
        r = opening(student, length // 5, n)
        r.add(r.ids[-1:] * (length - len(r.ids)), turn=0)
        rows.append(r)
    for _ in range(2):              # the first step only warms up
        begin = now()
        loss = sft.loss_over(student, rows, args, backward=True)
        sft.optimizer_step(optimizer, loss)
        seconds = now() - begin
    yield {"seconds": seconds, "tokens_per_s": 4 * length / seconds}


def run_grpo(base, row):
    learned = []

    def timed(*inputs):
        begin = now()
        output = sft.reply_logps(*inputs)
        learned.append(now() - begin)
        return output

    def tutor(rollouts):
        for r in rollouts:
            r.turns[-1]["reward"] = random.random()
            r.user = grpo.next_user(r, None, 10)
