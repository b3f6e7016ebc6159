"""The README cannot rot: its tables are what a command prints, its line counts are true, its commands parse."""
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from readme import ROOT, filled

README = (ROOT / "README.md").read_text()


def test_tables_and_line_counts_are_what_the_commands_print():
    assert filled(README) == README, "run: python tests/readme.py"


def commands():
    """Every command of a ```bash block, of the scripts' docstrings' launch lines, and of `inline python`."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    for script in Path(ROOT).glob("*.py"):
        blocks += re.findall(r"^    (python [^\n]*(?:\\\\?\n[^\n]*)*)", script.read_text().split('"""')[1], re.M)
    blocks += re.findall(r"`(python \w+\.py [^`]*)`", README)
    for block in blocks:
        for line in re.sub(r"\\+\n\s*", " ", block).splitlines():
            if line.startswith(("python ", "make ")):
                yield re.split(r"\s{3,}|\s#", line)[0]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_parses(command):
    program, *words = shlex.split(command)
    if program == "make":
        subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)
        return
    script, words = words[0].removesuffix(".py"), words[1:]
    module = importlib.import_module(script)
    if words and words[0] in ("compare", "report") or script == "tcsr":  # small programs with their own parsers
        result = subprocess.run(["python3", "-c", f"import sys; sys.argv[1:] = ['--help']; import {script}"], cwd=ROOT)
        assert result.returncode == 0 and all(Path(ROOT, w).exists() for w in words if w.startswith("tests/"))
    else:
        module.parse_args(words)


@pytest.mark.parametrize("script", ["tcsr", "synth", "sft", "grpo", "eval", "toy"])
def test_help_and_usage(script):
    run = lambda *words: subprocess.run([__import__("sys").executable, f"{script}.py", *words], cwd=ROOT,
                                        capture_output=True, text=True)
    shown = run("--help")
    assert shown.returncode == 0 and "usage" in shown.stdout and len(shown.stdout) > 400
    assert run("--no_such_flag").returncode == 2
