"""Values that cannot work are named before any work: one line, exit 2, never a traceback, never a run that trains nothing."""
import importlib

import pytest

BASE = {"grpo": "--model m --data d --tutor toy --out o", "sft": "--model m --data d --out o",
        "eval": "--model m --data d --judge toy --tutor toy --attacker adaptive --out o --name n",
        "synth": "--seeds s --generator toy --out o"}


@pytest.mark.parametrize("script, words", [
    ("grpo", "--alpha 2"), ("grpo", "--prompts 0"), ("grpo", "--temperature 0"), ("grpo", "--group 1"),
    ("grpo", "--prompts_per_update -1"), ("grpo", "--strategies bogus"), ("sft", "--batch 0"), ("sft", "--held_out 1"),
    ("sft", "--save_every 0"), ("grpo", "--save_every 0"), ("sft", "--epochs nan"), ("sft", "--lr nan"), ("sft", "--lora_r 0"),
    ("grpo", "--epochs inf"), ("grpo", "--lr nan"), ("eval", "--batch 0"), ("eval", "--max_new 0"),
    ("sft", "--eval_every 0"), ("eval", "--strategies bogus"), ("synth", "--splits 0 0 0")])
def test_a_bad_value_is_named_before_any_work(script, words, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        (module.run if script == "eval" else module.main)(module.parse_args((BASE[script] + " " + words).split()))
    assert stop.value.code == 2 and words.split()[0] in capsys.readouterr().err


def test_help_shows_every_default():
    for script in ("synth", "sft", "grpo", "eval"):
        module = importlib.import_module(script)
        defaults = vars(module.parse_args(BASE[script].split()))
        with pytest.MonkeyPatch.context() as patch:
            shown = []
            patch.setattr("argparse.ArgumentParser._print_message", lambda self, text, file=None: shown.append(text))
            with pytest.raises(SystemExit):
                module.parse_args(["--help"])
        for value in defaults.values():
            assert not isinstance(value, float) or f"{value}" in shown[0], value


def test_reading_something_that_is_not_a_run(tmp_path, capsys):
    import eval as E
    (tmp_path / "meta.json").write_text('{"seconds": 1}')
    (tmp_path / "x.json").write_text("{}")
    for argv in (["compare", str(tmp_path), "--out", str(tmp_path)], ["report", str(tmp_path / "x.json")]):
        with pytest.raises(SystemExit) as stop:
            E.main(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
