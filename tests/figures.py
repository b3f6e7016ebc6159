"""
The two figures of the README, drawn from a run of the toy world (make toy) as plain SVG files.

    python tests/figures.py out/toy

docs/rollout.svg    one rollout that slips once: tokens and mask, scores, TCSR, group advantages
docs/survival.svg   harmful dialogues without a harmful turn after each turn, one curve per arm
"""
import argparse
import html
import json
import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import tcsr

WIDTH, LEFT, RIGHT, BARS, COLUMN = 760, 28, 732, 512, 44
SANS = "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\""
MONO = 'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"'
INK, GREY, LINE, BLUE, RED, PALE = "#1f2937", "#5b6472", "#e2e5ea", "#1d4ed8", "#d1242f", "#aab6c8"
TRAINED, READ = ("#dbeafe", "#8fb1f2", "#1e3a8a"), ("#f4f5f7", LINE, GREY)    # fill, edge, text
ARMS = {"base": ("base model", "#9a6700"), "sft": ("SFT", "#8250df"), "grpo": ("GRPO", "#0f766e")}


def text(x, y, words, size=13, fill=INK, anchor="start", weight=400):
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" '
            f'font-weight="{weight}" text-anchor="{anchor}">{html.escape(words)}</text>')


def rect(x, y, width, height, fill, edge="none", radius=0):
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{fill}" stroke="{edge}" rx="{radius}"/>')


def write_svg(name, height, parts):
    """A white card with round corners, so that it is readable on a dark page too."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {SANS}>'
    card = rect(0.5, 0.5, WIDTH - 1, height - 1, "#ffffff", LINE, 14)
    (ROOT / "docs" / name).write_text("\n".join([head, card, *parts, "</svg>\n"]), "utf-8")


def pick_rollout(path):
    """
    -> a group, and the rollout in it that slips. One turn of the group, neither a first nor a last
    one, has a much lower reward than all others; the lowest such reward of the log is taken.
    """
    groups, best, found = {}, 1, None
    for line in open(path, encoding="utf-8"):
        row = json.loads(line)
        if row["kind"] != "benign" and len(row["turns"]) in (3, 4):
            groups.setdefault((row["step"], row["id"]), []).append(row)
    for group in groups.values():
        rewards = np.array([[turn["reward"] for turn in row["turns"]] for row in group])    # (G, T)
        n, t = np.unravel_index(rewards.argmin(), rewards.shape)
        lowest, second = np.sort(rewards, axis=None)[:2]
        if 0 < t < rewards.shape[1] - 1 and 0 < lowest < min(best, second - 0.4):
            best, found = lowest, (group, group[n])
    return found or sys.exit(f"{path}: in no group a single turn slips")


def chips(tokenizer, words, y, colours):
    """The tokens of a text as chips in lines from y on -> the parts, and the y below them"""
    parts, x = [f"<g {MONO}>"], LEFT + 14
    for token in tokenizer(words).input_ids:
        label = tokenizer.decode([token]).replace("\n", "↵").replace("<|image_pad|>", "picture")
        width = 6.65 * len(label.strip()) + 7
        if x + width > RIGHT:
            x, y = LEFT + 14, y + 23
        parts.append(rect(x, y, width, 20, *colours[:2], 4))
        parts.append(text(x + width / 2, y + 14, label.strip(), 11, colours[2], "middle"))
        x += width + 3
    return [*parts, "</g>"], y + 23


def draw_turn(group, shown, t, y):
    """Below the tokens of turn t: two sums that end in TCSR, and the advantages of the group."""
    turn, r = shown["turns"][t], "r" + "₁₂₃₄"[t]
    rewards = [turn["reward"] for turn in shown["turns"][:t + 1]]
    unit = [(turn[name] - 1) / 9 for name in ("safety", "usefulness", "faithfulness")]
    terms = [           # column, line, label, sign, number
        (0, 0, f"safety {turn['safety']}", "0.6 ×", unit[0]),
        (1, 0, f"usefulness {turn['usefulness']}", "+ 0.3 ×", unit[1]),
        (2, 0, f"faithfulness {turn['faithfulness']}", "+ 0.1 ×", unit[2]),
        (3, 0, f"reward {r}", "=", rewards[-1]), (1, 1, "lowest r so far", "0.3 ×", min(rewards)),
        (2, 1, "mean r so far", "+ 0.7 ×", np.mean(rewards)),
        (3, 1, "TCSR so far", "=", tcsr.tcsr(rewards)[-1])]
    parts = []
    for column, line, label, sign, number in terms:
        x, top, ink = LEFT + 52 + 106 * column, y + 50 * line, RED if number < 0.5 else INK
        parts += [text(x, top, label, 11, GREY), text(x - 5, top + 20, sign, 12, GREY, "end"),
                  text(x, top + 20, f"{number:.2f}", 16, ink, weight=600)]

    # a column for each rollout of the group
    zero = y + 56
    parts.append(rect(BARS, zero - 0.5, COLUMN * len(group), 1, GREY))
    for label, line in ((r, y), ("TCSR", y + 16), ("advantage", zero + 4)):
        parts.append(text(BARS - 4, line, label, 11, GREY, "end"))
    for n, row in enumerate(group):
        rewards = [turn["reward"] for turn in row["turns"][:t + 1]]
        value, advantage = tcsr.tcsr(rewards)[-1], row["turns"][t]["advantage"]
        x, bar = BARS + COLUMN * (n + 0.5), 12 * abs(advantage)
        top, line = (zero - bar, zero - bar - 4) if advantage > 0 else (zero, zero + bar + 12)
        colour, weight = (BLUE, 700) if row is shown else (PALE, 400)
        parts += [rect(x - 14, top, 28, bar, colour),
                  text(x, y, f"{rewards[-1]:.2f}", 11, INK, "middle", weight),
                  text(x, y + 16, f"{value:.2f}", 11, INK, "middle", weight),
                  text(x, line, f"{advantage:+.1f}".replace("-", "−"), 11, INK, "middle", weight)]
    return parts


def draw_rollout(out):
    group, shown = pick_rollout(f"{out}/grpo/rollouts.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(f"{out}/world/base", local_files_only=True)
    parts, y = [text(LEFT, 46, "One slip costs every turn", 22, weight=700)], 126
    for x, line, colours, words in ((LEFT, 66, TRAINED, "tokens of the student: trained"),
                                    (LEFT, 90, READ, "user and template: only read"),
                                    (300, 66, (BLUE, BLUE), "this rollout"),
                                    (300, 90, (PALE, PALE), "the others of the same question")):
        parts += [rect(x, line, 14, 14, *colours[:2], 3), text(x + 22, line + 12, words)]
    for t, turn in enumerate(shown["turns"]):
        top, slips = y, turn["reward"] < 0.5
        note = f"attack: {turn['strategy'].replace('_', ' ')}" if t else "the first question"
        note += ". The student slips." if slips else ""
        parts += [text(LEFT + 14, y + 14, f"Turn {t + 1}", 15, RED if slips else INK, weight=700),
                  text(LEFT + 72, y + 14, note, fill=GREY)]
        start = "\n<|im_start|>user\n" if t else "<|im_start|>user\n<|image_pad|>"
        user = f"{start}{turn['user']}<|im_end|>\n<|im_start|>assistant\n"
        user_chips, y = chips(tokenizer, user, y + 24, READ)
        reply_chips, y = chips(tokenizer, turn["assistant"] + "<|im_end|>", y, TRAINED)
        parts += user_chips + reply_chips + draw_turn(group, shown, t, y + 16)
        parts.append(rect(LEFT, top, 4, y + 106 - top, RED if slips else LINE, radius=2))
        y += 124
    for line, words in enumerate((
            "Advantage = (last TCSR − mean of the group) / standard deviation of the group.",
            "It is the same for every turn, so the good turns pay for the slip as well.",
            "A negative advantage makes its tokens less likely. Scores 1 to 10 count as 0 to 1.")):
        parts.append(text(LEFT, y + 12 + 20 * line, words))
    write_svg("rollout.svg", y + 76, parts)


def draw_survival(out):
    results = json.loads(Path(out, "results.json").read_text())
    curves = {name: arm["survival"]["harm"] for name, arm in results["arms"].items()}
    x0, y0, dx, height = 78, 370, 61, 270           # of the axes; dx is the width of a turn
    labels, parts = [], [
        text(LEFT, 46, "Harmful dialogues without a harmful turn", 22, weight=700),
        text(LEFT, 70, f"Share after each turn, with 95 % interval. "
                       f"The attacker is {results['shared']['attacker']}.", fill=GREY),
        text(x0 + 5 * dx, y0 + 44, "turn", 13, GREY, "middle")]
    for quarter in range(5):
        y = y0 - height * quarter / 4
        parts.append(rect(x0, y, 10.5 * dx, 1, LINE))
        parts.append(text(x0 - 8, y + 4, f"{25 * quarter} %", 12, GREY, "end"))
    for t in range(11):
        parts.append(text(x0 + dx * t, y0 + 22, f"{t}", 12, GREY, "middle"))
    for name, curve in curves.items():
        # the steps; a curve ends where no dialogue is left
        label, colour = ARMS.get(name, (name, INK))
        n_turns = sum(n > 0 for n in curve["at_risk"])
        turns = [*np.repeat(np.arange(n_turns + 1), 2)[1:], n_turns + 0.5]
        points = {}
        for key in ("value", "low", "high"):
            shares = np.repeat([1, *curve[key][:n_turns]], 2)
            points[key] = [f"{x0 + dx * t},{y0 - height * s:.1f}" for t, s in zip(turns, shares)]
        band, line = " ".join(points["low"] + points["high"][::-1]), " ".join(points["value"])
        parts += [f'<polygon points="{band}" fill="{colour}" opacity="0.15"/>',
                  f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"/>']
        # the label stands where the curve is farthest from the others
        others = [other["value"][:n_turns] for key, other in curves.items() if key != name]
        t = np.abs(np.subtract(others, curve["value"][:n_turns])).min(0).argmax()
        y = y0 - height * curve["value"][t] - 7
        labels.append(text(x0 + dx * (t + 1) + 7, y, label, 15, colour, weight=700))
    write_svg("survival.svg", 436, parts + labels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw docs/rollout.svg and docs/survival.svg")
    parser.add_argument("out", help="output folder of make toy")
    folder = parser.parse_args().out
    draw_rollout(folder)
    draw_survival(folder)
