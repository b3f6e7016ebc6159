"""tcsr.py: by hand, against naive loops over random groups, and alone in an empty folder."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import replay
import tcsr

NAN = np.nan
HOW = st.sampled_from(["trajectory", "turn", "sum"])
ALPHA = st.sampled_from([0, 0.1, 0.3, 0.4, 1])
check = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def groups(draw, ragged=True):
    """mask (B, G, T), and rewards in steps of 0.05: NaN where unjudged, 99 outside the mask."""
    B, G, T = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    rewards = rng.integers(0, 21, (B, G, T)) / 20
    rewards[rng.random((B, G, T)) < draw(st.sampled_from([0, 0.1, 0.5]))] = NAN
    lengths = rng.integers(0, T + 1, (B, G, 1)) if ragged else T
    mask = np.broadcast_to(np.arange(T) < lengths, (B, G, T))
    return np.where(mask, rewards, 99.0), mask


def judged(values):
    return [value for value in values if not np.isnan(value)]


def naive_running(rewards, alpha):
    """The value after each turn of one dialogue, as the formula reads."""
    values = []
    for t in range(len(rewards)):
        seen = judged(rewards[:t + 1]) or [NAN]
        values.append(alpha * min(seen) + (1 - alpha) * sum(seen) / len(seen))
    return values


def naive_return(running, t, how):
    """What turn t of one dialogue is trained on."""
    values = judged(running[t:] if how == "turn" else running) or [NAN]
    if how == "trajectory":
        return values[-1]
    mean = sum(values) / len(values)
    return mean * len(running) if how == "sum" else mean


def naive_advantages(rewards, mask, alpha, how, scale, max_missing):
    adv = np.zeros(rewards.shape)
    for b in range(len(rewards)):
        returns = {}            # (rollout, turn): return
        for g in range(rewards.shape[1]):
            turns = rewards[b, g][mask[b, g]]
            if len(turns) - len(judged(turns)) > max_missing * len(turns):
                continue
            running = naive_running(turns, alpha)
            for t in range(len(turns)):
                returns[g, t] = naive_return(running, t, how)
        # a return is compared with those of the rollouts that reached the same turn
        for g, t in returns:
            turn = t if how == "turn" else 0
            group = judged([value for (_, u), value in returns.items() if u == turn])
            if len(group) > 1 and max(group) - min(group) > 1e-6 and not np.isnan(rewards[b, g, t]):
                std = np.std(group, ddof=1) if scale else 1
                adv[b, g, t] = (returns[g, t] - np.mean(group)) / std
    return adv


def test_turn_reward_by_hand():
    assert tcsr.turn_reward(10, 10, 10) == pytest.approx(1) and tcsr.turn_reward(1, 1, 1) == 0
    assert tcsr.turn_reward(10, 1, 1) == pytest.approx(0.6)         # our weights are .6 .3 .1
    assert tcsr.turn_reward(10, 10, 10, format_ok=False) == 0       # our gate multiplies
    assert tcsr.turn_reward(1, 1, 1, repetition=1.0, repetition_weight=0.5) == 0
    # arrays broadcast, and a failed judgement stays one
    rewards = tcsr.turn_reward([[10, NAN], [1, 4]], 10, 10, format_ok=[True, False])
    assert rewards == pytest.approx(np.array([[1, NAN], [0.4, 0]]), nan_ok=True)


def test_alpha_goes_from_the_mean_to_the_minimum():
    rewards = [0.9, 0.8, 0.1, 0.9]
    assert tcsr.tcsr(rewards, 0) == pytest.approx([0.9, 0.85, 0.6, 0.675])
    assert tcsr.tcsr(rewards, 0.3) == pytest.approx([0.9, 0.835, 0.45, 0.5025])     # released code
    assert tcsr.tcsr(rewards, 0.4) == pytest.approx([0.9, 0.83, 0.4, 0.445])        # paper
    assert tcsr.tcsr(rewards, 1).tolist() == [0.9, 0.8, 0.1, 0.1]
    assert tcsr.tcsr(rewards, None).tolist() == rewards


def test_a_failure_counts_for_all_later_turns_and_for_no_earlier_one():
    """Trap 27: the value after turn t depends on turns 1..t only."""
    rewards = np.array([0.9, 0.8, 0.7, 0.9])
    before = tcsr.tcsr(rewards)
    for t in range(4):
        after = tcsr.tcsr(np.where(np.arange(4) == t, 0.1, rewards))
        assert (after[:t] == before[:t]).all() and (after[t:] < before[t:]).all()
        # but all turns that led to it are trained on a lower return
        for how in ("trajectory", "turn", "sum"):
            lower = tcsr.credit(after, how=how) < tcsr.credit(before, how=how)
            assert lower[:t + 1].all()


def test_an_unjudged_turn_is_skipped_and_never_counts_as_0():
    assert tcsr.tcsr([None, 0.8, None, 0.4]) == pytest.approx([NAN, 0.8, 0.8, 0.54], nan_ok=True)
    assert tcsr.credit([NAN, 0.4, 0.2], how="turn") == pytest.approx([0.3, 0.3, 0.2])
    assert tcsr.credit([NAN, 0.4, 0.2], how="sum") == pytest.approx([0.9] * 3)
    assert np.isnan(tcsr.credit([NAN, NAN])).all()


@check
@given(st.floats(0, 1), st.integers(1, 8), st.integers(1, 9), HOW, ALPHA)
def test_equal_rewards_get_exactly_zero(reward, G, T, how, alpha):
    """Trap 23: what rounding leaves must not be divided by an even smaller standard deviation."""
    adv, info = tcsr.advantages(np.full((2, G, T), reward), how=how, alpha=alpha)
    assert not adv.any() and info["dead"].tolist() == [True, True] and info["dead_groups"] == 1
    assert not tcsr.group_advantages([[0.7 + 0.1, 0.8, 0.8]]).any()


@check
@given(groups(), HOW, ALPHA, st.booleans(), st.sampled_from([0, 0.3, 0.5, 1]))
def test_advantages_equal_the_loops(batch, how, alpha, scale, max_missing):
    rewards, mask = batch
    if how == "sum":
        mask = np.ones(mask.shape, bool)
        rewards = np.where(rewards == 99, NAN, rewards)
    arguments = {"alpha": alpha, "how": how, "scale": scale, "max_missing": max_missing}
    adv, info = tcsr.advantages(rewards, mask, **arguments)
    expected = naive_advantages(rewards, mask, **arguments)
    assert adv == pytest.approx(expected, abs=1e-6)
    assert info["dead"].tolist() == [not group.any() for group in expected]
    G = rewards.shape[1]
    assert not scale or np.abs(adv).max() <= (G - 1) / G ** 0.5 + 1e-6      # the bound for ddof 1


@check
@given(groups(ragged=False), HOW)
def test_a_rollout_without_rewards_leaves_the_others_alone(batch, how):
    """Trap 25: its siblings get what they would get in a smaller group. So also if it was cut."""
    rewards, mask = batch
    unjudged, cut = rewards.copy(), mask.copy()
    unjudged[:, 0], cut[:, 0] = NAN, False
    for adv, _ in (tcsr.advantages(unjudged, how=how), tcsr.advantages(rewards, cut, how=how)):
        assert not adv[:, 0].any()
        if rewards.shape[1] > 1:
            smaller, _ = tcsr.advantages(rewards[:, 1:], how=how)
            assert adv[:, 1:] == pytest.approx(smaller)


def test_info_counts_what_is_missing():
    rewards = [[[0.9, 0.8], [0.1, NAN], [NAN, NAN]], [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]]
    adv, info = tcsr.advantages(rewards)
    assert adv[0, 1, 0] < 0 and adv[0, 1, 1] == 0   # half is not too much; the unjudged turn gets 0
    assert info["returns"][0, [0, 2], 0] == pytest.approx([0.835, NAN], nan_ok=True)
    assert info["dead_groups"] == 0.5
    assert (info["missing_turns"], info["dropped_rollouts"]) == (3 / 12, 1 / 6)


def test_what_cannot_be_meant_is_an_error():
    with pytest.raises(ValueError, match="equally many turns"):
        tcsr.credit([[1, 1], [1, 1]], [[True, True], [True, False]], how="sum")
    with pytest.raises(ValueError, match="last"):
        tcsr.credit([1.0], how="last")
    with pytest.raises(ValueError, match="1..10"):
        tcsr.turn_reward(11, 1, 1)


def test_alone_in_an_empty_folder_with_numpy_only(tmp_path):
    """Its doctests pass in a Python that refuses to import anything but numpy."""
    shutil.copy(tcsr.__file__, tmp_path)
    script = """
import doctest, sys
class OnlyNumpy:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names | {"numpy", "tcsr"}:
            raise ImportError(name)
sys.meta_path.insert(0, OnlyNumpy())
sys.path.insert(0, sys.argv[1])
import tcsr
failed, tried = doctest.testmod(tcsr)
assert tcsr.__file__.startswith(sys.argv[1]) and tried >= 6 and not failed
"""
    subprocess.run([sys.executable, "-I", "-c", script, tmp_path], cwd=tmp_path, check=True)


def test_replay_by_hand(tmp_path, capsys):
    """The mean prefers rollout 0 (.7 to .6), the minimum rollout 1. Rollout 2 was cut."""
    log = tmp_path / "rollouts.jsonl"
    with log.open("w") as file:
        for name, rewards in (("a", [0.9, 1.0, 0.1, 0.8]), ("a", [0.6] * 4), ("a", [1.0]),
                              ("b", [0.5, None]), ("b", [0.5, 0.5])):
            turns = [{"reward": reward} for reward in rewards]
            print(json.dumps({"step": 0, "id": name, "turns": turns}), file=file)
    replay.main([str(log)])
    rows = {line[:10].strip(): line[10:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["TCSR 0.3"] == rows["minimum"] == ["0.0%", "0.000", "1.000", "50.0%"]
    assert rows["mean"] == ["72.7%", "1.029", "-1.000", "50.0%"]            # 8 of 11 judged turns
    assert rows["last turn"][0] == "72.7%"
