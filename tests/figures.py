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

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH, LEFT, RIGHT, BARS, COLUMN = 760, 28, 732, 512, 44
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


def write_svg(name, height, parts):
    """A white card with round corners, so that it is readable on a dark page too."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
            f'font-family="{SANS}">')
    card = rect(0.5, 0.5, WIDTH - 1, height - 1, "#ffffff", LINE, 14)
    judge.write_file(DOCS / name, "\n".join([head, card, *parts, "</svg>\n"]))


def pick_rollout(path):
    """
    -> the rollouts of one group, and the one of them to show. One turn of the whole group is
    harmful, neither a first nor a last one. 3 turns are better than 4, then good other turns count.
    """
    groups, found = {}, []
    for line in open(path, encoding="utf-8"):
        row = json.loads(line)
        groups.setdefault((row["step"], row["id"]), []).append(row)
    for group in groups.values():
        n_turns = len(group[0]["turns"])
        slips = []
        for row in group:
            slips += [(row, t) for t, turn in enumerate(row["turns"]) if turn.get("safety", 0) <= 4]
        if group[0]["kind"] != "benign" and len(slips) == 1 and 0 < slips[0][1] < n_turns - 1:
            row, t = slips[0]
            others = [turn["reward"] for turn in row["turns"]]
            slip = others.pop(t)
            if slip > 0 and n_turns <= 4:
                found.append((-n_turns, min(others) - slip, -row["step"], group, row))
    if not found:
        judge.bad_input(f"{path}: no group in which one rollout slips at one turn in its middle")
    return max(found, key=lambda item: item[:3])[3:]


def picture(path, x, y, size):
    """A picture of few colours as one path per colour, so that no file has to be embedded."""
    pixels, paths = np.asarray(Image.open(path).convert("RGB")).tolist(), {}
    for row, line in enumerate(pixels):
        column = 0
        for colour, run in groupby(line):
            length = len(list(run))
            paths.setdefault(tuple(colour), []).append(f"M{column} {row}h{length}v1h-{length}z")
            column += length
    drawn = [f'<path fill="rgb{colour}" d="{"".join(runs)}"/>' for colour, runs in paths.items()]
    place = f"translate({x} {y}) scale({size / len(pixels)})"
    return f'<g transform="{place}" shape-rendering="crispEdges">{"".join(drawn)}</g>'


def chips(tokens, x, y, trained):
    """Tokens as chips in lines that begin at x, y -> the parts, and the y below the last line"""
    fill, ink, edge = ("#dbeafe", "#1e3a8a", "#8fb1f2") if trained else ("#f4f5f7", GREY, LINE)
    parts, left = [f'<g font-family="{MONO}">'], x
    for token in tokens:
        label = token.replace("\n", "↵").strip()
        width = 6.65 * len(label) + 7
        if x + width > RIGHT:
            x, y = left, y + 23
        parts.append(rect(x, y, width, 20, fill, edge, 4))
        parts.append(text(x + width / 2, y + 14, label, 11, ink, "middle"))
        x += width + 3
    return [*parts, "</g>"], y + 23


def draw_sums(turns, y):
    """The scores of the last turn make its reward, and the rewards of all turns make TCSR."""
    rewards = [turn["reward"] for turn in turns]
    harm = RED if turns[-1]["safety"] <= 4 else INK
    slipped = RED if min(turn["safety"] for turn in turns) <= 4 else INK
    terms = [(0, 0, "lowest so far", "0.3 ×", min(rewards), slipped),
             (1, 0, "mean so far", "+ 0.7 ×", np.mean(rewards), INK),
             (2, 0, "TCSR", "=", tcsr.tcsr(rewards, alpha=0.3)[-1], BLUE)]
    parts = []
    return parts
