"""The structure of the project: one-way imports, --help, wrong usage, and commands that parse."""
import ast
import graphlib
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from conftest import refused

ROOT = Path(__file__).parents[1]
MODULES = ["tcsr", "judge", "data.dialogues", "synth", "sft", "grpo", "eval", "toy"]
FLAGS = {"synth": "--seeds s --generator toy --out o", "sft": "--model m --data d --out o",
         "grpo": "--model m --data d --tutor toy --out o", "toy": "--out o",
         "eval": "--model m --data d --judge toy --name n --out o"}


def test_imports_contain_no_circle():
    graph = {name: set() for name in MODULES}
    for name in MODULES:
        for node in ast.walk(ast.parse(Path(ROOT, name.replace(".", "/") + ".py").read_text())):
            if isinstance(node, ast.ImportFrom):
                graph[name].add(node.module)
            elif isinstance(node, ast.Import):
                graph[name].update(alias.name for alias in node.names)
    graphlib.TopologicalSorter(graph).prepare()         # raises CycleError


@pytest.mark.parametrize("name", [*FLAGS, "replay", "data.prepare"])
def test_help_shows_every_flag_with_its_default(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "usage:" in shown
    assert shown.count("(default:") >= shown.count("\n  --") > 0 or name == "data.prepare"


@pytest.mark.parametrize("name, wrong", [
    ("synth", "--splits 0.5 2 0"), ("synth", "--splits 0 0 0"), ("synth", "--shares 0 0 0"),
    ("synth", "--rl_strategies bogus"), ("synth", "--perturb nan"), ("toy", "--steps 0"),
    ("sft", "--lr nan"), ("sft", "--max_tokens -1"), ("sft", "--lora_r 0"), ("sft", "--warmup 5"),
    ("sft", "--epochs two"), ("sft", "--held_out 1"), ("sft", f"--seed {10 ** 30}"),
    ("grpo", "--clip nan"), ("grpo", "--temperature inf"), ("grpo", "--max_tokens -1"),
    ("grpo", "--group 1"), ("grpo", "--alpha 2"), ("grpo", "--tutor_extra []"),
    ("grpo", "--strategies flattery"), ("eval", "--batch 1e3"), ("eval", "--attacker adaptive"),
    ("eval", "--endpoint http://x/v1")])
def test_nonsense_is_refused_by_the_flags_name_before_any_work(name, wrong, capsys):
    main = importlib.import_module(name).main
    assert wrong.split()[0] in refused(capsys, main, [*FLAGS[name].split(), *wrong.split()])[-1]


@pytest.mark.parametrize("source", ["make -n toy", "cat README.md", "cat EXERCISES.md"])
def test_commands_parse(source):
    text = subprocess.run(source.split(), cwd=ROOT, capture_output=True, text=True).stdout
    text = text.replace("\\\n", " ")
    found = re.findall(r"^(?:\.venv/bin/)?python (\w+)\.py ([^#|>&;\n]*)", text, re.M)
    assert len(found) >= 4
    for name, words in found:
        module = importlib.import_module(name)
        if hasattr(module, "parse_args") and not words.startswith(("compare", "seeds")):
            module.parse_args(shlex.split(words))
