"""
What would another reward have done with the same rollouts? This replays a log of grpo.py.

    python tests/replay.py out/toy/grpo/rollouts.jsonl

It computes the advantages again under the last turn's reward, the mean, the minimum and TCSR with
several alphas, and compares each with TCSR at alpha 0.3:
    sign changes    share of the judged turns that would be pushed the other way
    mean |change|   of the advantage of a judged turn
    correlation     of the advantages of all judged turns
    dead groups     share of groups without any advantage
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import judge
import tcsr

ALPHAS = {"last turn": None, "mean": 0, "minimum": 1, "TCSR 0.1": 0.1, "TCSR 0.3": 0.3,
          "TCSR 0.5": 0.5, "TCSR 0.7": 0.7, "TCSR 0.9": 0.9}


def read_groups(path):
    """-> one array (G, T) of rewards per group, NaN where a turn has none"""
    groups = {}             # (step, id): the rewards of each rollout
    for number, line in enumerate(open(path, encoding="utf-8"), 1):
        try:
            row = json.loads(line)
            rewards = [turn["reward"] for turn in row["turns"]]
            groups.setdefault((row["step"], row["id"]), []).append(np.array(rewards, float))
        except (ValueError, LookupError, TypeError) as error:
            judge.bad_input(f"{path}:{number}: no rollout of grpo.py: {error!r}")

    # all rollouts of a group have equally many turns, unless one was cut: then it has no rewards
    arrays = []
    for rollouts in groups.values():
        turns = max(len(rewards) for rewards in rollouts)
        rows = [r if len(r) == turns else np.full(turns, np.nan) for r in rollouts]
        arrays.append(np.array(rows))
    return arrays


def replay(groups, alpha, how):
    """-> the advantages of all judged turns, and the share of dead groups"""
    kept, dead = [], []
    for rewards in groups:
        credit = "trajectory" if alpha is None else how     # the last turn's reward is one number
        adv, info = tcsr.advantages(rewards[None], alpha=alpha, how=credit)
        kept.append(adv[0][~np.isnan(rewards)])
        dead.append(info["dead_groups"])
    return np.concatenate(kept), np.mean(dead)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Replay a log of grpo.py under other rewards",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("log", help="rollouts.jsonl of a run of grpo.py")
    parser.add_argument("--how", default="trajectory", choices=("trajectory", "turn", "sum"),
                        help="credit, see tcsr.py")
    args = parser.parse_args(argv)
    groups = read_groups(args.log)
    if not groups:
        judge.bad_input(f"{args.log}: no rollouts")
    default, _ = replay(groups, 0.3, args.how)
    print("reward     sign changes   mean |change|   correlation   dead groups")
    for name, alpha in ALPHAS.items():
        adv, dead = replay(groups, alpha, args.how)
        varied = adv.any() and default.any()
        correlation = np.corrcoef(adv, default)[0, 1] if varied else np.nan
        print(f"{name:10} {np.mean(adv * default < 0):12.1%} {np.abs(adv - default).mean():15.3f} "
              f"{correlation:13.3f} {dead:13.1%}")


if __name__ == "__main__":
    judge.run(main)
