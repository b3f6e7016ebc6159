"""Fill in what the README shows of the repository: tables from committed results, line counts, snippets that are tested.

    python tests/readme.py          rewrite README.md
test_readme.py fails when a rewrite would change anything."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def filled(text):
    def table(match):
        command = [sys.executable, "eval.py", "report", *match[1].split(), "--markdown"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        return f"<!-- table: {match[1]} -->\n{shown}\n<!-- /table -->"

    def lines(match):
        return f"[{match[1]}]({match[1]}) | {len((ROOT / match[1]).read_text().splitlines())} |"

    text = re.sub(r"<!-- table: (.*?) -->\n.*?<!-- /table -->", table, text, flags=re.S)
    return re.sub(r"\[(\w+\.py)\]\(\1\) \| \w+ \|", lines, text)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))
