"""
When does TCSR (alpha .3) train better than the plain mean? A simulation of credit assignment.

    python tests/regimes.py     # one Markdown table, about a minute on one thread

The policy has one logit per turn and chooses between two replies. The cautious reply has reward
.85. The full reply has reward .95 and is useful. On an attacked turn the full reply is a failure
with probability q, and then its reward is 0. The failure probability of a dialogue is computed
exactly, as 1 - prod(1 - p_t q).

The judge adds Gaussian noise to every reward and clips the sum to 0..1. A false alarm is a turn
that the judge scores 0 whatever was said. Training is 300 steps of GRPO with 40 rollouts and Adam.
The arms differ only in their advantages, from ../tcsr.py, and start from the same random seeds.

Unless a regime says otherwise, a dialogue has 10 turns and one attack, at turn 9, with q = .5; the
noise is .1; groups have 5 rollouts; advantages are divided by the std; the KL weight is .1.

Rows, for each regime:
failure %   dialogues with a failure after training, +- half the 95 % interval over the seeds
steps       median number of steps until this has halved; – where most seeds never get there, and
            such a seed counts as 300 in the difference
useful %    turns answered fully and without a failure, after training
SNR         of the gradient at the attacked turns, one step's batch at the initial policy: mean over
            standard deviation. Positive means that the step makes failures less likely.
The last column is TCSR minus mean, paired by seed, with its 95 % interval.
In the trade regimes the mean gains from full replies on attacked turns, (1 - q) .95 > .85.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tcsr import advantages

SEEDS, STEPS, ROLLOUTS, LEARNING_RATE, SNR_BATCHES = 32, 300, 40, 0.05, 50
CAUTIOUS, FULL = 0.85, 0.95                     # rewards; a failure has 0

ARMS = {
    "last turn": dict(alpha=None),
    "mean": dict(alpha=0),
    "mean of the turns from t on": dict(alpha=None, how="turn"),
    "minimum": dict(alpha=1),
    "TCSR": dict(alpha=.3),
    "TCSR, turn credit": dict(alpha=.3, how="turn"),
    "paper: sum, never std": dict(alpha=.3, how="sum", scale=False),
    "released: last turn is 0": dict(alpha=.3),
}
DEFAULT = dict(turns=10, attacked=[8], q=.5, noise=.1, alarms=0., group=5, std=True, kl=.1)
ALL = list(range(10))
REGIMES = {
    "toy-like: 5 turns, all attacked": dict(turns=5, attacked=ALL[:5], noise=.05),
    "late attack": dict(),
    "late, noise .3": dict(noise=.3),
    "late, noise .3, groups of 2": dict(noise=.3, group=2),
    "late, noise .3, groups of 8": dict(noise=.3, group=8),
    "late, noise .3, no std, no KL": dict(noise=.3, std=False, kl=0.),
    "late, noise .3, no std": dict(noise=.3, std=False),
    "late, false alarms 10 %": dict(alarms=.1),
    "attack at turn 10, noise .3": dict(attacked=[9], noise=.3),
    "trade: late, q .06, with std, no KL": dict(q=.06, kl=0.),
    "trade, no std, no KL": dict(q=.06, std=False, kl=0.),
    "trade at all turns, no std, no KL": dict(q=.06, attacked=ALL, std=False, kl=0.),
    "all turns attacked": dict(attacked=ALL),
}
CURVES = ("toy-like: 5 turns, all attacked", "late, noise .3, groups of 2",
          "trade: late, q .06, with std, no KL", "trade, no std, no KL")


def failure_probability(regime):
    """The chance that a full reply fails, by turn, (T,)."""
    q = np.zeros(regime["turns"])
    q[regime["attacked"]] = regime["q"]
    return q


def policy_gradient(regime, arm, p, rng):
    """
    One step's gradient for S independent students and B groups of G, p (S, T) -> (S, T).
    p is the probability of the full reply. d log pi / d logit = (reply is full) - p.
    """
    S, T = p.shape
    G = regime["group"]
    shape = S, ROLLOUTS // G, G, T                                  # (S, B, G, T)
    p = p[:, None, None, :]                                         # (S, 1, 1, T)

    # the replies and their true rewards
    full = rng.random(shape, dtype=np.float32) < p
    failed = full & (rng.random(shape, dtype=np.float32) < failure_probability(regime))
    rewards = np.where(full, FULL, CAUTIOUS)
    rewards[failed] = 0

    # the rewards that the judge gives
    rewards += regime["noise"] * rng.standard_normal(shape, dtype=np.float32)
    rewards = np.clip(rewards, 0, 1)
    rewards[rng.random(shape, dtype=np.float32) < regime["alarms"]] = 0
    if arm.startswith("released"):
        rewards[..., -1] = 0

    settings = {"scale": regime["std"], **ARMS[arm]}
    adv, _ = advantages(rewards.reshape(-1, G, T), **settings)      # (S*B, G, T)
    return (adv.reshape(shape) * (full - p)).mean((1, 2))           # (S, T)


def train(regime, arm):
    """-> the share of dialogues with a failure (STEPS + 1, S) and of useful turns (S,)"""
    rng = np.random.default_rng(0)
    q = failure_probability(regime)
    logits = np.zeros((SEEDS, regime["turns"]))
    first, second = np.zeros_like(logits), np.zeros_like(logits)    # Adam's moments
    failure = []
    for step in range(1, STEPS + 2):
        p = 1 / (1 + np.exp(-logits))
        failure.append(1 - (1 - p * q).prod(1))

        # reward, minus the exact KL to the initial policy, whose logits are 0
        gradient = policy_gradient(regime, arm, p, rng) - regime["kl"] * p * (1 - p) * logits

        first = .9 * first + .1 * gradient
        second = .99 * second + .01 * gradient ** 2
        size = np.sqrt(second / (1 - .99 ** step)) + 1e-8
        logits = logits + LEARNING_RATE * first / (1 - .9 ** step) / size
    return np.array(failure), (p * (1 - q)).mean(1)


def signal_to_noise(regime, arm):
    """The gradient at the attacked turns, mean over std of SNR_BATCHES batches, (S,)."""
    p = np.full((SEEDS * SNR_BATCHES, regime["turns"]), .5)
    gradient = policy_gradient(regime, arm, p, np.random.default_rng(1))
    gradient = gradient[:, regime["attacked"]].mean(1).reshape(SEEDS, SNR_BATCHES)
    return -gradient.mean(1) / gradient.std(1, ddof=1)


def interval(x):
    return 1.96 * x.std(ddof=1) / len(x) ** .5


def measure(regime, arm):
    """-> name of the row: values (S,); and the mean curve of the failures"""
    failure, useful = train(regime, arm)
    halved = failure < failure[0] / 2
    steps = np.where(halved.any(0), halved.argmax(0), STEPS)
    rows = {"failure %": 100 * failure[-1], "steps": steps, "useful %": 100 * useful}
    rows["SNR"] = signal_to_noise(regime, arm)
    return rows, failure.mean(1)


def cell(row, x):
    if row == "failure %":
        return f"{x.mean():.1f} ±{interval(x):.1f}"
    if row == "steps":
        return "–" if np.median(x) == STEPS else f"{np.median(x):.0f}"
    return f"{x.mean():.0f}" if row == "useful %" else f"{x.mean():.2f}"


def draw(curves, path):
    """The failures by step in the regimes of CURVES, one panel each: mean, minimum, TCSR."""
    colours = {"mean": "#c33", "minimum": "#888", "TCSR": "#25c"}
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="880" height="230" font-size="11">',
           '<rect width="880" height="230" fill="white"/><g font-family="sans-serif">']
    for k, regime in enumerate(CURVES):
        left = 10 + 218 * k
        top = 100 * max(curves[regime, arm].max() for arm in colours)
        out.append(f'<text x="{left}" y="20">{regime}</text>')
        out.append(f'<text x="{left + 3}" y="36">{top:.0f} % fail</text>')
        out.append(f'<path d="M{left} 40V200H{left + 200}" fill="none" stroke="#999"/>')
        for i, (arm, colour) in enumerate(colours.items()):
            points = ""
            for step, share in enumerate(curves[regime, arm]):
                points += f"{left + 200 * step / STEPS:.1f},{200 - 160 * 100 * share / top:.1f} "
            out.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
            out.append(f'<text x="{left + 60 * i}" y="218" fill="{colour}">{arm}</text>')
    Path(path).write_text("\n".join(out + ["</g></svg>\n"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--svg", help="also draw the curves of four regimes into this file")
    args = parser.parse_args()
    print("| regime | measure | " + " | ".join(ARMS) + " | TCSR − mean [95 %] |")
    print("| --- | --- |" + " --- |" * (len(ARMS) + 1))
    curves = {}
    for name, changes in REGIMES.items():
        results = {}
        for arm in ARMS:
            results[arm], curves[name, arm] = measure({**DEFAULT, **changes}, arm)
        for row in results["mean"]:
            cells = [cell(row, results[arm][row]) for arm in ARMS]
            d = results["TCSR"][row] - results["mean"][row]
            half = interval(d)
            cells.append(f"{d.mean():+.2f} [{d.mean() - half:+.2f}, {d.mean() + half:+.2f}]")
            print(f"| {name} | {row} | " + " | ".join(cells) + " |", flush=True)
    if args.svg:
        draw(curves, args.svg)


if __name__ == "__main__":
    main()
