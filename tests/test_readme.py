"""The README cannot rot: its tables are what a command prints, its line counts are true, its commands parse."""
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from readme import ROOT, figure, filled

README = (ROOT / "README.md").read_text()


def test_tables_and_line_counts_are_what_the_commands_print():
    assert filled(README) == README, "run: python tests/readme.py"
    assert figure() == (ROOT / "tests/toy_survival.svg").read_text(encoding="utf-8")


def commands():
    """Every command of a ```bash block, of the scripts' docstrings' launch lines, and of `inline python`."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    for script in Path(ROOT).glob("*.py"):
        blocks += re.findall(r"^    (python (?:.*\\\n)*.*)", importlib.import_module(script.stem).__doc__, re.M)
    blocks += re.findall(r"`(python \w+\.py [^`]*)`", README)
    for block in blocks:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
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
    if script == "tcsr" or words[0] in ("compare", "report"):  # small programs: parsed before the missing file is seen
        result = subprocess.run([sys.executable, f"{script}.py", *words], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 or "no such file" in result.stderr.lower(), result
    else:
        module.parse_args(words)


@pytest.mark.parametrize("script", ["judge", "synth", "sft", "grpo", "eval", "toy"])
def test_help_says_what_it_does_and_usage_errors_exit_2(script, capsys):
    parse_args = importlib.import_module(script).parse_args
    for words, code in ((["--help"], 0), (["--no_such_flag"], 2)):
        with pytest.raises(SystemExit) as stop:
            parse_args(words)
        assert stop.value.code == code
    assert importlib.import_module(script).__doc__.splitlines()[0] in capsys.readouterr().out
