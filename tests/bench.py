"""bench.py: speed and memory of sft.py and grpo.py beside TRL 1.16, on one tiny Qwen2.5-VL with the same tokens.

    python tests/bench.py --peers DIR --json bench.json [--peer_python PATH]        # about 14 minutes on a quiet machine
    python tests/bench.py --peers DIR --quick --only sft rollout                    # two rows, one repeat, a few steps

Ours and the peer run in turn (A B A B), a process and a thread each; figures are medians over runs of medians over
steps, and only ratios mean something. The peers are the scripts in --peers as they are; model, tokenizer and text are
those of tiny.py there: fp32, LoRA r = 8, no checkpointing of layers. Ours is sft.loss_over and grpo.train_step.

- Replies have a fixed length: the peer sets min_new_tokens, we take <|im_end|> out of `student.allowed`.
- Our rollout seconds hold image features, folding, the tutor's requests and replies; the peer's only `generate`.
- naive: our loop with generate() from scratch each turn, logits for every position, the vision tower in every pass.
- Memory is the peak above what the imports left, start is from the first line of the script to the end of a first step.
- Part of the SFT lead is a CPU artefact: without Triton TRL's fused head scores every position. No claim for a GPU.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
VOCAB = "--images --vocab 151936"
JOBS = {  # worker, the peer, flags of both, flags of the peer alone, (steps, warm-up): the first step is never counted
    "sft": ("sft", "trl_sft.py", "--images", "", (30, 4), (6, 1)),
    "sft_vocab": ("sft", "trl_sft.py", VOCAB, "", (3, 0), (2, 0)),
    "grpo": ("grpo", "trl_grpo.py", "--images --turns 4", "", (5, 1), (2, 0)),
    "grpo10": ("grpo", "trl_grpo.py", "--images --turns 10", "", (3, 0), (2, 0)),
    "memory": ("grpo", "trl_grpo.py", "--images --turns 4", "--micro 5", (2, 0), (2, 0)),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peers", required=True, help="folder with tiny.py, trl_sft.py and trl_grpo.py, the peers' scripts")
    p.add_argument("--peer_python", default=sys.executable, help="the Python that has trl")
    p.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", default=[*ROWS], help=", ".join(ROWS))
    p.add_argument("--repeats", type=int, default=3, help="runs of ours and of the peer")
    p.add_argument("--quick", action="store_true", help="one repeat, a few steps: does it run?")
    p.add_argument("--json", help="write the rows to this file")
    return p.parse_args(argv)


# ---------------------------------------------------------------- ours: one measured process, flags as the peers'

def worker(kind, naive):
    global tiny, torch, grpo, sft
    import tiny  # first: its clock starts here, and its flags set the threads
    a = tiny.arguments(batch=8, extra={"--turns": dict(type=int), "--new": dict(type=int, default=24)})
    import torch
    import sft
    import grpo
    rss_import = tiny.rss_mb()
    if naive:
        sft.reply_logps = grpo.reply_logps = naive_logps
        sft.encode_images = grpo.encode_images = lambda student, paths: {}
        grpo.rollout = naive_rollout
    tok = tiny.tokenizer()
    model = tiny.model(tiny.config(tok, vocab=a.vocab), tok)
    student = sft.make_student(model, tok, tiny.processor(tok).image_processor)
    sft.add_lora(student, 8, 16)
    with tempfile.TemporaryDirectory() as folder:
        figures = {"sft": run_sft, "grpo": run_grpo, "update": run_update}[kind](a, student, folder)
    tiny.report(ours=kind, naive=naive, **figures, rss_import_mb=rss_import)


def as_dialogues(records, folder, turns=1):
    """Records of tiny.py in the format of synth.py: pictures become files, and parts of the first user turn. Prompts,
    which have one user turn, get placeholders for the later ones: the tutor will write them."""
    dialogues = []
    for i, record in enumerate(records):
        (system, user, *rest), images = record.get("messages") or record["prompt"], record.get("images", [])
        paths = [f"{folder}/{i}-{n}.png" for n in range(len(images))]
        for image, path in zip(images, paths):
            image.save(path)
        parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": user["content"]}]
        rest += [{"role": role, "content": "-"} for _ in range(turns - 1) for role in ("assistant", "user")]
        dialogues.append({"id": str(i), "seed_id": str(i), "kind": "red_team", "images": paths,
                          "messages": [system, {"role": "user", "content": parts}, *rest]})
    return dialogues


def timed(a, step):
    """Call step(i) a.steps times. -> results and seconds of the counted steps, figures for the report"""
    results, marks = [], []
    for i in range(a.steps):
        results.append(step(i))
        marks.append(time.time())
    seconds = tiny.deltas(marks, a.warmup)
    return results[1 + a.warmup:], seconds, {"step_s": tiny.spread(seconds), "to_first_step_s": marks[0] - tiny.T0}


def run_sft(a, student, folder):
    """sft.main without its files."""
    args = sft.parse_args("--model - --data - --out - --held_out 0".split())
    train, _ = sft.train_and_held_out(student, as_dialogues(tiny.dialogues(a.dialogues, images=a.images), folder), args)
    params = [p for p in student.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
    batches = sft.epoch_order(len(train), a.batch, 0, 0)
    student.model.train()

    def step(i):
        sft.loss_over(student, [train[n] for n in batches[i]], args, backward=True)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    _, seconds, figures = timed(a, step)
    tokens = [sum(len(sft.render(student, train[n])[0].ids) for n in b) for b in batches[1 + a.warmup:a.steps]]
    return {**figures, "tokens_per_s": tiny.spread([n / s for n, s in zip(tokens, seconds)], 0)}


def run_grpo(a, student, folder):
    """grpo.main without its files."""
    args = grpo.parse_args(["--model=-", "--data=-", "--tutor=-", "--out=-", f"--prompts={a.batch}", "--beta=0.04",
                            f"--max_turns={a.turns}", f"--max_new={a.new}", "--max_tokens=1024", "--micro_tokens=1000",
                            "--format_bonus=1"])  # with the gate, unformatted babble is worth 0 and every group dead
    student.model.add_adapter("reference", student.model.peft_config["policy"])
    sft.use_adapter(student, "policy")
    student.allowed[student.end] = False
    dense = grpo.dense_copy(student)
    optimizer = torch.optim.AdamW([p for p in student.model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    dialogues = as_dialogues(tiny.prompts(a.dialogues, images=a.images), folder, a.turns)
    rng, words = random.Random(5), tiny.lexicon()

    def tutor(requests):  # random scores, and a next turn as long as the peer's
        return [json.dumps({"scores": {k: rng.randint(1, 10) for k in ("safety", "usefulness", "faithfulness")},
                            "next_turn": tiny.sentence(rng, words, rng.randint(16, 22))}) for _ in requests]

    def step(i):
        line, talks, _ = grpo.train_step(i, dialogues[i * a.batch:][:a.batch], student, dense, optimizer, tutor, args)
        assert line["tokens"] == len(talks) * a.turns * a.new and line["dead"] == 0, line
        return line

    lines, _, figures = timed(a, step)
    return {**figures, "rollout_tokens_per_s": tiny.spread([x["tokens"] / (x["seconds_generate"] + x["seconds_tutor"]) for x in lines], 0),
            "new_tokens_per_step": lines[-1]["tokens"]}


def run_update(a, student, folder):
    """Forward and backward over dialogues of 4k tokens together, as one micro-batch."""
    rows = [sft.render(student, d)[0] for d in as_dialogues(tiny.dialogues(19, images=a.images), folder)]
    images = sft.encode_images(student, [path for row in rows for path in row.images])
    before = tiny.rss_mb()
    (-sft.reply_logps(student, rows, images)[0].mean()).backward()
    return {"update_mb": tiny.peak_rss_mb() - before}


# ---------------------------------------------------------------- ours-naive: every turn and picture from scratch

def naive_inputs(student, ids, mask, rows):
    student.base.model.rope_deltas = None
    images = [sft.open_image(path) for row in rows for path in row.images]
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == student.pad).int(),
            **(student.image_processor(images=images, return_tensors="pt") if images else {})}


def naive_logps(student, rows, images, temperature=1.0):
    ids, turn_id, _ = sft.collate(student, rows)
    logits = student.model(**naive_inputs(student, ids, torch.ones_like(ids), rows), use_cache=False).logits[:, :-1]
    logps = (logits.float() / temperature).log_softmax(-1)  # (N, L-1, V)
    logps = logps.gather(-1, ids[:, 1:, None])[..., 0][turn_id[:, 1:] >= 0]
    return logps, torch.zeros_like(logps)


def naive_rollout(student, dialogues, keys, respond, args, images, lm=None, fixed=None):
    student.model.eval()
    talks = [grpo.Talk(dialogue=d, key=k) for d, k in zip(dialogues, keys)]
    said = [(*grpo.user_turns(d)[0], "scripted") for d in dialogues]
    while said[0]:  # all dialogues of the bench have equally many turns
        for talk, turn in zip(talks, said):
            grpo.open_turn(student, talk, turn)
        width = max(len(talk.ids) for talk in talks)
        ids = torch.tensor([[student.end] * (width - len(talk.ids)) + talk.ids for talk in talks])
        mask = torch.tensor([[0] * (width - len(talk.ids)) + [1] * len(talk.ids) for talk in talks])
        new = student.model.generate(**naive_inputs(student, ids, mask, talks), max_new_tokens=args.max_new, top_k=0,
                                     do_sample=True, suppress_tokens=(~student.allowed).nonzero()[:, 0].tolist())
        for talk, reply in zip(talks, new[:, width:].tolist()):
            grpo.close_turn(student, talk, reply, [0.0] * len(reply))
        said = respond(talks)
    return talks


# ---------------------------------------------------------------- both, in turn

def run(python, *command, path=""):
    """One process with one thread -> the JSON of its last line."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TMPDIR": folder}
        done = subprocess.run([python, *command, "--threads", "1"], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join([python, *command])} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ours(args, kind, flags, naive=False):
    return run(sys.executable, __file__, "--worker", kind, "naive" if naive else "ours", *flags.split(),
               path=f"{ROOT}{os.pathsep}{args.peers}")


def runs(args, job, done={}):
    """-> reports of ours and of the peer, taken in turn, and one of naive. Rows of one job share its runs."""
    if job not in done:
        kind, script, both, peer_only, full, quick = JOBS[job]
        steps, warmup = quick if args.quick else full
        flags, a, b = f"--steps {steps} --warmup {warmup} {both}", [], []
        for _ in range(1 if args.quick else args.repeats):
            a.append(ours(args, kind, flags))
            b.append(run(args.peer_python, f"{args.peers}/{script}", *f"{flags} {peer_only}".split()))
        if kind == "grpo" and a[0]["new_tokens_per_step"] != b[0]["new_tokens_per_step"]:
            sys.exit(f"{job}: ours and the peer did not sample equally many tokens")
        done[job] = a, b, ours(args, kind, flags, naive=True)
    return done[job]


def compare(job, read):
    """-> a function of args that gives read(report) of ours, the peer (medians over runs) and naive"""
    def row(args):
        a, b, naive = runs(args, job)
        return median(map(read, a)), median(map(read, b)), read(naive)
    return row


def update_memory(args):
    """TRL has no such pass of its own to measure: the other side is our naive."""
    return ours(args, "update", VOCAB)["update_mb"], ours(args, "update", VOCAB, naive=True)["update_mb"], None


def tutor_calls(args):
    """One `ask` for the 40 rows of a turn against 40 calls one after the other, of a server that waits 50 ms a call."""
    sys.path.insert(0, str(ROOT))
    import judge
    import toy
    toy.draw("box", "red", True, random.Random(0)).save(picture := io.BytesIO(), "PNG")
    request = judge.tutor_request("benign", [{"user": "what is it?", "assistant": "a red box."}], picture.getvalue(),
                                  [*judge.STRATEGIES], False)
    command = [sys.executable, ROOT / "toy.py", "serve", "--port", "0", "--latency", "50"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        ask, took = judge.backend(server.stdout.readline().strip(), "toy"), []
        assert None not in ask([request] * 40)  # a run's first turn opens the connections
        for batches in ([[request] * 40], [[request]] * 40):
            begun = time.perf_counter()
            for batch in batches:
                ask(batch)
            took.append(time.perf_counter() - begun)
    finally:
        server.kill()
    return *took, None


ROWS = {  # name: what, target of ours / peer, function of args -> ours, peer, naive
    "sft": ("SFT tokens/s, images", "≥ 1.8", compare("sft", lambda r: r["tokens_per_s"]["median"])),
    "sft_vocab": ("SFT tokens/s, 151,936 words", "≥ 6", compare("sft_vocab", lambda r: r["tokens_per_s"]["median"])),
    "rollout": ("rollout tokens/s, 4 turns", "≥ 2.2", compare("grpo", lambda r: r["rollout_tokens_per_s"]["median"])),
    "step": ("GRPO step s, 8 x 5, 4 turns, KL", "≤ 0.55", compare("grpo", lambda r: r["step_s"]["median"])),
    "step10": ("GRPO step s, 10 turns", "≤ 0.4", compare("grpo10", lambda r: r["step_s"]["median"])),
    "tutor": ("tutor's turn s, 40 calls of 50 ms, to a loop", "≤ 0.1", tutor_calls),
    "memory": ("GRPO peak MB", "≤ 0.5", compare("memory", lambda r: r["peak_rss_mb"] - r["rss_import_mb"])),
    "update_memory": ("update MB, 151,936 words, 4k tokens, to naive", "≤ 0.25", update_memory),
    "start": ("start to first SFT step, s", "≤ 0.8", compare("sft", lambda r: r["to_first_step_s"])),
}


def main(args):
    if not Path(args.peers, "tiny.py").is_file():
        sys.exit(f"no tiny.py in {args.peers}: --peers must name the folder with tiny.py, trl_sft.py and trl_grpo.py")
    show = lambda *cells: print(f"{cells[0]:46}" + "".join(f"{c:>9}" for c in cells[1:]), flush=True)
    number = lambda x: "-" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.2f}"
    show("one thread, medians", "ours", "peer", "ratio", "target", "ok", "naive")
    rows = []
    for name in args.only:
        what, target, measure = ROWS[name]
        mine, peer, naive = measure(args)
        ratio, bound = mine / peer, float(target[1:])
        ok = ratio >= bound if target[0] == "≥" else ratio <= bound
        rows.append(dict(name=name, ours=mine, peer=peer, ratio=ratio, target=target, ok=ok, naive=naive))
        show(what, number(mine), number(peer), number(ratio), target, "yes" if ok else "NO", number(naive))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        kind, variant = sys.argv[2:4]
        del sys.argv[1:4]
        worker(kind, variant == "naive")
    else:
        main(parse_args())
