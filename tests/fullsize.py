"""
Memory and speed at full size: Qwen2.5-VL as it is published, with random weights.

    python tests/fullsize.py --size 3b --plan       by arithmetic, without a GPU
    python tests/fullsize.py --size 3b              measured on the GPU at hand
    python tests/fullsize.py --size 3b --only doctor --model Qwen/Qwen2.5-VL-3B-Instruct

doctor checks a model before a real run. sft-4k is a step of sft.py on 4 dialogues of 4k tokens, one
per pass. grpo-8x5 is a step of grpo.py with 8 prompts x 5 rollouts, and 6 turns of 200 tokens or,
in grpo-8x5-8k, 10 turns of 512. decode is tokens/s; its bound only reads weights and cache once.
Each result is printed and appended to OUT/SIZE.jsonl at once, also errors. --size tiny takes
seconds on a CPU.
"""
import argparse
import functools
import gc
import json
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo
import judge
import sft
import torch
import toy
from transformers import Qwen2_5_VLConfig

ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
TOWER = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, window_size=112,
             fullatt_block_indexes=[7, 15, 23, 31])
# what differs from the toy's config
SIZES = {"tiny": {}, "3b": {
    "text_config": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                        num_attention_heads=16, num_key_value_heads=2, vocab_size=151936,
                        rope_parameters=ROPE),
    "vision_config": {**TOWER, "out_hidden_size": 2048}}, "7b": {
    "text_config": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                        num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
                        rope_parameters=ROPE, tie_word_embeddings=False),
    "vision_config": {**TOWER, "out_hidden_size": 3584}}}
RANK, SIDE, GIB, CUDA = 32, 504, 2 ** 30, torch.cuda.is_available()     # SIDE: pixels of a picture

# rows: of the cache, 5 per prompt; columns: tokens of a dialogue; micro: tokens of a forward pass
SHORT = {"rows": 40, "turns": 6, "user": 50, "reply": 200, "columns": 2048, "micro": 8192}
LONG = {"rows": 40, "turns": 10, "user": 250, "reply": 512, "columns": 8192, "micro": 8192}
ROWS = {"doctor": {"rows": 4, "turns": 2, "user": 50, "reply": 32, "columns": 1024},
        "sft-2k": {"micro": 2048}, "sft-4k": {"micro": 4096}, "sft-8k": {"micro": 8192},
        "grpo-8x5": SHORT, "grpo-8x5-8k": LONG,
        "grpo-4x5": {**SHORT, "rows": 20}, "grpo-4x5-8k": {**LONG, "rows": 20},
        "decode": {"rows": 80, "turns": 1, "user": 1450, "reply": 144, "columns": 2048}}
TINY = {"rows": 10, "turns": 2, "user": 5, "reply": 9, "columns": 512, "micro": 500}

# -----------------------------------------------------------------------------
# by arithmetic


@functools.cache
def published(size):
    """-> the model without memory for its weights (device meta), processor, tokenizer"""
    tokenizer = toy.make_tokenizer(random.Random(0))
    model, processor = toy.make_model(tokenizer)
    processor.size["longest_edge"] = 12_845_056
    settings = model.config.to_dict()
    del settings["text_config"]["layer_types"]
    for part, values in SIZES[size].items():
        settings[part].update(values)
    settings["tie_word_embeddings"] = size != "7b"
    with torch.device("meta"):
        model = type(model)._from_config(Qwen2_5_VLConfig(**settings), dtype=torch.bfloat16)
    return model, processor, tokenizer


def count(size):
    """-> weights in total, in the linear layers of the language model and in a LoRA; NF4 bytes"""
    model, linear, lora, nf4 = published(size)[0], 0, 0, 0
    for module in model.model.language_model.modules():
        if isinstance(module, torch.nn.Linear):
            weights = module.weight.numel()
            linear += weights
            lora += RANK * (module.in_features + module.out_features)
            # half a byte per weight, a byte of scale for 64 of them, and 4 bytes for 256 scales
            nf4 += weights // 2 + weights // 64 + 4 * -(-weights // (64 * 256)) + 4
    return sum(p.numel() for p in model.parameters()), linear, lora, nf4


def memory(size, row, state=2 + 8 / 256, chunk_logits=2 ** 26):
    """
    {phase: {part: bytes}} of a GPU when the most is in use. state: bytes of optimizer state per
    weight of the LoRA; chunk_logits: see sft.token_logps.
    """
    total, linear, lora, nf4 = count(size)
    c = published(size)[0].config.text_config
    hidden, mlp, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    kv = hidden // c.num_attention_heads * c.num_key_value_heads
    rows, tokens, phases = row.get("rows", 0), row.get("micro", 0), {}
    weights = {"NF4": nf4, "bf16": 2 * (total - linear),
               "LoRA": 4 * lora * (2 if rows and tokens else 1),        # policy and reference
               "optimizer": state * lora if tokens else 0, "dense copy": 2 * linear if rows else 0}
    if rows:
        # User turns go in as one pass: the first with its picture, later ones with a long history
        # whose keys and values are repeated for every head. The mask is kept twice.
        first, passes = row["user"] + 15 + (SIDE // 28) ** 2, []
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
        logits = 16 * c.vocab_size * min(tokens, max(32, chunk_logits // c.vocab_size))
        phases["update"] = {**weights, "gradients": 4 * lora,
                            "activations": 2 * layers * tokens * hidden + max(layer, logits)}
    return phases
