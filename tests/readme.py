"""Fill in what the README shows of the repository: tables and a figure from committed results, line counts.

    python tests/readme.py          rewrite README.md and tests/toy_survival.svg
test_readme.py fails when a rewrite would change anything."""
import html
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import eval  # noqa: E402


def filled(text):
    def table(match):
        shown = subprocess.run([sys.executable, *match[1].split()], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        first, *more = shown.split("\n\n**")
        if len(more) > 1:  # a reader sees the first table, and the others on a click
            shown = (f"{first}\n\n<details><summary>The other {len(more)} tables: survival by turn, the static attacker, paired "
                     "differences</summary>\n\n**" + "\n\n**".join(more) + "\n\n</details>")
        return f"<!-- table: {match[1]} -->\n{shown}\n<!-- /table -->"

    def lines(match):
        return f"[{match[1]}]({match[1]}) | {len((ROOT / match[1]).read_text().splitlines())} |"

    text = re.sub(r"<!-- table: (.*?) -->\n.*?<!-- /table -->", table, text, flags=re.S)
    return re.sub(r"\[(\w+\.py)\]\(\1\) \| \w+ \|", lines, text)


def survival_svg(res):
    """The README's figure: one step curve an arm with its 95 % intervals. Greys and colours of middling lightness,
    legible on GitHub's white and on its dark page."""
    colours = itertools.cycle(["#d1603d", "#b98a1f", "#2f8f83", "#6d7fd1", "#b0619f"])
    x, y = (lambda turn: 56 + 54 * turn), (lambda share: 36 + 230 * (1 - share))
    body = [f'<path d="M{x(0)} {y(s)}H{x(eval.HORIZON)}" stroke="#888" stroke-opacity=".25"/><text x="46" y="{y(s) + 4}" '
            f'text-anchor="end">{100 * s:.0f} %</text>' for s in (0, 0.25, 0.5, 0.75, 1)]
    body += [f'<text x="{x(turn)}" y="286" text-anchor="middle">{turn}</text>' for turn in range(eval.HORIZON + 1)]
    curves = {name: both["all"] for name, both in res["survival"].items() if both["all"]}
    for row, (name, c) in enumerate(curves.items()):
        colour, shift = next(colours), 4 * row - 4  # bars side by side where curves meet
        points = [(t, *p) for t, p in enumerate(zip(c["value"], c["ci_low"], c["ci_high"]), 1) if p[0] is not None]
        steps = "".join(f"H{x(t)}V{y(value):.1f}" for t, value, _, _ in points)
        bars = "".join(f"M{x(t) + shift} {y(low):.1f}V{y(high):.1f}" for t, _, low, high in points)
        body.append(f'<g stroke="{colour}" fill="none"><path stroke-width="2.2" d="M{x(0)} {y(1)}{steps}h14"/>'
                    f'<path stroke-width="1.6" stroke-opacity=".75" d="{bars}"/></g>'
                    f'<text x="{x(eval.HORIZON) + 24}" y="{50 + 20 * row}" '
                    f'style="fill:{colour}">{html.escape(eval.label(name))}, n = {c["n"]}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 316" role="img" font-size="12" '
            f'font-family="system-ui, sans-serif" fill="#808890"><title>Dialogues without a harmful turn</title>'
            f'<text x="56" y="20">Harmful dialogues still without a harmful turn, 95 % intervals, one run an arm</text>'
            f'{"".join(body)}<text x="{x(eval.HORIZON / 2)}" y="308" text-anchor="middle">after turn</text></svg>\n')


def figure():
    return survival_svg(json.loads((ROOT / "tests/toy_results.json").read_text()))


if __name__ == "__main__":
    (ROOT / "tests/toy_survival.svg").write_text(figure(), encoding="utf-8")
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))
