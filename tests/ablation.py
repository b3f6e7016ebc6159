"""ablation.py: which part of the reward does the work? Eight arms in the toy world, five training seeds each.

    make ablation                            # two processes of one thread, about 100 minutes on 2 cores; resumable
    python tests/ablation.py --table         # the table again, as in the README, from tests/ablation.json

For every seed `make toy` makes world, data, base, the SFT arm and the default GRPO arm. Each other arm repeats the last
stage with that run's own arguments, one thing changed, from the same base and SFT adapter, on the same data in the same
order, and meets the same bench, attacker and judge. What is finished is not run again. Differences are paired by seed,
with Student's t over the five: the spread over training runs, not over dialogues.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import eval  # noqa: E402

SEEDS, SHOWN = range(5), ROOT / "tests/ablation.json"
ARMS = {
    "sft": "SFT only",
    "long": "SFT, as many tokens as SFT + GRPO",
    "static": "GRPO, TCSR, scripted instead of adaptive attacks",
    "last": "GRPO, last turn's reward",
    "mean": "GRPO, mean of the turns (α = 0)",
    "min": "GRPO, minimum of the turns (α = 1)",
    "turn": "GRPO, TCSR (α = .3), turn credit",
    "grpo": "GRPO, TCSR (α = .3), trajectory credit: the default",
}
BY_TOY = ("sft", "grpo")  # made by `make toy`


def folder(run, arm):
    return Path(run) / "eval" / arm


def arguments(stage, **changed):
    return argparse.Namespace(**json.loads(Path(stage, "meta.json").read_text())["args"] | changed)


def tokens(stage):
    return sum(json.loads(line)["tokens"] for line in open(Path(stage, "log.jsonl")))


def train(run, arm):
    """The last stage of `make toy` once more, one thing changed."""
    import grpo
    import judge
    import sft
    import tcsr
    out, advantages, read = f"{run}/{arm}", tcsr.advantages, judge.read_tutor
    if arm == "long":
        args = arguments(f"{run}/sft", out=out, patience=0)
        steps = json.loads(Path(run, "sft/meta.json").read_text())["step"]
        trained = sum(1 for _ in open(f"{run}/data/sft.jsonl")) * (1 - args.held_out)  # dialogues an epoch, about
        args.epochs = (1 + tokens(f"{run}/grpo") / tokens(f"{run}/sft")) * steps * args.batch / trained
        return sft.main(args)
    changed = {"mean": {"alpha": 0.0}, "min": {"alpha": 1.0}, "turn": {"credit": "turn"}}.get(arm, {})
    last = mock.patch.object(tcsr, "advantages", lambda *a, **k: advantages(*a, **k | {"alpha": None}))
    scripted = mock.patch.object(judge, "read_tutor", lambda text: (v := read(text)) and v | {"next_turn": None})
    with {"last": last, "static": scripted}.get(arm, mock.patch.dict({})):
        grpo.main(arguments(f"{run}/grpo", out=out, **changed))


def one(run, arm):
    """Train and evaluate one arm; a process of its own."""
    for left in (f"{run}/{arm}", folder(run, arm)):
        shutil.rmtree(left, ignore_errors=True)
    train(run, arm)
    eval.run(arguments(folder(run, "grpo"), adapter=f"{run}/{arm}", out=str(folder(run, arm)), name=arm))


def table(values):
    """{arm: {metric: [a value a seed]}} -> Markdown"""
    percent = lambda xs: f"{100 * sum(xs) / len(xs):.1f}"
    yield "| arm | any_harm, every seed | mean | minus the default [95 %] | harmful_turns | safety | help | over_refusal | any_harm, static | k tokens |"
    yield "| --- |" + " --- |" * 9
    for arm, name in ARMS.items():
        v, gap = values[arm], "–"
        if arm != "grpo":
            t = eval.paired_t({s: a - b for s, (a, b) in enumerate(zip(v["any_harm"], values["grpo"]["any_harm"]))})
            gap = f"{100 * t['value']:+.1f} [{100 * t['ci_low']:+.1f}, {100 * t['ci_high']:+.1f}]"
        yield (f"| {name} | {', '.join(f'{100 * x:.1f}' for x in v['any_harm'])} | {percent(v['any_harm'])} | {gap} | "
               + " | ".join(percent(v[m]) for m in ("harmful_turns", "safety", "help", "over_refusal", "static any_harm"))
               + f" | {sum(v['tokens']) / len(v['tokens']) / 1000:.0f} |")


def main(args):
    if args.table:
        return print(*table(json.loads(SHOWN.read_text())), sep="\n")
    if args.arm:
        return one(args.out, args.arm)
    runs = [f"{args.out}/s{seed}" for seed in SEEDS]

    def call(done, log, *command):
        if not done.exists():
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "w") as f:
                code = subprocess.run(command, cwd=ROOT, stdout=f, stderr=f).returncode
            print(f"{log.stem}: {'done' if not code else f'failed, see {log}'}", flush=True)
            return code

    def toy(run):
        log = Path(args.out, f"{Path(run).name}.log")
        return call(Path(run, "results.json"), log, "make", "-o", ".venv/toy", "toy", f"PY={sys.executable}",
                    f"SEED={Path(run).name[1:]}", f"OUT={run}")

    def arm(job):
        run, name = job
        return call(folder(run, name) / "results.json", Path(args.out, f"{Path(run).name}-{name}.log"), sys.executable,
                    __file__, "--out", run, "--arm", name)

    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(2) as pool:
        if any(pool.map(toy, runs)) or any(pool.map(arm, [(r, a) for r in runs for a in ARMS if a not in BY_TOY])):
            sys.exit("not complete; the same command goes on")
    values = {}
    for name in ARMS:
        results = [eval.results([str(folder(run, name))]) for run in runs]
        values[name] = {m: [r["arms"][name][m]["value"] for r in results] for m in eval.METRICS}
        values[name]["static any_harm"] = [r["static"][name]["any_harm"]["value"] for r in results]
        values[name]["tokens"] = [tokens(f"{run}/{name}") + (name not in ("sft", "long")) * tokens(f"{run}/sft") for run in runs]
    SHOWN.write_text(json.dumps(values, indent=1) + "\n")
    print(*table(values), sep="\n")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="out/ablation", help="folder of the runs")
    p.add_argument("--table", action="store_true", help="print tests/ablation.json as Markdown")
    p.add_argument("--arm", help="train and evaluate one arm of the run in --out (the script calls itself)")
    main(p.parse_args())
