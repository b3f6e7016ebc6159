"""
Memory and speed at full size: Qwen2.5-VL as it is published, with random weights.

    python tests/fullsize.py --size 3b              on the GPU at hand, beside the plan of plan.py
    python tests/fullsize.py --size 3b --only doctor --model Qwen/Qwen2.5-VL-3B-Instruct

doctor: checks before a real run. sft-4k: a step on 4 dialogues of 4k tokens, one per pass.
grpo-8x5: a step on 8 prompts x 5 rollouts of 6 turns with 200 tokens; -8k: 10 turns, 8k tokens.
decode: tokens/s behind 1,800 tokens. Each result is printed and appended to
out/fullsize/SIZE.jsonl at once. --size tiny takes seconds on a CPU.
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
from data.dialogues import seed_to_dialogue
from eval import make_attacker
from plan import RANK, ROWS, SHAPES, memory, published

OUT, DEVICE = Path("out/fullsize"), "cuda" if torch.cuda.is_available() else "cpu"
# the rows of plan.py on a CPU
TINY = {"rows": 5, "turns": 2, "user": 5, "reply": 4, "columns": 70, "micro": 200}


def make_base(size):
    """-> a folder like the hub's, with random weights and the toy's tokenizer"""
    tokenizer = toy.make_tokenizer(random.Random(0))
    processor, model = toy.make_model(tokenizer)[1], published(size)
    if size != "tiny":
        processor.size["longest_edge"] = 12_845_056
    with torch.device(DEVICE):
        model = type(model)._from_config(model.config, dtype=torch.bfloat16)
    for part in (model, processor, tokenizer):
        part.save_pretrained(OUT / size)
    return OUT / size


def eager(cache, step, width, inputs):
    """A decode step that is not recorded, in place of KVCache.recorded."""
    return step(width)(*inputs)


def load(base, nf4=True):
    """-> a policy and its reference, as grpo.py loads them, and a dense copy. No reply ends."""
    student = grpo.load_policy(argparse.Namespace(model=base, nf4=nf4, adapter=None))
    student.allowed[student.end] = False
    return student, grpo.dense_copy(student)


def play(student, lm, row, picture=True):
    """-> rollouts of user turns with so many words, and the features of their picture"""
    path, turns = str(OUT / "picture.png"), [" box" * row["user"]] * row["turns"]
    toy.draw("box", "red", True, random.Random(0)).resize((504, 504)).save(path)
    dialogue = seed_to_dialogue({"turns": turns, "image": path if picture else None})
    images, keys = sft.encode_images(student, [path]), [(n,) for n in range(row["rows"])]
    args = argparse.Namespace(max_new=row["reply"], max_tokens=row["columns"], temperature=1.0)
    dialogues, script = [dialogue] * row["rows"], make_attacker(None, args)
    return grpo.rollout(student, lm, dialogues, keys, script, images, args), images


def run_doctor(base, row):
    def check(name, value, limit):
        return {"check": name, "is": float(value), "limit": limit, "ok": bool(value <= limit)}

    def changed(before, picture=True):
        again, _ = play(student, dense, row, picture)
        return sum(a.ids != b.ids for a, b in zip(before, again))

    def logps(adapter):
        sft.use_adapter(student, adapter)
        with torch.no_grad():
            return sft.reply_logps(student, shown, images)[0].cpu()

    for nf4 in (True, False):
        # a policy that differs from its reference
        student, dense = load(base, nf4)
        if not nf4:     # in the round before, `reference` was computed in NF4
            d = logps("reference") - reference
            yield check("KL per token, NF4 to bf16", (torch.expm1(d) - d).mean(), 0.1)
        for name, p in student.model.named_parameters():
            if ".policy." in name:
                p.data += 0.01 * torch.randn_like(p)
        grpo.merge_adapter(student, dense)
        text, _ = play(student, dense, row, picture=False)
        shown, images = play(student, dense, row)
        policy, reference = logps("policy"), logps("reference")
        sampled = torch.tensor(sum([r.logps for r in shown], []))
        name = f"sampler and learner differ, {'NF4' if nf4 else 'bf16'}"
        yield check(name, (policy - sampled).abs().mean(), 0.05)

    # the rest in bf16
    with mock.patch.object(grpo.KVCache, "recorded", eager):
        yield check("replies changed without recording", changed(shown), 2)
    yield check("replies changed by a picture before", changed(text, False), 0)
    vars(student.base.generation_config).update(repetition_penalty=9.0, top_k=1)
    yield check("replies changed by the generation config", changed(shown), 0)
    sft.save_adapter(student, OUT)
    sft.load_weights(student, OUT, "reference")
    yield check("adapter changed when saved", (logps("reference") - policy).abs().max(), 0)
    yield check("adapter without effect", (reference - policy).abs().max() == 0, 0)
    r, (height, width) = shown[0], shown[0].grids[0]
    ids, grid = torch.tensor([r.ids]), torch.tensor([[1, 2 * height, 2 * width]])
    theirs, _ = student.base.model.get_rope_index(ids, (ids == student.pad).int(), grid)
    ours = torch.tensor(sft.mrope_positions(student, r.ids, r.grids)[0])
    yield check("positions unlike get_rope_index", (ours != theirs[:, 0].T).sum(), 0)
    height, width = sft.image_grid(student, argparse.Namespace(width=4000, height=3000))
    yield check("tokens of a 4000 x 3000 picture", height * width, sft.MAX_PIXELS // 784)


def run_sft(base, row):
    (student, _), tokens = load(base), row["micro"]
    student.model.delete_adapter("reference")
    student.model.train()
    args = sft.parse_args(f"--model - --data - --out - --micro_tokens {tokens}".split())
    optimizer, words = sft.adamw(student, args.lr), sft.encode(student, " box" * tokens)
    rows = [sft.Row(words, [-1] * (tokens // 4) + [0] * (tokens - tokens // 4)) for _ in range(4)]
    for _ in range(2):              # the first step only warms up
        begin = time.time()
        sft.optimizer_step(optimizer, sft.loss_over(student, rows, args, backward=True))
        seconds = time.time() - begin
    yield {"seconds": seconds, "tokens_per_s": 4 * tokens / seconds}


def run_grpo(base, row):
    (student, dense), words = load(base), "--model - --data - --out - --tutor - --micro_tokens"
    args = grpo.parse_args([*words.split(), str(row["micro"])])
    optimizer, times = sft.adamw(student, args.lr), [time.time()]
    grpo.merge_adapter(student, dense)
    rollouts, images = play(student, dense, row)
    times.append(time.time())
    for batch in sft.micro_batches(rollouts, row["micro"]):
        with torch.no_grad():
            sft.reply_logps(student, [rollouts[n] for n in batch], images)[0].sum().item()
    times.append(time.time())
    advantages = torch.randn(row["rows"], row["turns"]).numpy()
    mismatch = grpo.update(student, rollouts, advantages, images, args, optimizer)["mismatch"]
    generate, logps, update = times[1] - times[0], times[2] - times[1], time.time() - times[2]
    tokens = sum(len(r.logps) for r in rollouts)
    # an update makes log-probabilities twice, for the reference and for the policy
    yield {"generate_s": generate, "logps_s": 2 * logps, "backward_s": update - 2 * logps,
           "sampled_tokens_per_s": tokens / generate, "mismatch": mismatch}


def run_decode(base, row):
    def speed(reply):
        reply()                     # warms up, and records
        begin = time.time()
        reply()
        return n * row["reply"] / (time.time() - begin)

    def ours():
        """Keys and values of all words but the last are said to be in the cache already."""
        said = {"ids": words[0].tolist(), "cached": row["user"] - 1, "user": ("", [], "")}
        rollouts = [grpo.Rollout(**said, key=(i,)) for i in range(n)]
        grpo.generate(student, lm, cache, rollouts, [], args)

    def generate():
        """From 50 words, which is in its favour."""
        ids = words[:n, :50]
        student.base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True,
                              top_k=0, max_new_tokens=row["reply"]).cpu()

    args = argparse.Namespace(max_new=row["reply"], temperature=1.0)
    words = torch.full((row["rows"], row["user"]), 100, device=DEVICE)
    for nf4 in (False, True):
        student = sft.load_student(base, nf4)
        student.allowed[student.end] = False
        if nf4:
            sft.add_lora(student, RANK, 2 * RANK)
        student.model.eval()
        lm = student.base.model.language_model
        for n in (1, 8, 20, 40, 80):
            if n > row["rows"]:
                break
            cache = grpo.KVCache(lm.config, n, row["columns"], student.base.dtype, DEVICE)
            found = {"rows": n, "nf4": nf4, "recorded": speed(ours)}
            with mock.patch.object(grpo.KVCache, "recorded", eager):
                found["eager"] = speed(ours)
            if not nf4:
                found["generate"] = speed(generate)
                # a step that only reads the weights and the cache once
                weights, begin = [*lm.layers.parameters(), student.base.lm_head.weight], time.time()
                sum(x.max() for x in [*weights, *cache.keys, *cache.values]).item()
                found["bound"] = n / (time.time() - begin)
            yield found


RUN = {"doctor": run_doctor, "sft": run_sft, "grpo": run_grpo, "decode": run_decode}


def record(size, **result):
    print(json.dumps(result), flush=True)
    with open(OUT / f"{size}.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", required=True, choices=SHAPES)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--model", help="name or folder of a real model, for doctor")
    args = parser.parse_args(argv)
    if DEVICE == "cpu" and args.size != "tiny":
        parser.error("there is no GPU; plan.py and --size tiny need none")
    if args.model and args.only != ["doctor"]:
        parser.error("--model is for --only doctor")
    base = args.model or make_base(args.size)
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    record(args.size, date=time.strftime("%Y-%m-%d"), card=card, model=str(base), **versions)
    failed = []
    for name in args.only:
        row, about = ROWS[name], {"row": name}
        if "micro" in row:
            plan = memory(args.size, row).values()
            about["planned_gib"] = max(sum(used.values()) for used in plan) / 2 ** 30
        if args.size == "tiny":
            row = {key: TINY[key] for key in row}
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            for result in RUN[name.split("-")[0]](base, row):
                peak = torch.cuda.max_memory_allocated() / 2 ** 30
                record(args.size, **about, **result, peak_gib=peak)
        except Exception as error:          # the next row may do
            record(args.size, **about, error=repr(error))
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
