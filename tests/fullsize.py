"""
Memory and speed at full size: the published shapes of Qwen2.5-VL, with random weights.

    python tests/fullsize.py --size 3b --plan     memory and hours by arithmetic, without a GPU
    python tests/fullsize.py --size 3b            all rows, measured on the GPU at hand
    python tests/fullsize.py --size 3b --only doctor --model Qwen/Qwen2.5-VL-3B-Instruct

doctor    checks before a real run, best with the real --model
sft-4k    a step of sft.py on 4 dialogues of 4k tokens, one dialogue per pass
grpo-8x5  a step of grpo.py, 8 prompts x 5 rollouts, 6 turns of 200 tokens; -8k: 10 turns of 512
decode    sampled tokens/s, also of generate() and of a step that only reads weights and cache once

Each result is printed and appended to OUT/SIZE.jsonl at once, errors too. --size tiny takes seconds
on a CPU, so that every line runs in the tests.
"""
import argparse
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
import sft
import torch
import toy
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

# hidden size, MLP, layers, heads, key/value heads, vocabulary, whether lm_head is the embedding
SHAPES = {"3b": (2048, 11008, 36, 16, 2, 151936, True), "tiny": (128, 256, 2, 4, 2, 1536, False),
          "7b": (3584, 18944, 28, 28, 4, 152064, False)}
RANK, SIDE, GIB, CUDA = 32, 504, 2 ** 30, torch.cuda.is_available()     # SIDE: pixels of a picture

# rows: of the cache, 5 per prompt; columns: tokens of a dialogue; micro: tokens of a forward pass
SHORT = {"rows": 40, "turns": 6, "user": 50, "reply": 200, "columns": 2048, "micro": 8192}
LONG = {"rows": 40, "turns": 10, "user": 250, "reply": 512, "columns": 8192, "micro": 8192}
EVAL = {"rows": 100, "user": 250, "reply": 512, "columns": 8192}
ROWS = {"doctor": {"rows": 4, "turns": 2, "user": 50, "reply": 32, "columns": 1024},
        "sft-2k": {"micro": 2048}, "sft-4k": {"micro": 4096}, "sft-8k": {"micro": 8192},
        "grpo-8x5": SHORT, "grpo-8x5-8k": LONG,
        "grpo-4x5": {**SHORT, "rows": 20}, "grpo-4x5-8k": {**LONG, "rows": 20},
        "decode": {"rows": 80, "turns": 1, "user": 1700, "reply": 144, "columns": 2560}}
TINY = {"rows": 10, "turns": 2, "user": 5, "reply": 9, "columns": 512, "micro": 500}

# -----------------------------------------------------------------------------
# by arithmetic


def config(size):
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied = SHAPES[size]
    section = [n * hidden // heads // 16 for n in (2, 3, 3)]        # rotary: time, height, width
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    text = dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp,
                num_hidden_layers=layers, num_attention_heads=heads, rope_parameters=rope,
                num_key_value_heads=kv_heads, bos_token_id=None, eos_token_id=None)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, out_hidden_size=hidden)
    if size not in ("3b", "7b"):
        vision.update(depth=2, hidden_size=64, intermediate_size=128, num_heads=4)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def count(size):
    """-> weights in total, in the linear layers of the language model and in a LoRA; NF4 bytes"""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config(size))
    linear = lora = nf4 = 0
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
    hidden, mlp, layers, heads, kv_heads, vocabulary, _ = SHAPES[size]
    total, linear, lora, nf4 = count(size)
    kv, rows, tokens, phases = kv_heads * hidden // heads, row.get("rows"), row.get("micro"), {}
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
        logits = 16 * vocabulary * min(tokens, max(32, chunk_logits // vocabulary))
        phases["update"] = {**weights, "gradients": 4 * lora,
                            "activations": 2 * layers * tokens * hidden + max(layer, logits)}
    return phases


# bf16 FLOP/s and bytes/s of a card; --prompts of grpo.py and --batch of eval.py that fit
CARDS = {"3b": {"RTX 4090, 24 GB": (165e12, 1.01e12, 4, 20), "H100, 80 GB": (989e12, 3.35e12, 8, 100)},
         "7b": {"L40S, 48 GB": (362e12, 0.86e12, 4, 20), "H100, 80 GB": (989e12, 3.35e12, 8, 40)}}
ASSUMED = """
Assumed: the paper's 12,934 SFT, 2,000 RL and 3,227 bench dialogues of 4.8 turns (bench: 6) with 280
tokens, 220 of them the reply, and 350 tokens more; the longest reply of a batch has 400 tokens, its
longest dialogue 7 turns; 2 epochs of SFT, 1 of GRPO. Training reaches 30 % of the card's rate, a
decode step takes twice the time to read weights and cache, half of each dialogue being there. A
call of a server has 2,000 tokens, and a server answers 4 calls per second."""
CALLS = {"synthesis": 18_161 / 3 + 18_161 + 3 * 12_934 * 4.8, "tutor": 2_000 * 5 * 4.8,
         "judge, per arm": 3_227 * 6}


def hours(size, flops, bandwidth, prompts, batch):
    """{stage: hours on the GPU}, see ASSUMED"""
    hidden, _, layers, heads, kv_heads, vocabulary, _ = SHAPES[size]
    linear = count(size)[1]
    # 2 operations per weight and token, in so many passes over the tokens
    train = 2 * linear * (350 + 4.8 * 280) / (0.3 * flops) / 3600
    read = 2 * (linear + vocabulary * hidden)
    cached = 4 * layers * kv_heads * hidden // heads * (350 + 6 * 280) / 2      # of one dialogue
    decode = 2 * 400 / bandwidth / 3600                                         # of one turn
    return {"SFT": 2 * 12_934 * 3 * train,              # forward, recomputed, backward
            "GRPO, generate": 2_000 / prompts * 7 * decode * (read + 5 * prompts * cached),
            "GRPO, update": 2_000 * 5 * 4 * train,      # and the reference
            "evaluation": 3_227 / batch * 6 * decode * (read + batch * cached)}


def print_plan(size):
    plans = {name: row for name, row in ROWS.items() if "micro" in row}
    for batch in (20, 40, 100):
        plans[f"eval --batch {batch}"] = {**EVAL, "rows": batch}
    parts = [*memory(size, EVAL)["rollout"], "gradients"]
    print(f"{size}: {count(size)[0]:,} weights\n\n| GiB | {' | '.join(parts)} | sum |")
    print("|---" * (len(parts) + 2) + "|")
    for name, row in plans.items():
        for phase, used in memory(size, row).items():
            cells = [f"{used.get(part, 0) / GIB:.1f}" for part in parts]
            print(f"| {name}, {phase} | {' | '.join(cells)} | {sum(used.values()) / GIB:.1f} |")
    for name, card in CARDS[size].items():
        stages = [f"{stage} {n:.1f}" for stage, n in hours(size, *card).items()]
        print(f"\nhours, {name}, --prompts {card[2]}, --batch {card[3]}: {', '.join(stages)}")
    for role, calls in CALLS.items():
        print(f"{role}: {calls:,.0f} calls, {calls / 500:,.0f} M tokens, {calls / 14_400:.0f} hours")
    print(ASSUMED)


# -----------------------------------------------------------------------------
# measured


def make_base(size, folder):
    """A folder like the hub's, with random weights and the toy's tokenizer."""
    tokenizer, settings = toy.make_tokenizer(random.Random(0)), config(size)
    settings.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    with torch.device("cuda" if CUDA else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(settings, dtype=torch.bfloat16)
    _, processor = toy.make_model(tokenizer)
    processor.size["longest_edge"] = 12_845_056
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)


def dialogue(folder, name, row):
    """User turns of so many tokens, with a picture. " box" is one token for the toy and for Qwen."""
    path = folder / f"{name}.png"
    toy.draw("box", "red", True, random.Random(name)).resize((SIDE, SIDE)).save(path)
    text = " box" * row["user"]
    messages = [{"role": "user", "content": text} for _ in range(row["turns"])]
    messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": text}]
    return {"id": name, "kind": "benign", "images": [str(path)], "messages": messages}


def play(student, lm, dialogues, row):
    """-> rollouts with random rewards, and the features of their pictures"""
    def tutor(rollouts):
        for r in rollouts:
            r.turns[-1]["reward"] = random.random()
            r.user = grpo.next_user(r, None, 10)

    args = argparse.Namespace(max_new=row["reply"], max_tokens=row["columns"], temperature=1.0)
    images = sft.encode_images(student, [path for d in dialogues for path in d["images"]])
    keys = [(0, n) for n in range(len(dialogues))]
    return grpo.rollout(student, lm, dialogues, keys, tutor, images, args), images


def eager(cache, step, width, inputs):
    """A decode step as it is without recording, to put in the place of KVCache.recorded."""
    return step(width)(*inputs)


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def learner(base, nf4=True):
    """-> a student whose LoRA is not 0, and its dense copy"""
    student = sft.load_student(base, nf4)
    sft.add_lora(student, RANK, 2 * RANK)
    student.base.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    for p in student.model.parameters():
        if p.requires_grad:
            p.data += 0.01 * torch.randn_like(p)
    lm = grpo.dense_copy(student)
    grpo.merge_adapter(student, lm)
    return student, lm


def logps_of(student, rows, images):
    with torch.no_grad():
        return sft.reply_logps(student, rows, images)[0]


def run_doctor(base, folder, row):
    student, lm = learner(base)
    shown = [dialogue(folder, n, row) for n in range(row["rows"])]
    text = [{**d, "images": [], "messages": d["messages"][1:]} for d in shown]

    r = sft.user_row(student, *grpo.user_turns(shown[0])[0], True)
    ids, grid = torch.tensor([r.ids]), torch.tensor([[1, 2 * r.grids[0][0], 2 * r.grids[0][1]]])
    theirs, _ = student.base.model.get_rope_index(ids, (ids == student.pad).int(), grid)
    ours = torch.tensor(sft.mrope_positions(student, r.ids, r.grids)[0])
    yield "positions that differ from get_rope_index", (ours != theirs[:, 0].T).sum().item(), 0

    fresh = play(student, lm, text, row)[0]
    rollouts, images = play(student, lm, shown, row)
    again = play(student, lm, text, row)[0]
    yield "text dialogues that differ after a picture", differ(fresh, again), 0

    path = folder / "large.png"
    toy.draw("box", "red", True, random.Random(0)).resize((4000, 3000)).save(path)
    yield "tokens of a large picture", len(sft.encode_images(student, [str(path)])[str(path)]), 334
