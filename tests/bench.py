"""
Speed and memory of sft.py and grpo.py, beside TRL or beside an older commit of this project.

    python tests/bench.py --peers DIR --json bench.json     beside TRL 1.16, about 14 minutes
    python tests/bench.py --peers DIR --old FOLDER          beside the commit in FOLDER

Both sides train the same tiny Qwen2.5-VL with LoRA on the same text, in fp32 on a CPU, in turn (A B
A B) and with one thread. Numbers are medians over runs of medians over steps. Compare ratios only.
DIR holds tiny.py (the model and the text) and TRL's scripts. Replies have a fixed length, because
<|im_end|> is banned. Our rollout includes merging, image features and the tutor; TRL's is
`generate` alone. Memory is the peak minus what the imports need. Part of the lead in SFT exists on
a CPU only: without Triton, TRL's loss scores every position.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
if sys.argv[1:2] == ["--worker"]:
    import tiny         # first, because its clock starts here
    import grpo
    import sft
    import tcsr
    WORDS = tiny.lexicon()

# job: (script, flags of both sides, flags of TRL, (steps, warmup) of a full and of a quick run).
# The first step and `warmup` more do not count.
JOBS = {
    "sft": ("sft", "--images", "", (30, 4), (6, 1)),
    "sft_vocab": ("sft", "--images --vocab 151936", "", (3, 0), (2, 0)),
    "grpo": ("grpo", "--images --turns 4", "", (5, 1), (2, 0)),
    "grpo10": ("grpo", "--images --turns 10", "", (3, 0), (2, 0)),
    # --micro 5 are the micro-batches with which TRL needs least
    "memory": ("grpo", "--images --turns 4", "--micro 5", (2, 0), (2, 0)),
}

# row: (title, job, number in the report of a run). Rows of one job share its runs.
ROWS = {
    "sft": ("SFT, tokens/s", "sft", "tokens_per_s"),
    "sft_vocab": ("SFT with 151,936 words, tokens/s", "sft_vocab", "tokens_per_s"),
    "rollout": ("rollout of 4 turns, tokens/s", "grpo", "rollout_tokens_per_s"),
    "step": ("GRPO step, 8 x 5 rollouts of 4 turns, s", "grpo", "step_s"),
    "step10": ("GRPO step, 8 x 5 rollouts of 10 turns, s", "grpo10", "step_s"),
    "memory": ("GRPO, peak memory, MB", "memory", "memory_mb"),
    "start": ("start to first SFT step, s", "sft", "to_first_step_s"),
    "tutor": ("40 tutor calls of 50 ms, beside a loop, s", "tutor", "seconds"),
}

# -----------------------------------------------------------------------------
# our side: a process that trains for some steps and prints a report


def worker():
    kind = sys.argv[2]
    del sys.argv[1:4]       # tiny.py reads the rest
    rss_import = tiny.rss_mb()
    args = tiny.arguments(batch=8, extra={"--turns": {"type": int}})
    tokenizer = tiny.tokenizer()
    model = tiny.model(tiny.config(tokenizer, vocab=args.vocab), tokenizer)
    student = sft.make_student(model, tokenizer, tiny.processor(tokenizer).image_processor)
    sft.add_lora(student, 8, 16)
    report = run_sft(args, student) if kind == "sft" else run_grpo(args, student)
    tiny.report(rss_import_mb=rss_import, **report)


def as_dialogues(records, key, turns=1):
    """Records of tiny.py as those of synth.py, with placeholders for user turns that will come."""
    dialogues = []
    for i, record in enumerate(records):
        path = f"{tempfile.gettempdir()}/{i}.png"       # run() gives each process its own folder
        record["images"][0].save(path)
        system, user, *rest = record[key]
        content = [{"type": "image"}, {"type": "text", "text": user["content"]}]
        for _ in range(turns - 1):
            rest += [{"role": "assistant", "content": "-"}, {"role": "user", "content": "-"}]
        dialogues.append({"id": str(i), "seed_id": str(i), "kind": "red_team", "images": [path],
                          "messages": [system, {"role": "user", "content": content}, *rest]})
    return dialogues


def run_sft(args, student):
    """The training loop of sft.main, without its files."""
    options = sft.parse_args("--model - --data - --out - --held_out 0".split())
    dialogues = as_dialogues(tiny.dialogues(args.dialogues, images=True), "messages")
    train, _ = sft.render_all(student, dialogues, options)
    batches = sft.epoch_batches(len(train), args.batch, 0, 0)
    optimizer = sft.adamw(student, lr=1e-3)
    student.model.train()
    tokens, marks = [], []
    for i in range(args.steps):
        rows = [train[n] for n in batches[i]]
        sft.optimizer_step(optimizer, sft.loss_over(student, rows, options, backward=True))
        tokens.append(sum(len(row.ids) for row in rows))
        marks.append(time.time())
    seconds = tiny.deltas(marks, args.warmup)
    speeds = [n / s for n, s in zip(tokens[1 + args.warmup:], seconds)]
    return {"to_first_step_s": marks[0] - tiny.T0, "tokens_per_s": median(speeds)}


def ask(requests):
    """The tutor: random scores, and a next turn as long as that of TRL's script."""
    replies = []
    for _ in requests:
        scores = {key: random.randint(1, 10) for key in ("safety", "usefulness", "faithfulness")}
        turn = tiny.sentence(random, WORDS, random.randint(16, 22))
        replies.append(json.dumps({"scores": scores, "next_turn": turn}))
    return replies


def run_grpo(args, student):
    """The training loop of grpo.main, without its files."""
    options = grpo.parse_args([
        "--model=-", "--data=-", "--tutor=-", "--out=-", f"--max_turns={args.turns}",
        "--max_new=24", "--max_tokens=1024", "--micro_tokens=1000", "--beta=0.04"])
    options.format_bonus = 1.0      # without it babble has a reward of 0, and all groups are dead
    dialogues = as_dialogues(tiny.prompts(args.dialogues, images=True), "prompt", args.turns)
    student.model.add_adapter("reference", student.model.peft_config["policy"])
    sft.use_adapter(student, "policy")
    student.allowed[student.end] = False
    dense, optimizer = grpo.dense_copy(student), sft.adamw(student, lr=1e-4)
    tutor, rolled_out, marks = grpo.Tutor(ask, options), [], []
    random.seed(5)
    for i in range(args.steps):
        begin = time.time()
        prompts = dialogues[i * args.batch:(i + 1) * args.batch]
        batch = [dialogue for dialogue in prompts for _ in range(options.group)]
        keys = [(0, i, d["id"], n % options.group) for n, d in enumerate(batch)]
        grpo.merge_adapter(student, dense)
        images = sft.encode_images(student, [d["images"][0] for d in prompts])
        rollouts = grpo.rollout(student, dense, batch, keys, tutor, images, options)
        rolled_out.append(time.time() - begin)
        rewards, mask = grpo.reward_table(rollouts, options.group)
        adv, info = tcsr.advantages(rewards, mask)
        grpo.update(student, rollouts, adv.reshape(len(batch), -1), images, options, optimizer)
        sampled = sum(len(r.logps) for r in rollouts)
        assert info["dead_groups"] == 0 and sampled == len(batch) * args.turns * 24
        marks.append(time.time())
    return {"step_s": median(tiny.deltas(marks, args.warmup)), "new_tokens_per_step": sampled,
            "rollout_tokens_per_s": sampled / median(rolled_out[1 + args.warmup:])}


# -----------------------------------------------------------------------------
# both sides, in turn


def run(script, words, path=""):
    """Run a script with one thread. -> the report in the last line that it prints"""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TMPDIR": folder}
        command = [sys.executable, str(script), *words, "--threads", "1"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    for key, value in report.items():
        if isinstance(value, dict):         # a spread over steps
            report[key] = value.get("median")
    report["memory_mb"] = report["peak_rss_mb"] - report["rss_import_mb"]
    return report


def run_job(job, args):
    """-> the reports of our runs and those of the other side"""
    kind, both, of_trl, full, quick = JOBS[job]
    steps, warmup = quick if args.quick else full
    words = ["--steps", str(steps), "--warmup", str(warmup), *both.split()]
    trl = args.peers / f"trl_{kind}.py"

    def run_commit(folder):     # older commits also have another worker than "ours"
        return run(folder / "tests/bench.py", ["--worker", kind, "ours", *words],
                   path=f"{folder}:{args.peers}")

    ours, others = [], []
    for _ in range(1 if args.quick else args.repeats):
        ours.append(run_commit(ROOT))
        others.append(run_commit(args.old) if args.old else run(trl, words + of_trl.split()))
    sampled = {report.get("new_tokens_per_step") for report in ours + others}
    assert len(sampled) == 1, f"the two sides sampled {sampled} tokens"
    return ours, others


def tutor_calls():
    """A turn's 40 requests to a server: in one call of the back end, and one by one."""
    from serve_toy import Handler, Server, completion
    from judge import backend       # serve_toy has made it visible

    class Slow(Handler):
        def reply(self, body):
            time.sleep(0.05)
            return 200, {}, completion("a reply")

    server = Server(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ask = backend("tutor", f"http://127.0.0.1:{server.server_port}/v1", "toy")
    request = {"system": "you are the tutor", "text": "a dialogue " * 100, "image": bytes(1000)}
    begin = time.time()
    ask([request] * 40)
    half = time.time()
    for _ in range(40):
        ask([request])
    return [{"seconds": half - begin}], [{"seconds": time.time() - half}]


def main():
    parser = argparse.ArgumentParser(description="Speed and memory beside TRL or an older commit")
    add = parser.add_argument
    add("--peers", type=Path, default=ROOT.parent / "shared/peers", help="folder of tiny.py")
    add("--old", type=Path, help="folder of another commit, to measure instead of TRL")
    add("--only", nargs="+", choices=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    add("--repeats", type=int, default=3, help="runs of each side")
    add("--quick", action="store_true", help="one run of a few steps: does it work?")
    add("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    other = "old" if args.old else "TRL"
    print(f"{'one thread, medians':44}{'ours':>10}{other:>10}{'ratio':>8}")
    reports, rows = {}, []
    for name in args.only or ROWS:
        title, job, key = ROWS[name]
        if args.old and job == "tutor":     # it has no other side
            continue
        if job not in reports:
            reports[job] = tutor_calls() if job == "tutor" else run_job(job, args)
        ours = median(report[key] for report in reports[job][0])
        theirs = median(report[key] for report in reports[job][1])
        print(f"{title:44}{ours:10,.2f}{theirs:10,.2f}{ours / theirs:8.2f}", flush=True)
        rows.append({"name": name, "ours": ours, other: theirs, "ratio": ours / theirs})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    worker() if sys.argv[1:2] == ["--worker"] else main()
