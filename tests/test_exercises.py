"""The solutions in tests/exercises do what EXERCISES.md asks. The quick oracles only."""
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import grpo
import judge
import sft
import tcsr
import test_student
from conftest import dialogue, grpo_args

ROOT = Path(__file__).parents[1]
SOLUTIONS = ROOT / "tests/exercises"
NAN = np.nan


@pytest.fixture
def patched(tmp_path):
    """A function that applies a solution to a copy of the project. -> the copy's folder"""
    def apply(patch):
        shutil.copytree(ROOT / "tests", tmp_path / "tests")
        (tmp_path / "data").mkdir()
        for script in [*ROOT.glob("*.py"), ROOT / "data/dialogues.py"]:
            shutil.copy(script, tmp_path / script.relative_to(ROOT))
        subprocess.run(["git", "apply", SOLUTIONS / patch], cwd=tmp_path, check=True)
        return tmp_path
    return apply


def load(folder, name):
    """A script of a copy, beside the one that is imported here."""
    spec = importlib.util.spec_from_file_location(f"patched_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tests(folder, *words):
    """The last line that pytest prints in a copy."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", *words]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return result.stdout.splitlines()[-1]


def test_1_tcsr_with_loops(patched):
    loops, rng = load(patched("1_tcsr.patch"), "tcsr"), np.random.default_rng(0)
    rewards = rng.random((40, 5, 7))
    rewards[rng.random(rewards.shape) < 0.3] = NAN
    mask = np.arange(7) < rng.integers(1, 8, (40, 5, 1))
    for alpha in (0, 0.3, 1, None):
        expected = tcsr.tcsr(rewards, alpha, mask)
        assert loops.tcsr(rewards, alpha, mask) == pytest.approx(expected, nan_ok=True)


def test_2_without_the_mask_tests_fail(patched, base, fresh, mixed, monkeypatch, request):
    """Their loss is infinite, because control tokens have the log-probability -inf."""
    folder, args = patched("2_no_mask.patch"), sft.parse_args("--model m --data d --out o".split())
    monkeypatch.setattr(sft, "reply_logps", load(folder, "sft").reply_logps)
    student = fresh(reference=False)
    assert sft.loss_over(student, [sft.render(student, mixed[0], 1000)], args) == np.inf
    with pytest.raises(AssertionError):
        test_student.test_reply_logps_equal_a_naive_forward("base", 1.0, mixed, request)
    with pytest.raises(AssertionError):
        test_student.test_the_loss_is_a_naive_mean_however_it_is_split(fresh, mixed, False)
    with pytest.raises(AssertionError):
        test_student.test_an_adapter_comes_back_as_it_was_saved(base, fresh, folder, mixed, False)


def test_5_a_last_reward_of_0_leaves_only_the_mean():
    rewards = np.random.default_rng(0).random((100, 6)) * 2     # the format bonus makes them 0..2
    rewards[:, 2] = NAN
    rewards[:, -1] = 0
    alpha = grpo_args("--like", "released", "--unjudged_last").alpha
    last = tcsr.tcsr(rewards, alpha)[:, -1]
    assert last == pytest.approx(0.7 * np.nanmean(rewards, 1))


def test_6_every_wording_of_a_ninth_strategy_reads_back(patched):
    folder = patched("6_ninth_strategy.patch")
    assert len(load(folder, "judge").STRATEGIES) == len(judge.STRATEGIES) + 1
    last = run_tests(folder, "--noconftest", "tests/test_toy.py")
    assert "passed" in last and "failed" not in last, last


def test_7_the_papers_sum_rewards_a_late_failure():
    rewards = np.ones((1, 4, 10))
    rewards[0, 0, 0] = rewards[0, 1, 9] = 0         # one fails at turn 1, another at turn 10
    total, _ = tcsr.advantages(rewards, how="sum")
    last, _ = tcsr.advantages(rewards, how="trajectory")
    assert total[0, :2, 0] == pytest.approx([-1.50, 0.40], abs=0.01)
    assert last[0, :2, 0] == pytest.approx([-0.87, -0.87], abs=0.01)


def test_8_the_log_follows_the_keyword(monkeypatch):
    """A sign in the thinking is not one in the answer."""
    monkeypatch.syspath_prepend(SOLUTIONS)
    args, rollouts = grpo_args(), []
    for reply in ("no, there is a sign on it.", "first drax.", "what a sign! first drax."):
        text = f"<thinking>red box, sign</thinking><answer>{reply}</answer>"
        turn = {"user": "hm", "assistant": text, "strategy": "scripted", "truncated": False}
        rollouts.append(grpo.Rollout(dialogue=dialogue("x", "hm"), turns=[turn], logps=[0.0]))
    grpo.Tutor(judge.backend("tutor", "mytutor"), args)(rollouts)
    rewards, mask = grpo.reward_table(rollouts, 3)
    _, info = tcsr.advantages(rewards, mask)
    row = grpo.describe(rollouts, rewards, info)
    assert row["harm"] == pytest.approx(1 / 3) and row["missing"] == 0


def test_9_discounted_returns(patched):
    discounted = load(patched("9_discount.patch"), "tcsr")
    rewards = [[[1, 0, 1, 99], [1, NAN, 1, 99], [1, 1, 0, 99]]]     # three turns, one not judged
    adv, info = discounted.advantages(rewards, [[[True, True, True, False]] * 3])
    expected = np.array([[1.81, 0.9, 1, NAN], [NAN, NAN, 1, NAN], [1.9, 1, 0, NAN]])
    assert info["returns"][0] == pytest.approx(expected, nan_ok=True)
    assert adv[0, :, 0] == pytest.approx([-0.5 ** 0.5, 0, 0.5 ** 0.5])


def test_10_qwen3_vl_loads_and_agrees_with_transformers(patched):
    last = run_tests(patched("10_qwen3_vl.patch"), "tests/exercises/qwen3_vl.py")
    assert last.startswith("3 passed"), last
