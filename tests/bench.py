"""bench.py: speed and memory of sft.py and grpo.py beside TRL 1.16, on one tiny Qwen2.5-VL with the same tokens.

    python tests/bench.py --json bench.json                             # MINUTES minutes on a quiet core
    python tests/bench.py --quick --only sft rollout                    # two rows, one repeat, a few steps
    python tests/bench.py --peer_python other/bin/python                # when TRL lives in another environment

Ours and the peer run in turn (A B A B), each in a process of its own with one thread; a figure is the median over runs
of each run's median over steps, and only the ratios mean something. The peers are the scripts in --peers as they are;
model, tokenizer and text come from tiny.py there: fp32, LoRA r = 8 on the language model, no checkpointing of layers.
Ours goes through the scripts' own functions: sft.loss_over for SFT, grpo.train_step for the whole of GRPO.

- Replies have a fixed length: the peer sets min_new_tokens, we take <|im_end|> out of `student.allowed`.
- Our rollout seconds hold all from prompt to talk: image features, folding, the tutor's requests and replies. The
  peer's are those of its `generate` calls alone. Both steps are whole steps.
- naive: our loop with generate() from scratch each turn, logits for every position, the vision tower in every pass.
- Memory is the peak of the process above what it had after its imports, as the peers report it.
- Start is SFT's, from the first line of the script to the end of the first step.
- Part of the SFT lead is a CPU artefact: without Triton TRL's fused head scores every position. No claim for a GPU.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from threading import Thread

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
    p.add_argument("--peers", default=str(ROOT.parent / "shared/peers"), help="folder with tiny.py and trl_*.py")
    p.add_argument("--peer_python", default=sys.executable, help="the Python that has trl")
    p.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", default=[*ROWS], help=", ".join(ROWS))
    p.add_argument("--repeats", type=int, default=3, help="runs of ours and of the peer")
    p.add_argument("--quick", action="store_true", help="one repeat, a few steps: does it run?")
    p.add_argument("--json", help="write the rows to this file")
    p.add_argument("--log", default=os.devnull, help="append the full report of every process to this file")
    return p.parse_args(argv)


# ---------------------------------------------------------------- ours: one measured process, flags as the peers'

def worker(kind, naive):
    global tiny, torch, grpo, sft
    import tiny  # first: its clock starts here, and its flags set the threads
    a = tiny.arguments(steps=8, batch=8, warmup=2, extra={
        "--turns": dict(type=int, default=4), "--new": dict(type=int, default=24),
        "--beta": dict(type=float, default=0.04)})
    import torch
    import grpo
    import sft
    rss_import = tiny.rss_mb()
    if naive:
        sft.reply_logps = grpo.reply_logps = naive_logps
        sft.encode_images = grpo.encode_images = lambda student, paths: {}
        grpo.rollout = naive_rollout
    with tempfile.TemporaryDirectory() as folder:
        figures = {"sft": run_sft, "grpo": run_grpo, "update": run_update}[kind](a, tiny_student(a), folder)
    tiny.report(ours=kind, naive=naive, **figures, rss_import_mb=rss_import)


def tiny_student(a):
    """The peers' model with our LoRA on it."""
    tok = tiny.tokenizer()
    model = tiny.model(tiny.config(tok, a.hidden, a.layers, vocab=a.vocab), tok)
    student = sft.make_student(model, tok, tiny.processor(tok).image_processor)
    sft.add_lora(student, 8, 16)
    return student


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
    results, wall, cpu, first = [], [], [], None
    for i in range(a.steps):
        results.append(step(i))
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
        first = first or time.time() - tiny.T0
    seconds = tiny.deltas(wall, a.warmup)
    return results[1 + a.warmup:], seconds, {"step_s": tiny.spread(seconds), "to_first_step_s": first,
                                             "step_cpu_s": tiny.spread(tiny.deltas(cpu, a.warmup))}


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
    return {**figures, "tokens_per_s": tiny.spread([n / s for n, s in zip(tokens, seconds)], 0), "step_tokens": tokens}


def run_grpo(a, student, folder):
    """grpo.main without its files."""
    args = grpo.parse_args(["--model=-", "--data=-", "--tutor=-", "--out=-", f"--prompts={a.batch}", f"--beta={a.beta}",
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
    return {**figures, "rollout_tokens_per_s": tiny.spread([x["tokens"] / x["seconds_rollout"] for x in lines], 0),
            "update_s": tiny.spread([x["seconds_update"] for x in lines]), "new_tokens_per_step": lines[-1]["tokens"]}


def run_update(a, student, folder):
    """Forward and backward over dialogues of 4k tokens together, as one micro-batch."""
    dialogues = as_dialogues(tiny.dialogues(19, images=a.images), folder)
    rows = [sft.render(student, d)[0] for d in dialogues]
    images = sft.encode_images(student, [path for row in rows for path in row.images])
    before = tiny.rss_mb()
    (-sft.reply_logps(student, rows, images)[0].mean()).backward()
    return {"update_mb": tiny.peak_rss_mb() - before, "tokens": sum(len(row.ids) for row in rows)}


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


def naive_rollout(student, dialogues, keys, respond, args, images, lm=None):
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

def run(args, python, *command, path=""):
    """One process with one thread -> the JSON of its last line."""
    env = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"), "PYTHONPATH": path}
    command = [python, *command, "--threads", "1"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, env={**env, "TMPDIR": folder}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    line = done.stdout.splitlines()[-1]
    with open(args.log, "a") as log:
        log.write(line + "\n")
    return json.loads(line)


def ours(args, kind, flags, naive=False):
    return run(args, sys.executable, __file__, "--worker", kind, "naive" if naive else "ours", *flags.split(),
               path=f"{ROOT}{os.pathsep}{args.peers}")


def runs(args, job, done={}):
    """-> reports of ours and of the peer, taken in turn, and one of naive. Rows of one job share its runs."""
    if job not in done:
        kind, script, both, peer_only, full, quick = JOBS[job]
        steps, warmup = quick if args.quick else full
        flags, a, b = f"--steps {steps} --warmup {warmup} {both}", [], []
        for _ in range(1 if args.quick else args.repeats):
            a.append(ours(args, kind, flags))
            b.append(run(args, args.peer_python, f"{args.peers}/{script}", *f"{flags} {peer_only}".split()))
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


class Slow(BaseHTTPRequestHandler):
    """A chat server that takes 50 ms."""
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.05)
        choice = {"message": {"role": "assistant", "content": "{}"}, "finish_reason": "stop"}
        body = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def tutor_calls(args):
    """One `ask` for the 40 rows of a turn against 40 calls one after the other."""
    sys.path.insert(0, str(ROOT))
    import judge
    ThreadingHTTPServer.request_queue_size = 128  # 5 by default: some of forty clients at once would be sent away
    server, took = ThreadingHTTPServer(("127.0.0.1", 0), Slow), []
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        ask = judge.backend(f"http://127.0.0.1:{server.server_port}/v1")
    except ValueError:  # this version has no served back end
        return None, None, None
    requests = [judge.tutor_request("benign", [{"user": "?", "assistant": str(n)}], None, [], False) for n in range(40)]
    for batches in ([requests], [[r] for r in requests]):
        begun = time.perf_counter()
        for batch in batches:
            ask(batch)
        took.append(time.perf_counter() - begun)
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


def measure(args, name):
    """-> a row as --json has it; Nones where it could not be measured"""
    what, target, how = ROWS[name]
    mine, peer, naive = how(args)
    ratio = mine and mine / peer
    ok = ratio and (ratio >= float(target[1:]) if target[0] == "≥" else ratio <= float(target[1:]))
    return dict(name=name, what=what, ours=mine, peer=peer, ratio=ratio, target=target, ok=ok, naive=naive)


def main(args):
    if not Path(args.peers, "tiny.py").is_file():
        sys.exit(f"no tiny.py in {args.peers}: --peers must name the folder with tiny.py, trl_sft.py and trl_grpo.py")
    show = lambda what, *cells: print(f"{what:48}" + "".join(f"{c:>9}" for c in cells), flush=True)
    number = lambda x: "-" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.2f}"
    show("one thread, medians", "ours", "peer", "ratio", "target", "ok", "naive")
    rows = []
    for name in args.only:
        rows.append(r := measure(args, name))
        show(r["what"], number(r["ours"]), number(r["peer"]), number(r["ratio"]), r["target"],
             {True: "yes", False: "NO", None: "not measured"}[r["ok"]], number(r["naive"]))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        kind, variant = sys.argv[2:4]
        del sys.argv[1:4]
        worker(kind, variant == "naive")
    else:
        main(parse_args())
