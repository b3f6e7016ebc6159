"""
The figures as plain SVG files in docs/. Run it from the root of the project.

    python tests/figures.py toy out/toy             a run of make toy
        rollout.svg     one rollout that slips once: tokens and mask, scores, TCSR, advantages
        survival.svg    harmful dialogues without a harmful turn after each turn, by arm
    python tests/figures.py ablation                tests/ablation.json
        ablation.svg    every arm and seed, the difference to the full method, the paper's row
    python tests/figures.py english out/english     runs of make english
        english.svg     the training curves of every seed
"""
import argparse
import html
import json
import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ablation
import eval
import judge
import tcsr

WIDTH, LEFT, RIGHT, BARS, COLUMN = 760, 28, 732, 512, 44
INK, GREY, LINE, BLUE, RED, PALE = "#1f2937", "#5b6472", "#e2e5ea", "#1d4ed8", "#d1242f", "#aab6c8"
TRAINED, READ = ("#dbeafe", "#8fb1f2", "#1e3a8a"), ("#f4f5f7", "#cdd3dc", GREY)   # fill, edge, text
ARMS = {"base": ("base model", "#9a6700"), "sft": ("SFT", "#8250df"), "grpo": ("GRPO", "#0f766e")}
ABOUT = "The hazard sign in the picture makes it harmful to tell how the object works."
FOOTER = ("Advantage = (last TCSR − mean of the group) / standard deviation of the group.",
          "It is the same for every turn, so the good turns pay for the slip as well.",
          "A negative advantage makes its tokens less likely. Scores 1 to 10 count as 0 to 1.")


def text(x, y, words, size=13, fill=INK, anchor="start", weight=400, font="system-ui, sans-serif"):
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-family="{font}" font-size="{size}" fill="{fill}" '
            f'font-weight="{weight}" text-anchor="{anchor}">{html.escape(words)}</text>')


def rect(x, y, width, height, fill, edge="none", radius=0):
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{fill}" stroke="{edge}" rx="{radius}"/>')


def pick_rollout(path):
    """-> a group, and the rollout in it with the one turn that is much worse than all others"""
    groups, found = {}, []
    for line in open(path, encoding="utf-8"):
        row = json.loads(line)
        row["rewards"] = [turn["reward"] for turn in row["turns"]]
        if row["kind"] != "benign" and len(row["turns"]) in (3, 4):
            groups.setdefault((row["step"], row["id"]), []).append(row)
    for group in groups.values():
        rewards = np.array([row["rewards"] for row in group])       # (G, T)
        n, t = np.unravel_index(rewards.argmin(), rewards.shape)
        lowest, second = np.sort(rewards, axis=None)[:2]
        if 0 < t < rewards.shape[1] - 1 and 0 < lowest < second - 0.4:
            found.append((lowest, -len(np.unique(rewards)), len(found), group, group[n]))
    return min(found)[3:] if found else judge.bad_input(f"{path}: in no group a single turn slips")


def chips(parts, tokenizer, words, y, colours):
    """Draw the tokens of a text as chips, in lines from y on. -> the y below them"""
    fill, edge, ink = colours
    x, font = LEFT + 14, "Menlo, Consolas, monospace"
    for token in tokenizer(words).input_ids:
        label = tokenizer.decode([token]).replace("\n", "↵").replace("<|image_pad|>", "picture")
        label = judge.printable(label.strip(" "))
        width = 6.65 * len(label) + 7
        if x + width > RIGHT:
            x, y = LEFT + 14, y + 23
        parts.append(rect(x, y, width, 20, fill, edge, 4))
        parts.append(text(x + width / 2, y + 14, label, 11, ink, "middle", font=font))
        x += width + 3
    return y + 23


def draw_turn(parts, group, shown, t, y):
    """Below the tokens of turn t: two sums that end in TCSR, and the advantages of the group."""
    turn, rewards, r = shown["turns"][t], shown["rewards"][:t + 1], "r" + "₁₂₃₄"[t]
    terms = [           # column, line, label, sign, number
        (0, 0, f"safety {turn['safety']}", "0.6 ×", (turn["safety"] - 1) / 9),
        (1, 0, f"usefulness {turn['usefulness']}", "+ 0.3 ×", (turn["usefulness"] - 1) / 9),
        (2, 0, f"faithfulness {turn['faithfulness']}", "+ 0.1 ×", (turn["faithfulness"] - 1) / 9),
        (1, 1, "lowest r so far", "0.3 ×", min(rewards)),
        (2, 1, "mean r so far", "+ 0.7 ×", np.mean(rewards)),
        (3, 0, f"reward {r}", "=", rewards[-1]), (3, 1, "TCSR", "=", tcsr.tcsr(rewards)[-1])]
    for column, line, label, sign, number in terms:
        x, top, ink = LEFT + 52 + 106 * column, y + 48 * line, RED if number < 0.5 else INK
        parts += [text(x, top, label, 12, GREY), text(x - 5, top + 20, sign, 12, GREY, "end"),
                  text(x, top + 20, f"{number:.2f}", 16, ink, weight=600)]

    # a column for each rollout of the group
    for line, label in enumerate((r, "TCSR", "advantage")):
        parts.append(text(BARS - 2, y + 16 * line, label, 12, GREY, "end"))
    for n, row in enumerate(group):
        reward, value = row["rewards"][t], tcsr.tcsr(row["rewards"])[t]
        advantage = row["turns"][t]["advantage"]
        x, bar = BARS + COLUMN * (n + 0.5), 14 * advantage
        colour, weight = (BLUE, 700) if row is shown else (PALE, 400)
        parts.append(rect(x - 14, y + 62 - max(bar, 0), 28, abs(bar), colour))
        for line, number in enumerate((f"{reward:.2f}", f"{value:.2f}", f"{advantage:+.1f}")):
            parts.append(text(x, y + 16 * line, number, 12, INK, "middle", weight))
    parts.append(rect(BARS, y + 61.5, COLUMN * len(group), 1, GREY))


def draw_rollout(out):
    group, shown = pick_rollout(f"{out}/grpo/rollouts.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(f"{out}/world/base", local_files_only=True)
    parts, y = [text(LEFT, 46, "One slip costs every turn", 22, weight=700)], 126
    for line, (fill, edge, _), tokens, bar, rollouts in (
            (66, TRAINED, "tokens of the student: trained", BLUE, "this rollout"),
            (90, READ, "user and template: only read", PALE, "others with the same question")):
        parts += [rect(LEFT, line, 14, 14, fill, edge, 3), text(LEFT + 22, line + 12, tokens),
                  rect(296, line, 14, 14, bar, bar, 3), text(318, line + 12, rollouts)]
    for t, turn in enumerate(shown["turns"]):
        top, (ink, edge) = y, (RED, RED) if turn["reward"] < 0.5 else (INK, LINE)
        note = f"attack: {turn['strategy'].replace('_', ' ')}" if t else ABOUT
        parts.append(text(LEFT + 14, y + 14, f"Turn {t + 1}", 15, ink, weight=700))
        parts.append(text(LEFT + 72, y + 14, note, 13, GREY))
        start = "\n<|im_start|>user\n" if t else "<|im_start|>user\n<|image_pad|>"
        user = f"{start}{turn['user']}<|im_end|>\n<|im_start|>assistant\n"
        y = chips(parts, tokenizer, user, y + 24, READ)
        y = chips(parts, tokenizer, turn["assistant"] + "<|im_end|>", y, TRAINED)
        draw_turn(parts, group, shown, t, y + 16)
        parts.append(rect(LEFT, top, 4, y + 104 - top, edge, radius=2))
        y += 122
    for line, words in enumerate(FOOTER):
        parts.append(text(LEFT, y + 12 + 20 * line, words))
    return y + 76, parts


def draw_survival(out):
    arms = json.loads(Path(out, "results.json").read_text())["arms"]
    curves = {name: arm["survival"]["harm"] for name, arm in arms.items()}
    x0, y0, dx, height = 78, 370, 61, 270           # of the axes; dx is the width of a turn
    parts = [text(LEFT, 46, "Harmful dialogues without a harmful turn", 22, weight=700),
             text(LEFT, 70, "share of the dialogues, with its 95 % interval", 13, GREY),
             text(x0 + 5 * dx, y0 + 46, "after turn", 13, GREY, "middle")]
    for share in (0, 25, 50, 75, 100):
        y = y0 - height * share / 100
        parts.append(rect(x0, y, 10.5 * dx, 1, LINE))
        parts.append(text(x0 - 8, y + 4, f"{share} %", 12, GREY, "end"))
    parts += [text(x0 + dx * t, y0 + 22, f"{t}", 12, GREY, "middle") for t in range(11)]
    for name, curve in curves.items():
        label, colour = ARMS.get(name, (name, INK))
        n_turns = sum(n > 0 for n in curve["at_risk"])      # after them no dialogue is left
        turns = [*np.repeat(np.arange(n_turns + 1), 2)[1:], n_turns + 0.5]
        points = {}
        for key in ("value", "low", "high"):
            shares = np.repeat([1, *curve[key][:n_turns]], 2)
            points[key] = [f"{x0 + dx * t},{y0 - height * s:.1f}" for t, s in zip(turns, shares)]
        band, line = " ".join(points["low"] + points["high"][::-1]), " ".join(points["value"])
        parts.append(f'<polygon points="{band}" fill="{colour}" opacity="0.15"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        # the label stands where the curve is farthest from the others
        others = [other["value"][:n_turns] for key, other in curves.items() if key != name]
        t = np.abs(np.subtract(others, curve["value"][:n_turns])).min(0).argmax()
        y = y0 - height * curve["value"][t] - 7
        parts.append(text(x0 + dx * (t + 1) + 7, y, label, 15, colour, weight=700))
    return 436, parts


ROWS = (        # an arm of ablation.py and its name, or a heading
    "no training, one stage", ("base", "base model"), ("sft_single", "SFT on single turns"),
    ("sft", "SFT"), ("grpo_from_base", "GRPO without SFT"),
    "both stages", ("grpo", "full method"),
    ("sft_single+grpo_single", "both on single turns"), ("scripted", "scripted attacks"),
    "other returns instead of TCSR", ("last_turn", "last turn's reward"), ("mean", "mean"),
    ("minimum", "minimum"), ("turn_credit", "own TCSR of a turn"),
    "published algorithms", ("like_paper", "--like paper"), ("like_released", "--like released"),
    ("released_unjudged", ".. with the unjudged 0"),
    "tutor with noise, groups of 2", ("noisy_tutor", "TCSR"), ("noisy_tutor_mean", "mean"),
    "lenient tutor, no division by std", ("lenient_tutor", "TCSR"), ("lenient_tutor_mean", "mean"))

ABLATION_NOTES = (
    "A dot is a training seed, a red line their mean, in %. The paper has one run of an arm.",
    "* to the full method, in points, with the paired 95 % interval; of the mean in the last two",
    "groups, to TCSR in the same group.")


def draw_ablation():
    results = json.loads(ablation.RESULTS.read_text())["multi"]
    parts = [text(LEFT, 46, "What each part of the method does", 22, weight=700)]
    panels = (("any_harm", 238), ("safety", 412), ("help", 586))        # left ends of the axes
    for metric, x0 in panels:
        parts += [text(x0, 80, metric, 13, INK, weight=600),
                  text(x0 + 86, 80, "difference *", 11, GREY)]
        parts += [text(x0 + 0.75 * share, 98, f"{share}", 11, GREY, "middle")
                  for share in (0, 50, 100)]
    parts += [text(158, 80, "paper, 3B:", 11, GREY), text(158, 98, "Safety / Help", 11, GREY)]
    y = 112
    for row in ROWS:
        if isinstance(row, str):
            y += 24
            parts.append(text(LEFT, y, row, 12, GREY))
            continue
        y += 22
        arm, name = row
        runs = results[arm]
        weight = 700 if arm == "grpo" else 400
        parts.append(text(LEFT + 6, y, name, 12, weight=weight))
        parts.append(text(158, y, ablation.PAPER["multi"].get(arm, ""), 11, GREY))
        # the mean with a bad tutor is compared to TCSR with the same tutor
        other = results[arm[:-5]] if arm.endswith("tutor_mean") else results["grpo"]
        for metric, x0 in panels:
            parts.append(rect(x0, y - 5, 75, 1, LINE))
            values = [100 * run[metric] for run in runs.values()]
            for value in values:
                parts.append(f'<circle cx="{x0 + 0.75 * value:.1f}" cy="{y - 4.5:.1f}" r="3.5" '
                             f'fill="{BLUE}" opacity="0.45"/>')
            parts.append(rect(x0 + 0.75 * np.mean(values) - 1, y - 12, 2, 15, RED))
            if arm not in ("grpo", "noisy_tutor", "lenient_tutor"):
                gaps = [100 * (runs[seed][metric] - other[seed][metric]) for seed in runs]
                gap = "{:+.0f} [{:.0f}, {:.0f}]".format(*eval.t_interval(gaps))
                parts.append(text(x0 + 86, y, gap, 11))
    for line, words in enumerate(ABLATION_NOTES):
        parts.append(text(LEFT, y + 34 + 20 * line, words, 13, GREY))
    return y + 102, parts


def draw_english(out):
    """A panel for each curve, a line for each seed: means over five steps."""
    panels = (("SFT: loss", "sft", "loss", 1.5), ("GRPO: return", "grpo", "return", 1),
              ("GRPO: harm", "grpo", "harm", 1),
              ("GRPO: refused", "grpo", "refused", 1))           # title, run, column, top
    height, width, y0 = 150, 130, 260
    parts = [text(LEFT, 46, "Training SmolLM2-135M, a line for each seed", 22, weight=700),
             text(LEFT, 68, "means of five steps; harm and refused are shares of the turns that "
                  "were sampled in harmful and in benign dialogues", 12, GREY)]
    for n, (title, run, column, top) in enumerate(panels):
        x0 = LEFT + 30 + 178 * n
        parts.append(text(x0, 98, title, 13, weight=600))
        for share in (0, 0.5, 1):
            y = y0 - height * share
            parts += [rect(x0, y, width, 1, LINE),
                      text(x0 - 6, y + 4, f"{share * top:g}", 12, GREY, "end")]
        folders = [log.parent.parent for log in sorted(Path(out).glob("s*/grpo/log.jsonl"))]
        if not folders:
            judge.bad_input(f"{out}: no runs of make english")
        for folder in folders:
            rows = judge.read_log(folder / run / "log.jsonl")
            values = [row[column] for row in rows]
            values = np.convolve(values, np.ones(5) / 5, "valid")
            xs = np.linspace(x0, x0 + width, len(values))
            points = " ".join(f"{x:.1f},{y0 - height * min(value / top, 1):.1f}"
                              for x, value in zip(xs, values))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{BLUE}" '
                         f'stroke-width="1.5" opacity="0.7"/>')
        parts.append(text(x0 + width, y0 + 20, f"{len(rows)} steps", 12, GREY, "end"))
    return y0 + 44, parts


FIGURES = {"toy": {"rollout": draw_rollout, "survival": draw_survival},
           "ablation": {"ablation": draw_ablation}, "english": {"english": draw_english}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the figures of the README into docs/")
    parser.add_argument("what", choices=list(FIGURES))
    parser.add_argument("out", nargs="?", help="the folder of the runs")
    args = parser.parse_args()
    if (args.what == "ablation") != (args.out is None):
        parser.error("toy and english need the folder of the runs, ablation needs none")
    for name, draw in FIGURES[args.what].items():
        height, parts = draw() if args.out is None else draw(args.out)
        # a white card with round corners, so that it is readable on a dark page too
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">'
        card = rect(0.5, 0.5, WIDTH - 1, height - 1, "#ffffff", LINE, 14)
        judge.write_file(f"docs/{name}.svg", "\n".join([head, card, *parts, "</svg>\n"]))
