"""
Memory and hours at full size, by arithmetic: Qwen2.5-VL as it is published, without a GPU.

    python tests/plan.py 3b

fullsize.py measures the rows of SFT and GRPO on a GPU.
"""
import argparse
import functools

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

RANK = 32
# hidden size, MLP, layers, heads, key/value heads, vocabulary
SHAPES = {"3b": (2048, 11008, 36, 16, 2, 151936), "7b": (3584, 18944, 28, 28, 4, 152064),
          "tiny": (128, 256, 2, 4, 2, 1536)}
# rows: of the cache, 5 per prompt; columns: tokens of a dialogue; micro: tokens of a forward pass
SHORT = {"rows": 40, "turns": 6, "user": 50, "reply": 200, "columns": 2048, "micro": 8192}
LONG = {"rows": 40, "turns": 10, "user": 250, "reply": 512, "columns": 8192, "micro": 8192}
ROWS = {"doctor": {"rows": 8, "turns": 1, "user": 50, "reply": 32, "columns": 512},
        "sft-2k": {"micro": 2048}, "sft-4k": {"micro": 4096}, "sft-8k": {"micro": 8192},
        "grpo-8x5": SHORT, "grpo-8x5-8k": LONG,
        "grpo-4x5": {**SHORT, "rows": 20}, "grpo-4x5-8k": {**LONG, "rows": 20},
        "decode": {"rows": 80, "user": 1800, "reply": 200, "columns": 2048}}


@functools.cache
def published(size):
    """The model on the device meta, where weights take no memory."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size")
    hidden, _, _, heads, _, _ = SHAPES[size]
    section = [n * hidden // heads // 16 for n in (2, 3, 3)]        # rotary: time, height, width
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    text = dict(zip(names, SHAPES[size]), rope_parameters=rope)
    text.update(bos_token_id=None, eos_token_id=None)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, out_hidden_size=hidden)
    if size not in ("3b", "7b"):
        vision.update(depth=2, hidden_size=64, intermediate_size=128, num_heads=4)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision,
                              tie_word_embeddings=size == "3b")
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)


def memory(size, row):
    """{phase: {part: bytes}}: what a GPU holds when the most is in use"""
    hidden, mlp, layers, heads, kv_heads, vocabulary = SHAPES[size]
    kv, linear, lora, nf4, model = hidden // heads * kv_heads, 0, 0, 0, published(size)
    for module in model.model.language_model.modules():
        if isinstance(module, torch.nn.Linear):
            n = module.weight.numel()
            linear += n
            lora += RANK * (module.in_features + module.out_features)
            # half a byte per weight, a byte of scale for 64 of them, and 4 bytes for 256 scales
            nf4 += n // 2 + n // 64 + 4 * -(-n // (64 * 256)) + 4
    other = sum(p.numel() for p in model.parameters()) - linear
    rows, tokens, phases = row.get("rows", 0), row.get("micro", 0), {}
    weights = {"NF4": nf4, "bf16": 2 * other, "dense copy": 2 * linear if rows else 0,
               "LoRA": 4 * lora * (2 if rows and tokens else 1),        # policy and reference
               "optimizer": (2 + 8 / 256) * lora if tokens else 0}      # 8 bits, scales per block
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


def print_memory(size):
    plans = {name: row for name, row in ROWS.items() if "micro" in row}
    for batch in (20, 40, 100):
        plans[f"eval --batch {batch}"] = {**LONG, "rows": batch, "micro": 0}
    for name, row in plans.items():
        for phase, used in memory(size, row).items():
            parts = [f"{part} {n / 2 ** 30:.1f}" for part, n in used.items() if n]
            print(f"{name}, {phase}: {sum(used.values()) / 2 ** 30:.1f} GiB =", " + ".join(parts))


def print_hours(size):
    """
    For the paper's 12,934 SFT, 2,000 RL and 3,227 bench dialogues of 6.35, 8.33 and 8.55 turns. A
    turn has 280 tokens, 220 of them the reply, and a dialogue 350 more. The longest reply of a
    batch has 400 tokens, the longest dialogue 10 turns. There are 2 epochs of SFT and 1 of GRPO.
    Training reaches 30 % of the card's bf16 rate, and a decode step takes twice the time to read
    weights and cache. A call to a server has 2,000 tokens; a server answers 4 calls per second.
    """
    hidden, _, layers, heads, kv_heads, vocabulary = SHAPES[size]
    dense = memory(size, LONG)["rollout"]["dense copy"]                         # bytes
    read = dense + 2 * vocabulary * hidden
    cached = 4 * layers * hidden // heads * kv_heads * (350 + 8.5 * 280) / 2    # of a dialogue
    # FLOP/s and bytes/s of a card
    h100, rtx4090, l40s = (989e12, 3.35e12), (165e12, 1.01e12), (362e12, 0.86e12)
    cards = {"3b": {"RTX 4090 24 GB": (*rtx4090, 4, 20), "H100 80 GB": (*h100, 8, 100)},
             "7b": {"L40S 48 GB": (*l40s, 4, 20), "H100 80 GB": (*h100, 8, 40)}}
    for card, (flops, bandwidth, prompts, batch) in cards[size].items():
        token = dense / (0.3 * flops) / 3600                        # a pass over a token
        turn = 2 * 400 / bandwidth / 3600                           # a turn, per byte
        # forward, again and backward; in GRPO the reference, too
        train = 2 * 12_934 * 3 * token * (350 + 6.35 * 280)
        generate = 2_000 / prompts * 10 * turn * (read + 5 * prompts * cached)
        update = 2_000 * 5 * 4 * token * (350 + 8.33 * 280)
        evaluate = 3_227 / batch * 10 * turn * (read + batch * cached)
        print(f"{card}: SFT {train:.1f} h, GRPO --prompts {prompts}: rollouts {generate:.1f} h, "
              f"updates {update:.1f} h, eval --batch {batch}: {evaluate:.1f} h")
    # per seed and dialogue, and three per SFT turn; per turn of a rollout; per turn of the bench
    calls = {"synthesis": 18_161 / 3 + 18_161 + 3 * 12_934 * 6.35,
             "GRPO": 2_000 * 5 * 8.33, "evaluation of one arm": 3_227 * 8.55}
    for name, n in calls.items():
        print(f"{name}: {n:,.0f} calls, {n / 500:,.0f} M tokens, {n / 14_400:.1f} h")
    print(print_hours.__doc__)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Memory and hours at full size, by arithmetic")
    parser.add_argument("size", choices=("3b", "7b"))
    args = parser.parse_args(argv)
    print_memory(args.size)
    print_hours(args.size)


if __name__ == "__main__":
    main()
