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

OUT, RANK, DEVICE = Path("out/fullsize"), 32, "cuda" if torch.cuda.is_available() else "cpu"
# hidden size, MLP, layers, heads, key/value heads, vocabulary
SHAPES = {"3b": (2048, 11008, 36, 16, 2, 151936), "7b": (3584, 18944, 28, 28, 4, 152064),
          "tiny": (128, 256, 2, 4, 2, 1536)}
# rows: of the cache, 5 per prompt; columns: tokens of a dialogue; micro: tokens of a forward pass
SHORT = {"rows": 40, "turns": 6, "user": 50, "reply": 200, "columns": 2048, "micro": 8192}
LONG = {"rows": 40, "turns": 10, "user": 250, "reply": 512, "columns": 8192, "micro": 8192}
ROWS = {"doctor": {"rows": 4, "turns": 1, "user": 50, "reply": 32, "columns": 512},
        "sft-2k": {"micro": 2048}, "sft-4k": {"micro": 4096}, "sft-8k": {"micro": 8192},
        "grpo-8x5": SHORT, "grpo-8x5-8k": LONG,
        "grpo-4x5": {**SHORT, "rows": 20}, "grpo-4x5-8k": {**LONG, "rows": 20},
        "decode": {"rows": 80, "turns": 1, "user": 1450, "reply": 144, "columns": 2048}}
TINY = {"rows": 10, "turns": 2, "user": 5, "reply": 20, "columns": 450, "micro": 400}

# -----------------------------------------------------------------------------
# by arithmetic


@functools.cache
def published(size):
    """The model on the device meta, where weights take no memory."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size")
    hidden, _, _, heads, _, _ = SHAPES[size]
    section = [n * hidden // heads // 16 for n in (2, 3, 3)]        # rotary: time, height, width
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    text = dict(zip(names, SHAPES[size]), rope_parameters=rope, bos_token_id=None, eos_token_id=None)
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
    kv, linear, lora, nf4 = hidden // heads * kv_heads, 0, 0, 0
    for module in published(size).model.language_model.modules():
        if isinstance(module, torch.nn.Linear):
            n = module.weight.numel()
            linear += n
            lora += RANK * (module.in_features + module.out_features)
            # half a byte per weight, a byte of scale for 64 of them, and 4 bytes for 256 scales
            nf4 += n // 2 + n // 64 + 4 * -(-n // (64 * 256)) + 4
    other = sum(p.numel() for p in published(size).parameters()) - linear
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

    hidden, _, layers, heads, kv_heads, vocabulary = SHAPES[size]
    dense = memory(size, LONG)["rollout"]["dense copy"]                         # bytes
    read = dense + 2 * vocabulary * hidden
    cached = 4 * layers * hidden // heads * kv_heads * (350 + 6 * 280) / 2      # of a dialogue
    for card, (flops, bandwidth, prompts, batch) in CARDS[size].items():
        one = dense * (350 + 4.8 * 280) / (0.3 * flops) / 3600      # hours of a pass over a dialogue
        turn = 2 * 400 / bandwidth / 3600                           # and of a turn, per byte
        sft_hours = 2 * 12_934 * 3 * one                            # forward, again, backward
        generate = 2_000 / prompts * 7 * turn * (read + 5 * prompts * cached)
        update = 2_000 * 5 * 4 * one                                # and the reference
        evaluate = 3_227 / batch * 6 * turn * (read + batch * cached)
        print(f"\n{card}, hours: SFT {sft_hours:.1f}, GRPO --prompts {prompts} {generate:.1f} "
              f"generate + {update:.1f} update, eval --batch {batch} {evaluate:.1f}")
    for name, n in CALLS.items():
        print(f"{name}: {n:,.0f} calls, {n / 500:,.0f} M tokens, {n / 4 / 3600:.0f} hours")
    print(ASSUMED)


# -----------------------------------------------------------------------------
# measured


def now():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def eager(cache, step, width, inputs):
    """A decode step that is not recorded, in place of KVCache.recorded."""
    return step(width)(*inputs)


def load(base, nf4=True):
    """A policy and its reference as grpo.py loads them, and the dense copy. No reply ends early."""
    student = grpo.load_policy(argparse.Namespace(model=base, nf4=nf4, adapter=None))
    student.base.activation_checkpointing_enable({"use_reentrant": False})
    student.allowed[student.end] = False
    return student, grpo.dense_copy(student)


def follow_script(rollouts):
    for r in rollouts:
        r.user = grpo.next_user(r, None, 10)


def play(student, lm, row, pictures=True):
    """-> rollouts, five with each picture, and the features of the pictures"""
    text, dialogues, paths = " box" * row["user"], [], []           # " box" is one token
    for n in range(row["rows"]):
        messages = [{"role": "user", "content": text} for _ in range(row["turns"])]
        if pictures:
            messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": text}]
            paths.append(str(OUT / f"{n // 5}.png"))
            toy.draw("box", "red", True, random.Random(n // 5)).resize((504, 504)).save(paths[n])
        dialogues.append({"images": paths[n:], "messages": messages})
    args = argparse.Namespace(max_new=row["reply"], max_tokens=row["columns"], temperature=1.0)
    images, keys = sft.encode_images(student, paths), [(n,) for n in range(row["rows"])]
    return grpo.rollout(student, lm, dialogues, keys, follow_script, images, args), images


def run_doctor(base, row):
    def check(name, value, limit):
        return {"check": name, "value": float(value), "ok": bool(value <= limit)}

    def changed(before, pictures):
        again, _ = play(student, dense, row, pictures)
        return sum(a.ids != b.ids for a, b in zip(before, again))

    def logps(adapter):
        sft.use_adapter(student, adapter)
        with torch.no_grad():
            return sft.reply_logps(student, shown, images)[0].cpu()

    # a policy that differs from its reference
    student, dense = load(base)
    for name, p in student.model.named_parameters():
        if ".policy." in name:
            p.data += 0.01 * torch.randn_like(p)
    grpo.merge_adapter(student, dense)
    text, _ = play(student, dense, row, pictures=False)
    shown, images = play(student, dense, row)
    sampled = torch.tensor([logp for r in shown for logp in r.logps])
    learned, base_logps = logps("policy"), logps("reference")

    # pictures
    r, (height, width) = shown[0], shown[0].grids[0]
    ids, ours = torch.tensor([r.ids]), torch.tensor(sft.mrope_positions(student, r.ids, r.grids)[0])
    theirs, _ = student.base.model.get_rope_index(ids, (ids == student.pad).int(),
                                                  torch.tensor([[1, 2 * height, 2 * width]]))
    yield check("positions unlike get_rope_index", (ours != theirs[:, 0].T).sum(), 0)
    yield check("text replies changed by a picture before them", changed(text, False), 0)
    large = sft.image_grid(student, argparse.Namespace(width=4000, height=3000))
    yield check("tokens of a picture of 4000 x 3000", large[0] * large[1], 334)

    # sampler and learner
    with mock.patch.object(grpo.KVCache, "recorded", eager):
        yield check("replies changed without recording", changed(shown, True), 1)
    vars(student.base.generation_config).update(repetition_penalty=9.0, top_k=1)
    yield check("replies changed by the generation config", changed(shown, True), 0)
    yield check("mismatch, NF4", (learned - sampled).abs().mean(), 0.05)
    sft.save_adapter(student, OUT)
    sft.load_weights(student, OUT, "reference")
    yield check("adapter changed by reloading", (logps("reference") - learned).abs().max(), 1e-3)
    yield check("adapter without effect", (base_logps - learned).abs().mean() < 1e-4, 0)
    student, dense = load(base, nf4=False)
    sft.load_weights(student, OUT, "policy")
    grpo.merge_adapter(student, dense)
    d = logps("policy") - learned
    yield check("KL per token between NF4 and bf16", (torch.expm1(d) - d).mean(), 0.1)
    shown, images = play(student, dense, row)
    sampled = torch.tensor([logp for r in shown for logp in r.logps])
    yield check("mismatch, bf16", (logps("policy") - sampled).abs().mean(), 0.05)


def run_sft(base, row):
    (student, dense), tokens = load(base), row["micro"]
    del dense
    student.model.delete_adapter("reference")
    student.model.train()
    args = sft.parse_args(f"--model - --data - --out - --micro_tokens {tokens}".split())
    optimizer, words = sft.adamw(student, args.lr), sft.encode(student, " box" * tokens)
    rows = [sft.Row(words, [-1] * (tokens // 4) + [0] * (tokens - tokens // 4)) for _ in range(4)]
    for _ in range(2):              # the first step only warms up
        begin = now()
        sft.optimizer_step(optimizer, sft.loss_over(student, rows, args, backward=True))
        seconds = now() - begin
    yield {"seconds": seconds, "tokens_per_s": 4 * tokens / seconds}


def run_grpo(base, row):
    seconds = []

    def timed(*inputs):
        begin = now()
        output = sft.reply_logps(*inputs)
        seconds.append(now() - begin)
        return output

    student, dense = load(base)
    args = grpo.parse_args(f"--model - --data - --out - --tutor - --micro_tokens {row['micro']}".split())
    optimizer = sft.adamw(student, args.lr)
    begin = now()
    grpo.merge_adapter(student, dense)
    rollouts, images = play(student, dense, row)
    generate = now() - begin
    adv = torch.randn(row["rows"], row["turns"]).numpy()
    with mock.patch.object(grpo, "reply_logps", timed):
        stats = grpo.update(student, rollouts, adv, images, args, optimizer)
    update, tokens = now() - begin - generate, sum(len(r.logps) for r in rollouts)
    assert tokens == row["rows"] * row["turns"] * row["reply"]
    yield {"generate_s": generate, "logps_s": sum(seconds), "backward_s": update - sum(seconds),
           "sampled_tokens_per_s": tokens / generate, "mismatch": stats["mismatch"]}


def run_decode(base, row):
    def speed(reply):
        """Tokens/s of decoding alone: long replies less short ones. The first ones warm up."""
        seconds = []
        for new in (row["reply"] // 9, row["reply"] // 9, row["reply"]):
            begin = now()
            reply(new)
            seconds.append(now() - begin)
        return n * (row["reply"] - row["reply"] // 9) / (seconds[2] - seconds[1])

    def ours(new):
        play(student, lm, {**row, "rows": n, "reply": new}, pictures=False)

    def generate(new):
        ids = torch.full((n, row["user"]), 100, device=DEVICE)
        student.base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True,
                              min_new_tokens=new, max_new_tokens=new, top_k=0, top_p=1.0)

    for nf4 in (False, True):
        student = sft.load_student(base, nf4)
        if nf4:
            sft.add_lora(student, RANK, 2 * RANK)
        student.allowed[student.end] = False
        lm = student.base.model.language_model
        for n in (1, 8, 20, 40, row["rows"]):
            found = {"rows": n, "weights": "NF4" if nf4 else "bf16", "recorded": speed(ours)}
            with mock.patch.object(grpo.KVCache, "recorded", eager):
                found["eager"] = speed(ours)
            if not nf4:
                found["generate()"] = speed(generate)
                cache = grpo.KVCache(lm.config, n, row["columns"], student.base.dtype, DEVICE)
                begin = now()
                for x in [*lm.layers.parameters(), student.base.lm_head.weight, *cache.keys, *cache.values]:
                    x.max()
                found["bound"] = n / (now() - begin)
            yield found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", required=True, choices=SHAPES)
    add("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    add("--plan", action="store_true", help="print memory and hours by arithmetic")
    add("--model", help="name or folder of a real model, for doctor")
    args = parser.parse_args(argv)
    if args.plan:
        return print_plan(args.size)
    base = args.model or OUT / args.size
    OUT.mkdir(parents=True, exist_ok=True)
    if not args.model:
        tokenizer = toy.make_tokenizer(random.Random(0))
        with torch.device(DEVICE):
            model = Qwen2_5_VLForConditionalGeneration._from_config(published(args.size).config, dtype=torch.bfloat16)
        processor = toy.make_model(tokenizer)[1]
        processor.size["longest_edge"] = 12_845_056
        for part in (model, processor, tokenizer):
            part.save_pretrained(base)
        del model
    for name in args.only:
        row = ROWS[name]
        if args.size == "tiny":
            row = {key: TINY[key] for key in row}
        gc.collect()
        ...
