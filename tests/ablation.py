"""
The arms of the paper's Tables 4 and 5 in the toy world, with training seeds.

Every arm uses the world and the data that `make toy` makes for its seed, and most start from its
SFT adapter. What is finished is not run again, so the script can be stopped and started; delete
the folders of an arm whose flags you change. About an hour per seed, all arms together.

    python tests/ablation.py run --seeds 0 1 2 3 4      all arms of each seed, one after the other
    python tests/ablation.py table                      the tables, from tests/ablation.json
    python tests/ablation.py sampled grpo_from_base     what the rollouts of an arm's runs did
"""
import argparse
import collections
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out/ablation"
RESULTS = ROOT / "tests/ablation.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import eval
import judge
import toy

GRPO = ("--epochs 2 --lr 1e-3 --beta 0.05 --max_new 40 --max_tokens 1024 --micro_tokens 2500 "
        "--strategies yes_ladder hypothetical_escalation sunk_cost_anchor gradual_desensitisation "
        "authority_escalation emotional_appeal --tutor toy").split()
NOISY = "--tutor noisy_tutor --prompts 20 --group 2 --epochs 5"     # 40 rollouts a step, as always
# without the std advantages are about ten times smaller, and so has to be beta
LENIENT = "--tutor lenient_tutor --beta 0.005"
SFT = "--lr 3e-3 --lora_r 8 --lora_alpha 16 --micro_tokens 1500 --max_tokens 1024".split()

# name: (script, start, data, more flags). A start is the name of an arm, or None for the base.
# last_turn and no_std are grpo.py with a change, see changed_grpo. Arms of single turns get more
# epochs, because a dialogue of one turn is a fraction of the training.
ARMS = {
    "sft_single": ("sft.py", None, "sft_single", "--epochs 8"),
    "sft_single+grpo_single": ("grpo.py", "sft_single", "rl_single", "--epochs 6"),
    "grpo_from_base": ("grpo.py", None, "rl", ""),
    "scripted": ("grpo.py", "sft", "rl", "--tutor scripted_tutor"),
    "last_turn": ("last_turn", "sft", "rl", ""),
    "mean": ("grpo.py", "sft", "rl", "--alpha 0"),
    "minimum": ("grpo.py", "sft", "rl", "--alpha 1"),
    "turn_credit": ("grpo.py", "sft", "rl", "--credit turn"),
    "like_paper": ("grpo.py", "sft", "rl", "--like paper --beta 0.1"),
    "like_released": ("grpo.py", "sft", "rl", "--like released --beta 0.001"),
    "released_unjudged": ("grpo.py", "sft", "rl", "--like released --beta 0.001 --unjudged_last"),
    # the two regimes of regimes.py in which TCSR and the mean should differ most
    "lenient_tutor": ("no_std", "sft", "rl", LENIENT),
    "lenient_tutor_mean": ("no_std", "sft", "rl", LENIENT + " --alpha 0"),
    "noisy_tutor": ("grpo.py", "sft", "rl", NOISY),
    "noisy_tutor_mean": ("grpo.py", "sft", "rl", NOISY + " --alpha 0"),
}
BENCHES = ("multi", "single")
# Safety / Help of the 3B in the paper's Tables 2, 4 and 5; "without TCSR" is not explained there
PAPER = {
    "multi": {"base": "12.6 / 27.1", "sft": "41.6 / 57.6", "grpo": "55.6 / 70.3",
              "sft_single": "21.8 / 41.9", "sft_single+grpo_single": "17.1 / 32.4",
              "grpo_from_base": "24.5 / 42.4", "scripted": "51.1 / 64.0", "mean": "51.1 / 65.9"},
    "single": {"base": "48.3 / 45.9", "sft": "79.9 / 66.5", "grpo": "81.8 / 70.8"},
}


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(words, log):
    """Run a command with one thread, and stop the script if it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": "tests"}
    with open(log, "w") as file:
        done = subprocess.run(words, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\nended with {done.returncode}; see {log}")


def single_turn(records):
    """Dialogues cut after their first turn."""
    cut = []
    for record in records:
        first = [m["role"] for m in record["messages"]].index("user")
        messages = record["messages"][:first + 1]
        if record["messages"][first + 1]["role"] == "assistant":
            messages.append(record["messages"][first + 1])
        cut.append({**record, "messages": messages})
    return cut


def prepare(folder, seed):
    """World, data, base, SFT and full method of a seed, and the single-turn data."""
    if not (folder / "results.json").exists():
        words = ["make", "toy", f"OUT={folder.relative_to(ROOT)}", f"SEED={seed}"]
        run(words, OUT / f"s{seed}.log")
    data = folder / "data"
    for split in ("sft", "rl"):
        cut = single_turn(read(data / f"{split}.jsonl"))
        judge.write_jsonl(data / f"{split}_single.jsonl", cut)
    # the single-turn bench: the questions of the bench seeds, half harmful, half benign
    seeds = [s for s in read(folder / "world/seeds.jsonl") if s["split"] == "bench"]
    judge.write_jsonl(folder / "world/bench_single.jsonl", seeds)


def train(folder, name, seed):
    script, start, data, flags = ARMS[name]
    words = [sys.executable, script]
    if not script.endswith(".py"):
        words.insert(1, __file__)
    words += ["--model", str(folder / "world/base"), "--data", str(folder / f"data/{data}.jsonl")]
    words += ["--out", str(folder / name), "--seed", str(seed)]
    if start:
        words += ["--adapter", str(folder / start)]
    words += (SFT if script == "sft.py" else GRPO) + flags.split()
    if (folder / name / "args.json").exists():
        words.append("--resume")
    if not (folder / name / "adapter_model.safetensors").exists():
        run(words, folder / f"{name}.log")


def evaluate(folder, name, bench):
    """-> the metrics of an arm on a bench"""
    out = folder / f"eval_{bench}/{name}"
    data = folder / ("data/bench.jsonl" if bench == "multi" else "world/bench_single.jsonl")
    words = [sys.executable, "eval.py", "--model", str(folder / "world/base"), "--data", str(data),
             "--judge", "toy", "--tutor", "toy", "--attacker", "adaptive", "--max_new", "40",
             "--max_tokens", "1024", "--out", str(out), "--name", name]
    if name != "base":
        words += ["--adapter", str(folder / name)]
    if (out / "args.json").exists():
        words.append("--resume")
    if not (out / "results.json").exists():
        run(words, folder / f"eval_{bench}_{name}.log")
    return json.loads((out / "results.json").read_text())["arms"][name]


def run_seeds(seeds):
    OUT.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        folder = OUT / f"s{seed}"
        prepare(folder, seed)
        for name in ("base", "sft", "grpo", *ARMS):
            if name in ARMS:
                train(folder, name, seed)
            for bench in BENCHES:
                arm = evaluate(folder, name, bench)
                results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                shares = {m: entry["value"] for m, entry in arm["metrics"].items()}
                results.setdefault(bench, {}).setdefault(name, {})[str(seed)] = shares
                judge.write_file(RESULTS, json.dumps(results, indent=1, sort_keys=True) + "\n")
            print(f"seed {seed}: {name} done", flush=True)


def table():
    """Per bench and metric: every seed, the difference to the full method, and the paper's row."""
    results = json.loads(RESULTS.read_text())
    tables = []
    for bench in BENCHES:
        rows = []
        full = results[bench]["grpo"]
        for name in ("base", "sft", "grpo", *ARMS):
            runs = results[bench].get(name)
            if not runs:
                continue
            row = [name, PAPER[bench].get(name, "")]
            for metric in eval.METRICS:
                # a dash for a seed that was not run
                shares = [runs.get(seed, {}).get(metric) for seed in full]
                values = " ".join(map(eval.percent, shares))
                gaps = [runs[seed][metric] - full[seed][metric] for seed in runs if seed in full]
                value, low, high = eval.t_interval(gaps)
                gap = eval.cell({"value": value, "low": low, "high": high, "n": len(gaps)})
                row.append(values if name == "grpo" else f"{values} ({gap})")
            rows.append(row)
        title = f"{bench}-turn bench: every seed in %, (difference to grpo [95 %] seeds)"
        tables.append((title, ["", "paper: Safety / Help", *eval.METRICS], rows))
    eval.print_tables(tables)


def sampled(name, seeds):
    """
    For each seed of an arm: what the tutor said of the turns of harmful dialogues in the first and
    the last quarter of the steps, and by form of asking how many turns were sampled, how many of
    them refused, and the share of harmful turns on the multi-turn bench.
    """
    for seed in seeds:
        folder = OUT / f"s{seed}"
        quarters, asked, refused = {}, collections.Counter(), collections.Counter()
        rollouts = [r for r in read(folder / name / "rollouts.jsonl") if r["kind"] != "benign"]
        n_steps = 1 + max(r["step"] for r in rollouts)
        for r in rollouts:
            found = quarters.setdefault(4 * r["step"] // n_steps, collections.Counter())
            for turn in r["turns"]:
                found[turn["diagnosis"]] += 1
                form = toy.read_form(turn["user"])
                asked[form] += 1
                refused[form] += turn["diagnosis"] in ("bare", "preachy", "constructive")
        for quarter in (0, 3):
            n = sum(quarters[quarter].values())
            shares = [f"{key} {100 * k / n:.1f}" for key, k in quarters[quarter].most_common()]
            print(f"seed {seed}, quarter {quarter + 1}, %:", ", ".join(shares))

        # the bench
        turns, harmful = collections.Counter(), collections.Counter()
        for sample in read(folder / f"eval_multi/{name}/samples.jsonl"):
            if sample["kind"] != "benign":
                for turn in sample["turns"]:
                    form = toy.read_form(turn["user"])
                    turns[form] += 1
                    harmful[form] += turn["verdict"]["harmlessness"] < 0
        for form in toy.FORMS:
            print(f"  {form}: {asked[form]} sampled, {refused[form]} refused; "
                  f"harm on the bench {100 * harmful[form] / max(1, turns[form]):.0f} %")


def changed_grpo(change, argv):
    """grpo.py with the last turn's reward as the return of the dialogue, or without the std."""
    import grpo
    if change == "last_turn":
        grpo.tcsr.tcsr = lambda rewards, alpha, mask=None: grpo.tcsr._masked(rewards, mask)[0]
    if change == "no_std":
        grpo.METHODS["ours"]["divide_by_std"] = False
    judge.run(lambda: grpo.main(argv))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table", "sampled"))
    parser.add_argument("arm", nargs="?", choices=list(ARMS), help="for sampled")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    if (args.what == "sampled") != (args.arm is not None):
        parser.error("sampled needs an arm, the others take none")
    if args.what == "run":
        run_seeds(args.seeds)
    elif args.what == "sampled":
        sampled(args.arm, args.seeds)
    else:
        table()


if __name__ == "__main__":
    if sys.argv[1:2] in (["last_turn"], ["no_std"]):
        changed_grpo(sys.argv[1], sys.argv[2:])
    else:
        main()
