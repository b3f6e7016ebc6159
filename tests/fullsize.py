"""
Memory and speed at full size: the published shapes of Qwen2.5-VL, with random weights.

    python tests/fullsize.py --size 3b --plan     memory and hours by arithmetic, without a GPU
    python tests/fullsize.py --size 3b            all rows, measured on the GPU at hand
    python tests/fullsize.py --size 3b --only doctor --model Qwen/Qwen2.5-VL-3B-Instruct

doctor    checks before a real run, best with the real --model: is it read, sampled, quantized and
          saved as the code assumes?
sft-2k    one step of sft.py on 4 dialogues of 2k tokens with a picture each; also sft-4k, sft-8k
grpo-8x5  one step of grpo.py, 8 prompts x 5 rollouts of 6 turns with 200 tokens; also grpo-4x5,
          and both with 10 turns and 8k tokens: grpo-8x5-8k, grpo-4x5-8k
decode    sampled tokens/s, beside generate() of transformers and a bound, which is the time to read
          the weights and the cache once

Each result is printed and appended to OUT/SIZE.jsonl as soon as it is there. A row that fails is
recorded with its error, and the next one begins. --size tiny takes seconds on a CPU.
"""
import argparse
import datetime
import gc
import json
import random
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo
import sft
import tcsr
import torch
import toy
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# -----------------------------------------------------------------------------
# the published shapes, and the rows

# hidden size, MLP, layers, heads, key/value heads, vocabulary, whether lm_head is the embedding
SHAPES = {"3b": (2048, 11008, 36, 16, 2, 151936, True), "7b": (3584, 18944, 28, 28, 4, 152064, False),
          "tiny": (128, 256, 2, 4, 2, 1536, False)}
SIDE = {"3b": 512, "7b": 512, "tiny": 56}       # of a picture, in pixels; 28 x 28 of them are a token
RANK = 32                                       # of the LoRA, the default of sft.py

GRPO = {"kind": "grpo", "prompts": 8, "turns": 6, "user": 50, "reply": 200, "columns": 2048}
LONG = {**GRPO, "turns": 10, "user": 250, "reply": 512, "columns": 8192}
ROWS = {
    "doctor": {"kind": "doctor"},
    "sft-2k": {"kind": "sft", "tokens": 2048},
    "sft-4k": {"kind": "sft", "tokens": 4096},
    "sft-8k": {"kind": "sft", "tokens": 8192},
    "grpo-8x5": GRPO, "grpo-8x5-8k": LONG,
    "grpo-4x5": {**GRPO, "prompts": 4}, "grpo-4x5-8k": {**LONG, "prompts": 4},
    "decode": {"kind": "decode", "rows": (1, 8, 20, 40, 80), "prompt": 1800, "columns": 2048,
               "new": (16, 144)},
}
SMALL = {"turns": 2, "user": 5, "reply": 4, "columns": 128}
TINY = {"sft": {"tokens": 96}, "grpo": SMALL, "doctor": {},
        "decode": {"rows": (1, 3), "prompt": 20, "columns": 40, "new": (2, 6)}}


def config(size):
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied = SHAPES[size]
    section = [n * hidden // heads // 16 for n in (2, 3, 3)]    # of a rotary half: time, y and x
    text = dict(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=128000,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": section})
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                  fullatt_block_indexes=[7, 15, 23, 31])
    if size == "tiny":
        vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4,
                      fullatt_block_indexes=[1])
    return Qwen2_5_VLConfig(text_config=text, tie_word_embeddings=tied,
                            vision_config={**vision, "out_hidden_size": hidden})


# -----------------------------------------------------------------------------
# by arithmetic


def count(size):
    """Numbers of weights: total, linear (what is NF4 and gets a LoRA), and of one LoRA; NF4 bytes."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config(size))
    n = Counter(total=sum(p.numel() for p in model.parameters()))
    for module in model.model.language_model.modules():
        if isinstance(module, torch.nn.Linear):
            weights = module.weight.numel()
            n["linear"] += weights
            n["lora"] += RANK * (module.in_features + module.out_features)
            # half a byte per weight, a byte of scale for 64 of them, and 4 bytes for 256 scales
            n["nf4"] += weights // 2 + weights // 64 + 4 * -(-weights // (64 * 256)) + 4
    return n


def memory(size, row, word=2, state=2 + 8 / 256, chunk_logits=2 ** 26):
    """
    Bytes on the GPU by what they are for, while the most is in use: {phase: {part: bytes}}.
    word: bytes per weight that is not NF4; state: bytes of optimizer state per weight of the LoRA.
    """
    hidden, mlp, layers, heads, kv_heads, vocabulary, _ = SHAPES[size]
    kv, n, kind = kv_heads * hidden // heads, count(size), row["kind"]
    weights = {"NF4": n["nf4"], "other weights": word * (n["total"] - n["linear"]),
               "LoRA": 4 * n["lora"] * (2 if kind == "grpo" else 1)}        # fp32
    if kind != "eval":
        weights["optimizer"] = state * n["lora"]
    if kind != "sft":
        weights["dense copy"] = word * n["linear"]
    phases = {}

    if kind != "sft":
        # the prompts of a turn in one pass: the MLP's states, or keys and values that are repeated
        # for every head, beside a mask in bool and in the precision of the model
        rows = row["prompts"] * 5
        picture = (SIDE[size] // 28) ** 2
        passes = []
        for tokens, columns in ((picture + row["user"] + 15, picture + row["user"] + 15),
                                (row["user"] + 8, row["columns"] - row["reply"])):
            passes.append(rows * tokens * word * (3 * mlp + 4 * hidden))
            passes.append(rows * columns * (2 * hidden * word + tokens * (1 + word)))
        cache = 2 * layers * rows * row["columns"] * kv * word
        phases["rollout"] = {**weights, "cache": cache, "activations": max(passes)}

    if kind != "eval":
        # A state per layer stays. The backward pass computes one layer again; most of what that
        # takes are the fp32 copies of its inputs for the LoRA. Or it computes a chunk of logits.
        tokens = max(row.get("tokens", 0), min(8192, row.get("micro", 8192)) if kind == "grpo" else 0)
        layer = tokens * (46 * hidden + 14 * mlp + 8 * kv + 24 * RANK) + word * hidden * mlp
        chunk = min(tokens, max(32, chunk_logits // vocabulary))
        logits = chunk * vocabulary * 16 + 2 * word * tokens * hidden
        phases["update"] = {**weights, "gradients": 4 * n["lora"],
                            "activations": layers * tokens * hidden * word + max(layer, logits)}
    return phases
