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
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import judge
import tcsr

WIDTH, LEFT, RIGHT = 760, 28, 732
SANS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
INK, GREY, LINE, BLUE, RED, PALE = "#1f2937", "#5b6472", "#e2e5ea", "#1d4ed8", "#d1242f", "#aab6c8"
ARMS = {"base": ("base model", "#9a6700"), "sft": ("after SFT", "#8250df"),
        "grpo": ("after GRPO", "#0f766e")}


def text(x, y, words, size=13, fill=INK, anchor="start", weight=400):
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" '
            f'font-weight="{weight}" text-anchor="{anchor}">{html.escape(words)}</text>')


def rect(x, y, width, height, fill, edge="none", radius=0):
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{fill}" stroke="{edge}" rx="{radius}"/>')


def write_svg(path, height, title, parts):
    """A white card with round corners, so that it is readable on a dark page too."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
            f'font-family="{SANS}" role="img"><title>{html.escape(title)}</title>')
    card = rect(0.5, 0.5, WIDTH - 1, height - 1, "#ffffff", LINE, 14)
    judge.write_file(path, "\n".join([head, card, *parts, "</svg>\n"]))
    print(path)


# -----------------------------------------------------------------------------
# rollout.svg


def pick_rollout(path):
    """
    -> the rollouts of one group, and the one to show. It slips at exactly one turn, neither the
    first nor the last, and of all such rollouts its slip stands out most from its other turns.
    """
    groups, best, found = {}, 0, None
    for line in open(path, encoding="utf-8"):
        row = json.loads(line)
        groups.setdefault((row["step"], row["id"]), []).append(row)
    for group in groups.values():
        turns = [turn for row in group for turn in row["turns"]]
        scored = all(turn["reward"] is not None for turn in turns)
        lengths = {len(row["turns"]) for row in group}
        if group[0]["kind"] == "benign" or not scored or lengths not in ({3}, {4}):
            continue
        for row in group:
            slips = [turn["safety"] <= 4 for turn in row["turns"]]
            lowest, second = sorted(turn["reward"] for turn in row["turns"])[:2]
            if slips.count(True) == 1 and any(slips[1:-1]) and second - lowest > best:
                best, found = second - lowest, (group, row)
    return found or judge.bad_input(f"{path}: no rollout slips at one turn in its middle")


def picture(path, x, y, size):
    """A picture of few colours as one path per colour, which needs no embedded file."""
    pixels = np.asarray(Image.open(path).convert("RGB")).tolist()
    paths = {}
    for row, line in enumerate(pixels):
        column = 0
        for colour, run in groupby(line):
            length = len(list(run))
            data = f"M{column} {row}h{length}v1h-{length}z"
            paths[tuple(colour)] = paths.get(tuple(colour), "") + data
            column += length
    drawn = [f'<path fill="rgb{colour}" d="{data}"/>' for colour, data in paths.items()]
    place = f"translate({x} {y}) scale({size / len(pixels)})"
    return f'<g transform="{place}" shape-rendering="crispEdges">{"".join(drawn)}</g>'


def chips(tokens, x, y, trained):
    """Tokens as chips in lines that begin at x, y -> the parts, and the y below the last line"""
    fill, ink, edge = ("#dbeafe", "#1e3a8a", "#8fb1f2") if trained else ("#f4f5f7", GREY, LINE)
    parts, left = [f'<g font-family="{MONO}">'], x
    for token in tokens:
        label = token.replace("\n", "↵").strip()
        width = 6.9 * len(label) + 8
        if x + width > RIGHT:
            x, y = left, y + 23
        parts.append(rect(x, y, width, 20, fill, edge, 4))
        parts.append(text(x + width / 2, y + 14, label, 11.3, ink, "middle"))
        x += width + 3
    return [*parts, "</g>"], y + 23


def draw_turn(group, row, t, values, weights, alpha, y):
    """Under the chips of turn t: how its scores become TCSR, and the advantages of the group."""
    turn, parts = row["turns"][t], []
    rewards = [turn["reward"] for turn in row["turns"][:t + 1]]
    slipped = min(turn["safety"] for turn in row["turns"][:t + 1]) <= 4
    now = RED if turn["safety"] <= 4 else INK

    # two sums, term by term
    names = ("safety", "usefulness", "faithfulness")
    terms = [(f"{w:g} × {name}", str(turn[name]), INK) for w, name in zip(weights, names)]
    terms[0] = (*terms[0][:2], now)
    terms.append((f"reward r{'₁₂₃₄'[t]}", f"{rewards[-1]:.2f}", now))
    lines = [(y + 16, 42, terms)]
    lines.append((y + 66, 142, [
        (f"{alpha:g} × lowest r so far", f"{min(rewards):.2f}", RED if slipped else INK),
        (f"{1 - alpha:g} × mean r so far", f"{np.mean(rewards):.2f}", INK),
        ("TCSR", f"{values[t]:.2f}", BLUE)]))
    for top, x, terms in lines:
        for i, (label, value, colour) in enumerate(terms):
            sign = "" if i == 0 else "= " if i == len(terms) - 1 else "+ "
            parts.append(text(x + 106 * i, top, sign + label, 10.5, GREY))
            parts.append(text(x + 106 * i, top + 21, value, 17, colour, weight=600))
    return parts
