"""fullsize.py: memory and speed of the real thing: published Qwen2.5-VL shapes, random weights, no download.

    python tests/fullsize.py --size 3b                    # every row, then the table; 80 GB card
    python tests/fullsize.py --size 7b --only sft-8k      # one row; rows measured earlier stay in the table
    python tests/fullsize.py --size 3b --plan             # the same memory by arithmetic, no GPU

Rows: sft-N, one optimiser step of sft.py on 4 dialogues of N tokens with one 512 x 512 image, one dialogue a forward.
grpo, one step of grpo.py: 8 prompts x 5 rollouts, 6 turns, 200 tokens a turn; grpo-8k: 10 turns of 512, 8k tokens in all;
grpo-8k-base: the same with 4 prompts, sampled from the NF4 base itself. decode-N: N rows with 1,800 tokens behind them in
a cache of 2,048: tokens/s of our decode from bf16 and from NF4, and of transformers' generate() from bf16; bound: the time
to read the bf16 weights and the allocated cache once. kernels: where a step of decode-40 spends its time. Unknown until
then: a step's attention has a mask, so sdpa takes its memory-efficient kernel, not flash; how well one block a row and
key head fills a card? Beside its seven products and its attention a layer is some 20 small kernels.

The second of two steps is reported, of the 8k rows the only one. The tutor answers at once, from this process; replies
never end early. Peak GiB are the allocator's, without the CUDA context (some 0.5). Results are appended to --out as JSON
lines, one a row; "mismatch" of a grpo row: mean |log-probability as sampled - as learned|, some 0.01 in bf16, near 1 if
a recorded step went wrong. --size tiny is for the tests: seconds on a CPU, the same code.
"""

import argparse
import gc
import json
import random
import sys
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import sft  # noqa: E402
import grpo  # noqa: E402
import torch  # noqa: E402
import toy  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

# (hidden, intermediate, layers, heads, key/value heads, vocabulary, tied) of the language model, (hidden, intermediate,
# depth, heads) of the tower: the public config.json
SIZES = {"3b": ((2048, 11008, 36, 16, 2, 151936, True), (1280, 3420, 32, 16)),
         "7b": ((3584, 18944, 28, 28, 4, 152064, False), (1280, 3420, 32, 16)),
         "tiny": ((128, 344, 2, 4, 2, 1536, False), (64, 128, 2, 4))}
SIDE = {"3b": 512, "7b": 512, "tiny": 56}  # pixels of a square image; 28 x 28 of them are a token
RANK = 32  # of the adapters: the default of sft.py
GIB = 2 ** 30

# What each row is made of; of "tiny" only the numbers are smaller.
SFT = dict(kind="sft", batch=4)
GRPO = dict(kind="grpo", prompts=8, group=5, weights="dense", micro=8192)
DECODE = dict(kind="decode", behind=1800, columns=2048, new=(16, 144))
ROWS = {**{f"sft-{n}k": dict(SFT, tokens=1024 * n) for n in (2, 4, 8)},
        "grpo": dict(GRPO, turns=6, user=50, reply=200, columns=2048),
        "grpo-8k": dict(GRPO, turns=10, user=250, reply=512, columns=8192, steps=1),
        "grpo-8k-base": dict(GRPO, prompts=4, weights="base", turns=10, user=250, reply=512, columns=8192, steps=1),
        **{f"decode-{n}": dict(DECODE, rows=n) for n in (1, 5, 20, 40, 80)},
        "kernels": dict(DECODE, kind="kernels", rows=40)}
TINY = {"sft-2k": dict(SFT, tokens=128),
        "grpo": dict(GRPO, prompts=2, group=2, turns=2, user=5, reply=4, columns=128, micro=64),
        "grpo-8k-base": dict(GRPO, prompts=1, group=2, weights="base", turns=2, user=5, reply=4, columns=128, micro=64),
        "decode-2": dict(DECODE, rows=2, behind=20, columns=32, new=(2, 6)),
        "kernels": dict(DECODE, kind="kernels", rows=2, behind=20, columns=32, new=(2, 6))}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", required=True, choices=SIZES)
    p.add_argument("--only", nargs="+", metavar="ROW", choices=[*ROWS, *TINY], help=", ".join(ROWS))
    p.add_argument("--plan", action="store_true", help="print the memory by arithmetic and stop")
    p.add_argument("--out", default="out/fullsize", help="folder for the random model and SIZE.jsonl")
    return p.parse_args(argv)


# ---------------------------------------------------------------- by arithmetic

def shapes(size):
    """(in, out) of the language model's seven kinds of linears; everything else of the model as a number of weights."""
    (h, i, layers, heads, kv, vocab, tied), (vh, vi, depth, _) = SIZES[size]
    k = h // heads * kv
    linears = [(h, h), (h, k), (h, k), (h, h), (h, i), (h, i), (i, h)]  # q, k, v, o, gate, up, down
    rest = {"embeddings": vocab * h * (1 if tied else 2), "biases and norms": layers * (h + 2 * k + 2 * h) + h,
            "tower": 3 * 2 * 14 * 14 * vh + depth * (4 * vh * vh + 4 * vh + 3 * vh * vi + 2 * vi + vh + 2 * vh),
            "projector": vh + (4 * vh) ** 2 + 4 * vh + 4 * vh * h + h}
    return linears, rest


def nf4_bytes(weights):
    """Half a byte a weight, a byte of scale for 64 of them, 4 bytes for 256 scales, and 4 for their offset."""
    return weights / 2 + weights / 64 + 4 * -(-weights // (64 * 256)) + 4


def plan(size, row, word=2, state=2 + 2 * 4 / 256, at_once=2 ** 26):
    """Peak bytes of a row by what they are for. word: bytes a weight that is not NF4; state: optimiser's bytes a trained
    weight; at_once: logits made together, see sft.token_logps."""
    h, i, layers, heads, kv, vocab, _ = SIZES[size][0]
    linears, rest = shapes(size)
    dense = layers * sum(a * b for a, b in linears)
    adapter = layers * RANK * sum(a + b for a, b in linears)  # fp32: peft trains adapters in full precision
    nf4 = layers * sum(nf4_bytes(a * b) for a, b in linears)
    training = row["kind"] in ("sft", "grpo")
    parts = {"weights": word * sum(rest.values()) + (nf4 if training else word * dense)}

    def update(tokens):
        """A forward and backward over so many tokens with checkpointing: a state a layer, and in one layer what autograd
        keeps of a recomputed forward and its backward, most of it the copies in fp32 that the adapters read. Logits have
        come and gone by then: what they take beyond that layer."""
        layer = tokens * (46 * h + 14 * i + 8 * (h // heads * kv) + 24 * RANK) + word * h * i  # + a dequantised linear
        logits = 4 * 3 * vocab * min(tokens, max(32, at_once // vocab)) + 2 * word * tokens * h
        return {"gradients": 4 * adapter, "activations": layers * tokens * h * word + layer,
                "logits": max(0, logits - layer)}

    if row["kind"] == "sft":
        return {**parts, "adapters": 4 * adapter, "optimizer": state * adapter, **update(row["tokens"])}
    rows = row["prompts"] * row["group"] if training else row["rows"]

    def prompt(tokens, columns):
        """A forward over so many new tokens a row: its MLP, with two products in fp32 where the adapter is not folded
        in; or its attention, where keys and values are repeated for every head because there is a mask (in bool, and
        once more in the precision of the model)."""
        mlp = 2 * word + 2 * 4 if row.get("weights") == "base" else 3 * word
        return max(rows * tokens * (mlp * i + 4 * word * h), rows * columns * (2 * h * word + tokens * (1 + word)))

    rollout = {"cache": layers * 2 * rows * kv * row["columns"] * (h // heads) * word,
               "logits": rows * vocab * (3 * 4 + 3 * 8)}  # in fp32, and their distribution in fp64, with copies
    if not training:
        return {**parts, **rollout, "activations": prompt(row["behind"], row["behind"])}
    parts |= {"dense copy": word * dense if row["weights"] == "dense" else 0, "adapters": 2 * 4 * adapter,
              "optimizer": state * adapter}
    first = (SIDE[size] // 28) ** 2 + row["user"] + 15  # the image is in the first turn
    rollout["activations"] = max(prompt(first, first), prompt(row["user"] + 8, row["columns"] - row["reply"]))
    learn = update(max(row["micro"], row["columns"]))
    return {**parts, **max(rollout, learn, key=lambda x: sum(x.values()))}  # one after the other


# ---------------------------------------------------------------- a model of the size, and dialogues of a length

def config(size, tok):
    (h, i, layers, heads, kv, vocab, tied), (vh, vi, depth, vheads) = SIZES[size]
    token = tok.convert_tokens_to_ids
    section = [n * h // heads // 16 for n in (2, 3, 3)]  # of half a head, for time, height and width
    return Qwen2_5_VLConfig(
        text_config=dict(vocab_size=vocab, hidden_size=h, intermediate_size=i, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=128000,
                         rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=token("<|im_end|>"),
                         pad_token_id=token("<|endoftext|>"),
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}),
        vision_config=dict(depth=depth, hidden_size=vh, intermediate_size=vi, num_heads=vheads, out_hidden_size=h,
                           fullatt_block_indexes=[*range(depth - 1, -1, -8)][::-1]),  # of 32: 7, 15, 23, 31
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=tied)


def make_base(size, folder):
    """A folder as the hub's, with random bf16 weights and a small tokenizer: the scripts load it as they load any."""
    if (folder / "config.json").exists():
        return folder
    tok = toy.make_tokenizer(random.Random(0))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config(size, tok), dtype=torch.bfloat16)
    model.save_pretrained(folder / "part", max_shard_size="5GB")
    tok.save_pretrained(folder / "part")
    Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 12845056}).save_pretrained(folder / "part")
    for file in sorted((folder / "part").iterdir(), key=lambda f: f.name == "config.json"):  # config.json last: all is there
        file.rename(folder / file.name)
    return folder


def words(n):
    return " box" * n  # each is one token of the toy's tokenizer


def dialogue(folder, name, turns, user, reply):
    """A dialogue with one image and so many tokens a turn."""
    path, side = folder / f"{name}.png", SIDE[folder.name]
    if not path.exists():
        Image.frombytes("RGB", (side, side), random.Random(name).randbytes(3 * side * side)).save(path)
    said = (("user", words(user)), ("assistant", words(reply)))
    messages = [{"role": role, "content": text} for _ in range(turns) for role, text in said]
    messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": words(user)}]
    return {"id": name, "seed_id": name, "kind": "red_team", "images": [str(path)], "messages": messages}


def dialogue_of(student, folder, name, tokens, user=50, reply=200):
    """Turns until it has exactly so many tokens."""
    count = lambda d: len(sft.render(student, d)[0].ids)
    one = dialogue(folder, name, 1, user, reply)
    each = count(dialogue(folder, name, 2, user, reply)) - count(one)
    whole = dialogue(folder, name, max(1, 1 + (tokens - count(one)) // each), user, reply)
    whole["messages"][-1]["content"] = words(reply + tokens - count(whole))
    return whole


# ---------------------------------------------------------------- measured

CUDA = torch.cuda.is_available()


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def begin():
    """Forget what is no longer used and the peak so far. -> now"""
    gc.collect()  # models hold on to themselves
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return now()


def timed(function, seconds, key):
    """-> the function with a clock that adds to seconds[key]."""
    def wrapper(*args, **kwargs):
        begun = now()
        out = function(*args, **kwargs)
        seconds[key] += now() - begun
        return out
    return wrapper


def run_sft(row, base, folder):
    student = sft.load_student(base)
    sft.add_lora(student, RANK, 2 * RANK)
    student.base.activation_checkpointing_enable({"use_reentrant": False})
    student.model.train()
    args = sft.parse_args(f"--model - --data - --out - --micro_tokens {row['tokens']} --max_tokens {row['tokens']}".split())
    optimizer = sft.adamw(student, args.lr)
    data = [dialogue_of(student, folder, f"picture-{n}", row["tokens"]) for n in range(row["batch"])]
    for _ in range(2):
        begun = begin()
        sft.loss_over(student, data, args, backward=True)
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = now() - begun
    return {"tokens_per_s": row["batch"] * row["tokens"] / seconds, "seconds": {"step": seconds}}


def run_grpo(row, base, folder):
    flags = {"model": base, "data": "-", "tutor": "-", "out": "-", "prompts": row["prompts"], "group": row["group"],
             "max_turns": row["turns"], "max_new": row["reply"], "max_tokens": row["columns"], "micro_tokens": row["micro"],
             "format_bonus": 1}  # with the gate babble is worth 0: all groups dead
    args = grpo.parse_args([f"--{k}={v}" for k, v in flags.items()])
    student = grpo.load_policy(args)
    student.allowed[student.end] = False  # no reply ends early
    dense = grpo.dense_copy(student) if row["weights"] == "dense" else None
    optimizer, rng = sft.adamw(student, args.lr), random.Random(0)
    batch = [dialogue(folder, f"picture-{n}", row["turns"], row["user"], 1) for n in range(row["prompts"])]

    def ask(requests):
        return [json.dumps({"scores": {k: rng.randint(1, 10) for k in ("safety", "usefulness", "faithfulness")},
                            "next_turn": words(row["user"])}) for _ in requests]

    seconds, names = Counter(), ("rollout", "update", "reply_logps", "fold", "tutor_turn")
    real = {name: getattr(grpo, name) for name in names}
    for name in names[:-1]:
        setattr(grpo, name, timed(real[name], seconds, name))
    grpo.tutor_turn = lambda ask, args: timed(real["tutor_turn"](ask, args), seconds, "tutor")
    try:
        for step in range(row.get("steps", 2)):
            seconds.clear()
            begun = begin()
            line, talks, _ = grpo.train_step(step, batch, student, dense, optimizer, ask, args)
            seconds["step"] = now() - begun
    finally:
        for name, function in real.items():
            setattr(grpo, name, function)
    assert line["tokens"] == len(talks) * row["turns"] * row["reply"] and line["dead"] == 0 and line["cut"] == 0, line
    parts = {"generate": seconds["rollout"] - seconds["tutor"], "tutor": seconds["tutor"],
             "log-probs": seconds["reply_logps"], "backward": seconds["update"] - seconds["reply_logps"],
             "fold": seconds["fold"], "step": seconds["step"]}
    return {"tokens_per_s": line["tokens"] / parts["generate"], "seconds": parts, "mismatch": line["mismatch"]}


def decoder(student, row):
    """-> f(new): one reply of so many tokens for every row, after a prompt of row["behind"] tokens."""
    student.allowed[student.end] = False
    empty = sft.Row()
    sft.add_user(student, empty, "", [])
    one = {"id": "x", "images": [], "messages": [{"role": "user", "content": words(row["behind"] - len(empty.ids))}]}

    def reply(new):
        args = argparse.Namespace(max_tokens=row["columns"], max_new=new, temperature=1.0)
        keys, last_turn = [(n,) for n in range(row["rows"])], lambda talks: [None] * len(talks)
        talks = grpo.rollout(student, [one] * row["rows"], keys, last_turn, args, {})
        assert all(len(t.logps) == new for t in talks)
        return talks
    return reply


def speed(row, reply):
    """Tokens/s of decoding alone: a long reply less a short one, each after the same prompt and the same recording."""
    seconds = []
    for new in (row["new"][0], *row["new"]):  # the first only warms up
        begun = now()
        reply(new)
        seconds.append(now() - begun)
    return row["rows"] * (row["new"][1] - row["new"][0]) / (seconds[2] - seconds[1])


def bandwidth():
    """Bytes/s of reading and writing memory."""
    where = dict(dtype=torch.uint8, device="cuda" if CUDA else "cpu")
    a, b = (torch.empty(GIB if CUDA else GIB // 64, **where) for _ in range(2))
    for _ in range(2):
        begun = now()
        for _ in range(8):
            b.copy_(a)
        seconds = now() - begun
    return 16 * len(a) / seconds


def run_decode(row, base, folder):
    student = sft.load_student(base, nf4=False)
    begin()
    found = {"ours": speed(row, decoder(student, row))}
    peak = torch.cuda.max_memory_allocated() if CUDA else 0

    def generate(new):
        ids = torch.full((row["rows"], row["behind"]), sft.encode(student, words(1))[0], device=student.base.device)
        out = student.base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                    min_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        assert out.shape[1] == row["behind"] + new
    found["generate()"] = speed(row, generate)
    lm, word = student.base.model.language_model, student.base.dtype.itemsize
    read = sum(p.numel() * word for p in lm.layers.parameters()) + student.base.lm_head.weight.numel() * word
    cache = grpo.Cache(lm.config, row["rows"], row["columns"], student.base.dtype, "meta")
    found["bound"] = row["rows"] * bandwidth() / (read + sum(kv.nbytes for kv in cache.kv))
    del student, lm, generate
    begin()
    student = sft.load_student(base)
    sft.add_lora(student, RANK, 2 * RANK)
    found["ours, NF4"] = speed(row, decoder(student, row))
    return {"tokens_per_s": found["ours"], "decode": found, "peak": peak}


def run_kernels(row, base, folder):
    """Seconds of a decode step by kernel, the largest first: what to look at when the bound is far."""
    reply, kind = decoder(sft.load_student(base, nf4=False), row), torch.profiler.ProfilerActivity
    reply(row["new"][0])
    with torch.profiler.profile(activities=[kind.CUDA if CUDA else kind.CPU]) as profile:
        reply(row["new"][1])
    kernels = {e.key: (e.self_device_time_total if CUDA else e.self_cpu_time_total, e.count) for e in profile.key_averages()}
    total = sum(microseconds for microseconds, _ in kernels.values())
    print(f"a prompt and {row['new'][1]} steps, {row['rows']} rows:")
    for name, (microseconds, count) in sorted(kernels.items(), key=lambda kernel: -kernel[1][0])[:12]:
        print(f"{100 * microseconds / total:5.1f} %  {count:7}  {name[:100]}")
    return {"seconds": {"all kernels": total / 1e6}}


# ---------------------------------------------------------------- the table

def planned(size, name, rows):
    parts = {part: bytes / GIB for part, bytes in plan(size, rows[name]).items() if bytes}
    return f"| {name} | {sum(parts.values()):.1f} | {', '.join(f'{part} {gib:.1f}' for part, gib in parts.items())} |"


def table(rows):
    lines = ["| row | tokens/s | of it: seconds; of decoding: tokens/s | peak GiB | by arithmetic | card, date |",
             "| --- | --- | --- | --- | --- | --- |"]
    for r in rows:
        parts = ", ".join(f"{k} {v:.1f}" for k, v in (r.get("decode") or r["seconds"]).items())
        rate, peak = (f"{r[k]:{f}}" if r.get(k) else "–" for k, f in (("tokens_per_s", ".0f"), ("peak", ".1f")))
        lines.append(f"| {r['size']} {r['row']} | {rate} | {parts} | {peak} | {r['plan']:.1f} | {r['card']}, {r['date']} |")
    return "\n".join(lines)


def main(args):
    rows = TINY if args.size == "tiny" else ROWS
    if unknown := {*(args.only or rows)} - {*rows}:
        sys.exit(f"--only: {args.size} has no row {', '.join(sorted(unknown))}")
    names = [n for n in rows if not args.only or n in args.only]
    if args.plan:
        print(f"{args.size}, GiB by arithmetic: bf16, an NF4 base while training, rank {RANK}", "", sep="\n")
        print("| row | sum | of it |", "| --- | --- | --- |", sep="\n")
        print("\n".join(planned(args.size, n, rows) for n in names if n != "kernels"))
        return
    if args.size != "tiny" and not CUDA:
        sys.exit("a GPU is needed; --plan is what can be had without")
    folder = Path(args.out, args.size)
    folder.mkdir(parents=True, exist_ok=True)
    base, log = make_base(args.size, folder), Path(args.out, f"{args.size}.jsonl")
    card = torch.cuda.get_device_name() if CUDA else "CPU"
    for name in names:
        begin()
        found = globals()[f"run_{rows[name]['kind']}"](rows[name], base, folder)
        peak = found.pop("peak", None) or (torch.cuda.max_memory_allocated() if CUDA else 0)
        found |= {"size": args.size, "row": name, "card": card, "date": str(date.today()), "peak": peak / GIB,
                  "plan": sum(plan(args.size, rows[name]).values()) / GIB,
                  "versions": {m: version(m) for m in ("torch", "transformers", "peft", "bitsandbytes")}}
        with open(log, "a") as f:
            f.write(json.dumps(found) + "\n")
        print(table([found]).splitlines()[-1], flush=True)
    latest = {r["row"]: r for r in map(json.loads, log.read_text().splitlines())}
    print("\n" + table([latest[n] for n in rows if n in latest]))
    print("\n" + ", ".join(f"{k} {v}" for k, v in found["versions"].items()))


if __name__ == "__main__":
    main(parse_args())
