"""
Memory and speed at full size: the published shapes of Qwen2.5-VL, with random weights.

    python tests/fullsize.py --size 3b --plan     memory and hours by arithmetic, without a GPU
    python tests/fullsize.py --size 3b            all rows, measured on the GPU at hand
    python tests/fullsize.py --size 3b --only doctor --model Qwen/Qwen2.5-VL-3B-Instruct

doctor    checks before a real run, best with the real --model
sft-2k    one step of sft.py on 4 dialogues of 2k tokens with a picture each; also sft-4k, sft-8k
grpo-8x5  one step of grpo.py, 8 prompts x 5 rollouts of 6 turns with 200 tokens; also grpo-4x5,
          and both with 10 turns and 8k tokens: grpo-8x5-8k, grpo-4x5-8k
decode    sampled tokens/s, beside generate() of transformers and a bound: the weights and the cache
          are read once per step

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
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo
import sft
import tcsr
import torch
import toy
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# hidden size, MLP, layers, heads, key/value heads, vocabulary, whether lm_head is the embedding
SHAPES = {"3b": (2048, 11008, 36, 16, 2, 151936, True),
          "7b": (3584, 18944, 28, 28, 4, 152064, False), "tiny": (128, 256, 2, 4, 2, 1536, False)}
SIDE = {"3b": 512, "7b": 512, "tiny": 56}       # of a picture, in pixels
RANK, GIB, CUDA = 32, 2 ** 30, torch.cuda.is_available()

# micro: tokens of a forward pass; user and reply: tokens of a turn; columns: of the cache
GRPO = {"kind": "grpo", "prompts": 8, "turns": 6, "user": 50, "reply": 200, "columns": 2048,
        "micro": 8192, "steps": 2}
LONG = {**GRPO, "turns": 10, "user": 250, "reply": 512, "columns": 8192, "steps": 1}
ROWS = {"doctor": {"kind": "doctor", "user": 50, "reply": 32, "columns": 1024},
        "sft-2k": {"kind": "sft", "micro": 2048}, "sft-4k": {"kind": "sft", "micro": 4096},
        "sft-8k": {"kind": "sft", "micro": 8192},
        "grpo-8x5": GRPO, "grpo-8x5-8k": LONG,
        "grpo-4x5": {**GRPO, "prompts": 4}, "grpo-4x5-8k": {**LONG, "prompts": 4},
        "decode": {"kind": "decode", "rows": (1, 8, 20, 40, 80), "user": 1800, "columns": 2048,
                   "new": (16, 144)}}
TINY = {"doctor": {"user": 5, "reply": 4, "columns": 64}, "sft": {"micro": 96},
        "grpo": {"prompts": 1, "turns": 2, "user": 5, "reply": 4, "columns": 64},
        "decode": {"rows": (1, 2), "user": 20, "columns": 64, "new": (2, 6)}}


def config(size):
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied = SHAPES[size]
    section = [n * hidden // heads // 16 for n in (2, 3, 3)]        # rotary: time, height, width
    text = dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, rms_norm_eps=1e-6,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                max_position_embeddings=128000, bos_token_id=None, eos_token_id=None,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6,
                                 "mrope_section": section})
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                  fullatt_block_indexes=[7, 15, 23, 31], out_hidden_size=hidden)
    if vocabulary < 10000:
        vision.update(depth=2, hidden_size=64, intermediate_size=128, num_heads=4,
                      fullatt_block_indexes=[1])
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


# -----------------------------------------------------------------------------
# by arithmetic


def count(size):
    """Weights in total, in the linear layers of the language model, in a LoRA, and NF4 bytes."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config(size))
    n = Counter(total=sum(p.numel() for p in model.parameters()))
    for module in model.model.language_model.modules():
        if isinstance(module, torch.nn.Linear):
            weights = module.weight.numel()
            n["linear"] += weights
            n["lora"] += RANK * (module.in_features + module.out_features)
            # half a byte per weight, a scale of one byte for 64 weights, and 4 for 256 scales
            n["nf4"] += weights // 2 + weights // 64 + 4 * -(-weights // (64 * 256)) + 4
    return n


def memory(size, row, state=2 + 8 / 256, chunk_logits=2 ** 26):
    """
    {phase: {part: bytes}}: what is in use on a GPU at the peak of each phase of a row.
    state: bytes of optimizer state per weight of the LoRA; chunk_logits: see sft.token_logps.
    """
    hidden, mlp, layers, heads, kv_heads, vocabulary, _ = SHAPES[size]
    n, kind, kv, phases = count(size), row["kind"], kv_heads * hidden // heads, {}
    weights = {"NF4": n["nf4"], "bf16": 2 * (n["total"] - n["linear"]), "LoRA": 4 * n["lora"]}
    if kind != "eval":
        weights["optimizer"] = state * n["lora"]
    if kind == "grpo":
        weights["LoRA"] *= 2                    # policy and reference
    if kind != "sft":
        weights["dense copy"] = 2 * n["linear"]
        # The user turns go in as one pass: the first ones with their pictures, later ones with a
        # long history, whose keys and values are repeated for every head.
        rows, first = 5 * row["prompts"], (SIDE[size] // 28) ** 2 + row["user"] + 15
        passes = []
        for new, columns in ((first, first), (row["user"] + 8, row["columns"] - row["reply"])):
            mask = 3 * rows * new * columns
            attention = 2 * rows * hidden * (2 * columns + 5 * new)
            passes.append(mask + max(attention, 2 * rows * new * (3 * mlp + 4 * hidden)))
        cache = 2 * 2 * layers * rows * row["columns"] * kv
        phases["rollout"] = {**weights, "KV cache": cache, "activations": max(passes)}
    if kind != "eval":
        # One state per layer is kept. In addition the backward pass needs one layer again, mostly
        # fp32 copies of inputs for the LoRA, or one chunk of logits.
        tokens = row["micro"]
        layer = tokens * (46 * hidden + 14 * mlp + 8 * kv + 24 * RANK) + 2 * hidden * mlp
        logits = 16 * vocabulary * min(tokens, max(32, chunk_logits // vocabulary))
        phases["update"] = {**weights, "gradients": 4 * n["lora"],
                            "activations": 2 * layers * tokens * hidden + max(layer, logits)}
    return phases


def peak(size, row):
    return max(sum(parts.values()) for parts in memory(size, row).values())


# GiB that are free, bf16 FLOP/s, bytes/s of memory
CARDS = {"RTX 4090, 24 GB": (23, 165e12, 1.01e12), "L40S, 48 GB": (44, 362e12, 0.86e12),
         "H100, 80 GB": (78, 989e12, 3.35e12)}
ASSUMED = """\
Assumed: the paper's 12,934, 2,000 and 3,227 dialogues; 4.8 turns each (bench: 6) of 280 tokens, 220
of them the reply, and 350 tokens for the picture and the template; the longest reply of a batch has
400 tokens; 2 epochs of SFT, 1 of GRPO with the largest --prompts of 8, 4, 2, 1 and one evaluation
with the largest --batch of 100, 40, 20, 10 whose peak at 8k tokens leaves a tenth of the memory
free. Training reaches 30 % of the card's bf16 rate. A decode step takes twice the time to read the
weights and the cache. A server replies 4 times per second."""


def hours(size, card):
    """{stage: hours} on one card, without the servers; the batch sizes stand in front."""
    free, flops, bandwidth = CARDS[card]
    hidden, _, layers, heads, kv_heads, vocabulary, _ = SHAPES[size]
    linear = count(size)["linear"]

    def largest(flag, choices, kind, per_prompt):
        for value in choices:
            row = {**LONG, "kind": kind, "prompts": value / per_prompt}
            if 1.1 * peak(size, row) < free * GIB:
                return {flag: value}
        return {}

    def train(tokens, passes):
        return 2 * linear * tokens * passes / (0.3 * flops) / 3600

    def decode(batches, rows, turns):
        weights = 2 * (linear + vocabulary * hidden)
        cache = 4 * layers * kv_heads * hidden / heads * rows * (350 + 280 * turns) / 2
        return batches * turns * 400 * 2 * (weights + cache) / bandwidth / 3600

    found = {**largest("--prompts", (8, 4, 2, 1), "grpo", 1),
             **largest("--batch", (100, 40, 20, 10), "eval", 5)}
    tokens = 350 + 280 * 4.8
    if peak(size, ROWS["sft-8k"]) < free * GIB:         # forward, recomputed, backward
        found["SFT"] = train(2 * 12_934 * tokens, 3)
    if "--prompts" in found:                            # the longest of a batch has 7 turns
        prompts = found["--prompts"]
        found["GRPO, generate"] = decode(2_000 / prompts, 5 * prompts, 7)
        found["GRPO, update"] = train(2_000 * 5 * tokens, 4)
    if "--batch" in found:
        found["evaluation"] = decode(3_227 / found["--batch"], found["--batch"], 6)
    return found
