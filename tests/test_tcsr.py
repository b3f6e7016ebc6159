"""tcsr.py: its arithmetic against hand tables and naive loops, its promises over random shapes, masks and gaps."""
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tcsr as M  # noqa: E402  (the module and its main function share a name)

check = settings(max_examples=60, deadline=None, derandomize=True)
NAN, HOWS = float("nan"), ("trajectory", "turn", "sum")
unit = st.floats(0, 1, allow_subnormal=False)
alphas = st.floats(0, 1, allow_subnormal=False)
grid = st.integers(0, 20).map(lambda k: k / 20)         # keeps two implementations off the 1e-6 edge of "equal"


@st.composite
def batches(draw, gaps=True, ragged=True, groups=(1, 6), values=unit):
    """rewards (B, G, T) with NaN where unjudged, mask (B, G, T); gaps may also lie in the middle of a dialogue."""
    shape = B, G, T = draw(st.integers(1, 3)), draw(st.integers(*groups)), draw(st.integers(1, 6))
    fill = lambda s: np.array(draw(st.lists(s, min_size=B * G * T, max_size=B * G * T))).reshape(shape)
    rewards, mask = fill(values).astype(float), np.ones(shape, bool)
    if ragged:
        lengths = np.array(draw(st.lists(st.integers(0, T), min_size=B * G, max_size=B * G))).reshape(B, G, 1)
        mask = (np.arange(T) < lengths) & (fill(st.integers(0, 9)) > 0)
    if gaps:
        rewards[fill(st.integers(0, 4)) == 0] = NAN
    return rewards, mask


def naive_running(r, m, alpha):
    """One dialogue, one turn after the other, as the formula reads. -> list of T values"""
    seen, out = [], []
    for x, happened in zip(r, m):
        seen += [x] if happened and not math.isnan(x) else []
        out.append(alpha * min(seen) + (1 - alpha) * sum(seen) / len(seen) if seen else NAN)
    return out


def naive_advantages(rewards, mask, alpha, how, scale, max_missing):
    """The whole file again as plain loops over one number at a time."""
    B, G, T = rewards.shape
    adv = np.zeros((B, G, T))
    for b in range(B):
        value = {}                                      # (g, t) -> return
        for g in range(G):
            turns = [t for t in range(T) if mask[b, g, t]]
            missing = [t for t in turns if math.isnan(rewards[b, g, t])]
            run = naive_running(rewards[b, g], mask[b, g], alpha)
            known = [t for t in turns if not math.isnan(run[t])]
            if not known or len(missing) / len(turns) > max_missing:
                continue
            for t in turns:
                later = [run[u] for u in known if u >= t]
                value[g, t] = (run[known[-1]] if how == "trajectory" else sum(later) / len(later) if how == "turn"
                               else sum(run[u] for u in known) / len(known) * len(turns))
        for t in range(T):
            rows = {g: value[g, t if how == "turn" else next(u for (h, u) in value if h == g)]
                    for g in range(G) if ((g, t) in value if how == "turn" else any(h == g for h, _ in value))}
            if len(rows) < 2 or max(rows.values()) - min(rows.values()) < 1e-6:
                continue
            mean, std = statistics.mean(rows.values()), statistics.stdev(rows.values())
            for g, x in rows.items():
                if (g, t) in value and not math.isnan(rewards[b, g, t]):
                    adv[b, g, t] = (x - mean) / (std if scale else 1)
    return adv


# ---------------------------------------------------------------- turn rewards

def test_turn_reward_scales_gate_bonus_and_floor():
    assert M.turn_reward(10, 10, 10) == pytest.approx(1) and M.turn_reward(1, 1, 1) == 0
    assert M.turn_reward(10, 1, 1) == pytest.approx(.6) and M.turn_reward(1, 10, 1) == pytest.approx(.3)
    authors = dict(scale="tenth", format_bonus=1.0, repetition_weight=.1)
    assert M.turn_reward(10, 10, 10, **authors) == pytest.approx(2)                     # so the range goes up to 2
    assert M.turn_reward(5, 5, 5, **authors, format_ok=False, repetition=.4) == pytest.approx(.46)
    assert M.turn_reward(8, 8, 9, weights=(.4, .4, .2), scale="tenth") == pytest.approx(.82)
    assert M.turn_reward(10, 10, 10, format_ok=False) == 0                              # the gate multiplies
    assert M.turn_reward(1, 1, 1, repetition=1., repetition_weight=.5) == 0             # floored
    s = np.array([[10, NAN], [1, 4]])
    got = M.turn_reward(s, 10, 10, format_ok=np.array([True, False]))                   # broadcasting; NaN in, NaN out
    assert got.shape == (2, 2) and np.isnan(got[0, 1]) and got[1, 1] == 0
    assert got[0, 0] == pytest.approx(1) and got[1, 0] == pytest.approx(.4)


# ---------------------------------------------------------------- running value

def test_running_value_is_the_table_of_the_issue():
    np.testing.assert_allclose(M.tcsr([.9, .8, .1, .9]), [.9, .835, .45, .5025], rtol=1e-15)
    np.testing.assert_allclose(M.tcsr([.9, .8, .1, .9], .4), [.9, .83, .4, .445], rtol=1e-15)
    assert M.tcsr([1, 0]).dtype == np.float64
    r = np.array([.9, NAN, .1])
    np.testing.assert_array_equal(M.tcsr(r, None), r)
    assert not np.shares_memory(M.tcsr(r, None), r)     # else a caller's in-place edit would reach the log
    np.testing.assert_allclose(M.tcsr([None, .8, None, .4]), [NAN, .8, .8, .3 * .4 + .7 * .6])


@check
@given(batches(), alphas)
def test_running_value_equals_the_loop_and_lies_between_min_and_mean(batch, alpha):
    rewards, mask = batch
    want = np.array([[naive_running(r, m, alpha) for r, m in zip(*bm)] for bm in zip(rewards, mask)])
    got = M.tcsr(rewards, alpha, mask)
    np.testing.assert_allclose(got, want, atol=1e-12)
    low, mean = M.tcsr(rewards, 1, mask), M.tcsr(rewards, 0, mask)
    ok = ~np.isnan(got)
    assert (low[ok] <= got[ok] + 1e-12).all() and (got[ok] <= mean[ok] + 1e-12).all()


@check
@given(st.lists(unit, min_size=1, max_size=8))
def test_limits_constants_and_a_loose_end(r):
    r = np.array(r)
    np.testing.assert_array_equal(M.tcsr(r, 1), np.minimum.accumulate(r))
    np.testing.assert_allclose(M.tcsr(r, 0), r.cumsum() / np.arange(1, len(r) + 1), atol=1e-15)
    np.testing.assert_allclose(M.tcsr(np.full(len(r), r[0])), r[0], atol=1e-15)


@check
@given(batches(), batches(), alphas)
def test_running_value_never_looks_ahead(one, other, alpha):
    (r, m), cut = one, one[0].shape[-1] // 2
    future = np.resize(other[0], r.shape)
    changed = np.concatenate([r[..., :cut], future[..., cut:]], -1)                     # same past, another future
    np.testing.assert_array_equal(M.tcsr(r, alpha, m)[..., :cut], M.tcsr(changed, alpha, m)[..., :cut])
    np.testing.assert_array_equal(M.tcsr(r, alpha, m)[..., :cut], M.tcsr(r[..., :cut], alpha, m[..., :cut])
                                  if cut else np.empty(r.shape[:-1] + (0,)))


@check
@given(st.lists(unit, min_size=1, max_size=7), st.data(), st.floats(0, .95))
def test_a_drop_lowers_what_follows_and_is_charged_to_what_led_to_it(r, data, alpha):
    r, t, drop = np.array(r), data.draw(st.integers(0, len(r) - 1)), data.draw(st.floats(.01, 1))
    worse = r - drop * (np.arange(len(r)) == t)
    assert (M.tcsr(worse, alpha)[t:] < M.tcsr(r, alpha)[t:]).all()                      # α < 1: strictly
    assert (M.tcsr(worse, 1) <= M.tcsr(r, 1)).all()                                     # α = 1: never raises
    for how in ("trajectory", "turn"):
        before, after = (M.credit(M.tcsr(x, alpha), how=how) for x in (r, worse))
        assert (after[:t + 1] < before[:t + 1]).all(), how


# ---------------------------------------------------------------- credit

def test_credit_by_hand():
    run = np.array([[.9, .7, .5], [.4, .2, NAN]])
    mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
    np.testing.assert_allclose(M.credit(run, mask), [[.5] * 3, [.2] * 3])
    np.testing.assert_allclose(M.credit(run, mask, "turn")[mask], [.7, .6, .5, .3, .2])
    np.testing.assert_allclose(M.credit(run[:, :2], how="sum"), [[1.6] * 2, [.6] * 2])
    with pytest.raises(ValueError, match="turn counts"):
        M.credit(run, mask, "sum")
    # what stands where no turn happened is never read; before the first judged turn there is no running value
    np.testing.assert_allclose(M.credit([NAN, .4, .2, 99], [True, True, True, False], "turn")[:3], [.3, .3, .2])
    np.testing.assert_allclose(M.credit([NAN, .4, .2], how="sum"), [.9] * 3)    # the mean of the rest, not 0


# ---------------------------------------------------------------- group normalisation

def test_group_advantages_by_hand():
    got = M.group_advantages([[1, 2, 3], [1, NAN, 3], [5, 5, 5], [NAN, 7, NAN]])
    np.testing.assert_allclose(got, [[-1, 0, 1], [-.5 ** .5, 0, .5 ** .5], [0] * 3, [0] * 3])
    np.testing.assert_allclose(M.group_advantages([[1, 2, 3]], scale=False), [[-1, 0, 1]])
    np.testing.assert_allclose(M.group_advantages([[1, 2, 30]], [[True, True, False]]), [[-.5 ** .5, .5 ** .5, 0]])
    assert (M.group_advantages([[.5, .5 + 9e-7]], scale=False) == 0).all()              # spread < 1e-6: noise
    assert (M.group_advantages([[.5, .5 + 2e-6]]) != 0).all()
    per_turn = np.array([[[1., 4.], [3., NAN]]])                                        # one rollout reached turn 2
    np.testing.assert_allclose(M.group_advantages(per_turn), [[[-.5 ** .5, 0], [.5 ** .5, 0]]])


@check
@given(st.integers(1, 8), unit, st.lists(st.integers(1, 6), min_size=1, max_size=6), st.sampled_from(HOWS[:2]), alphas)
def test_equal_rewards_give_exactly_zero(G, r, lengths, how, alpha):
    lengths = np.resize(lengths, G)[:, None]
    adv, diag = M.advantages(np.full((1, G, 6), r), (np.arange(6) < lengths)[None], alpha=alpha, how=how)
    assert (adv == 0).all() and diag["dead"].tolist() == [True]
    assert (M.group_advantages(np.full((3, G), r)) == 0).all()


@check
@given(batches(), st.booleans())
def test_group_advantages_are_bounded_and_centred(batch, scale):
    returns, mask = batch
    got, G = M.group_advantages(returns, mask, scale), returns.shape[1]
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got.sum(1), 0, atol=1e-6)
    if scale:
        assert np.abs(got).max() <= (G - 1) / G ** .5 + 1e-6
    assert (got[~mask | np.isnan(returns)] == 0).all()                                  # missing -> 0
    dead = (mask & ~np.isnan(returns)).sum(1, keepdims=True) <= 1
    assert (got[np.broadcast_to(dead, got.shape)] == 0).all()


@check
@given(batches(gaps=False, groups=(2, 6)), st.sampled_from(HOWS), st.data())
def test_a_missing_rollout_leaves_its_siblings_as_a_smaller_group(batch, how, data):
    rewards, mask = batch
    mask = mask if how != "sum" else np.ones_like(mask)
    gone = data.draw(st.integers(0, rewards.shape[1] - 1))
    holed = rewards.copy()
    holed[:, gone] = NAN
    adv = M.advantages(holed, mask, how=how)[0]
    small = M.advantages(np.delete(rewards, gone, 1), np.delete(mask, gone, 1), how=how)[0]
    np.testing.assert_allclose(np.delete(adv, gone, 1), small, atol=1e-6)
    assert (adv[:, gone] == 0).all()


# ---------------------------------------------------------------- the whole way

@check
@given(batches(values=grid), st.sampled_from(HOWS[:2]), st.sampled_from([0, .1, .3, .4, .9, 1]), st.booleans(),
       st.sampled_from([0., .3, .5, 1.]))
def test_advantages_equal_the_loops(batch, how, alpha, scale, max_missing):
    rewards, mask = batch
    with warnings.catch_warnings():
        warnings.simplefilter("error")                  # empty groups, all-NaN turns: silent and finite
        adv, diag = M.advantages(rewards, mask, alpha=alpha, how=how, scale=scale, max_missing=max_missing)
    want = naive_advantages(rewards, mask, alpha, how, scale, max_missing)
    np.testing.assert_allclose(adv, want, atol=1e-6)
    assert (adv[np.isnan(rewards) | ~mask] == 0).all()
    assert diag["dead"].tolist() == [not a.any() for a in want] and diag["dead_groups"] == diag["dead"].mean()


@check
@given(batches(values=grid, ragged=False), st.booleans(), st.sampled_from([0., .5, 1.]))
def test_sum_credit_equals_the_loops(batch, scale, max_missing):
    rewards, mask = batch
    adv, _ = M.advantages(rewards, mask, how="sum", scale=scale, max_missing=max_missing)
    np.testing.assert_allclose(adv, naive_advantages(rewards, mask, .3, "sum", scale, max_missing), atol=1e-6)


@check
@given(batches(), st.sampled_from(HOWS[:2]), st.randoms())
def test_permuting_rollouts_permutes_advantages_and_inputs_stay(batch, how, random):
    rewards, mask = batch
    order = random.sample(range(rewards.shape[1]), rewards.shape[1])
    rewards.flags.writeable = mask.flags.writeable = False                              # a write into an input raises
    adv = M.advantages(rewards, mask, how=how)[0]
    np.testing.assert_allclose(M.advantages(rewards[:, order], mask[:, order], how=how)[0], adv[:, order], atol=1e-6)
    M.to_tokens(adv[0], np.zeros((rewards.shape[1], 3), int))


def test_too_few_judged_turns_and_what_is_reported():
    rewards = np.array([[[.9, .8], [.1, NAN], [NAN, NAN], [.5, .6]], [[.5, .5], [.5, .5], [.5, NAN], [.5, 0]]])
    mask = np.ones((2, 4, 2), bool)
    mask[1, 3, 1] = False                               # ragged; the 0 there is padding
    adv, d = M.advantages(rewards, mask)
    assert adv[0, 1, 0] < 0 and adv[0, 1, 1] == 0       # half is not *more* than max_missing; its own gap gets 0
    assert (adv[0, 2] == 0).all() and (adv[1] == 0).all()
    assert (d["dead_groups"], d["missing_turns"], d["dropped_rollouts"]) == (.5, 4 / 15, 1 / 8)
    assert d["dead"].tolist() == [False, True]
    run = M.tcsr(rewards[0])[[0, 1, 3]]                 # the dropped rollout is not in the spread
    np.testing.assert_allclose(d["std_per_turn"], run.std(0, ddof=1) / 2)               # group 2 has no spread
    assert M.advantages(rewards, mask, max_missing=0.)[1]["dropped_rollouts"] == 3 / 8
    std = M.advantages([[[.2, .9], [.4, .5]]], [[[True, True], [True, False]]])[1]["std_per_turn"]
    assert std[0] == pytest.approx(.02 ** .5) and math.isnan(std[1])                    # one rollout reached turn 2
    alone = M.advantages([[[.3, .4]]])[1]
    assert alone["dead_groups"] == 1 and all(math.isnan(s) for s in alone["std_per_turn"])


def test_to_tokens():
    adv, turn_id = np.array([[1., 2.], [3., 4.]]), np.array([[-1, 0, 0, -1, 1], [1, 1, -1, -1, -1]])
    assert M.to_tokens(adv, turn_id).tolist() == [[0, 1, 1, 0, 2], [4, 4, 0, 0, 0]]


def test_a_hundred_thousand_dialogues_in_under_a_second():
    rng = np.random.default_rng(0)
    rewards = rng.random((20_000, 5, 10))
    rewards[rng.random(rewards.shape) < .05] = NAN
    mask = np.arange(10) < rng.integers(1, 11, (20_000, 5, 1))
    for how in ("trajectory", "turn"):
        best = math.inf
        for _ in range(3):                              # the machine is shared: the fastest of three is the code's own
            start = time.perf_counter()
            M.advantages(rewards, mask, how=how)
            best = min(best, time.perf_counter() - start)
        assert best < 1, f"{how} took {best:.2f} s"


@pytest.mark.parametrize("call, says", [
    (lambda: M.tcsr([.5], 1.5), r"alpha .* \[0, 1\].*1.5"), (lambda: M.tcsr([.5], NAN), "alpha"),
    (lambda: M.tcsr([.5, .5], mask=[True]), r"\(2,\), mask \(1,\)"), (lambda: M.tcsr([np.inf]), "infinite"),
    (lambda: M.tcsr(.5), "turn"), (lambda: M.credit([.5], how="last"), "'trajectory', 'turn' or 'sum', not 'last'"),
    (lambda: M.group_advantages([1., 2.]), r"\(B, G\)"), (lambda: M.advantages([[.5]]), r"\(B, G, T\).*\(1, 1\)"),
    (lambda: M.advantages([[[.5]]], max_missing=2), "max_missing"),
    (lambda: M.advantages([[[.5]]], how="sums"), "how"),
    (lambda: M.to_tokens(np.zeros((1, 2)), np.array([[2]])), r"turn_id.*-1\.\.1"),
    (lambda: M.to_tokens(np.zeros((1, 2)), np.array([[.5]])), "integer"),
    (lambda: M.to_tokens(np.zeros((2, 2)), np.array([[0]])), r"\(N, T\)"),
    (lambda: M.turn_reward(11, 1, 1), r"1\.\.10"), (lambda: M.turn_reward(1, 1, 1, scale="percent"), "scale"),
    (lambda: M.turn_reward(1, 1, 1, weights=(1, 2)), "weights")])
def test_wrong_calls_say_what_is_wrong(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# ---------------------------------------------------------------- replay

def replay(*args):
    return subprocess.run([sys.executable, M.__file__, *map(str, args)], capture_output=True, text=True)


def rollout(step, name, g, rewards):
    turns = [{"user": "u", "assistant": "a", "reward": r, "advantage": 0.0} for r in rewards]
    return json.dumps({"step": step, "id": name, "rollout": g, "turns": turns}) + "\n"


def test_replay_rescores_a_log(tmp_path):
    # mean prefers the first rollout (.7 to .6), the minimum the second (.1 to .6): all four turns change sign from
    # α = 0 to 1; the break-even α is 1/6, so at the default 0.3 the minimum decides already. (1, "a") is dead.
    log = tmp_path / "rollouts.jsonl"
    log.write_text(rollout(0, "a", 0, [.9, 1., .1, .8]) + rollout(0, "a", 1, [.6, .6, .6])
                   + rollout(1, "a", 0, [.5, None]) + rollout(1, "a", 1, [.5]))
    out = replay(log)
    assert out.returncode == 0, out.stderr
    rows = {line.split("|")[0].strip(): line.split("|")[1:] for line in out.stdout.splitlines() if "|" in line}
    cells = {name: [float(c.strip().rstrip("%")) for c in row] for name, row in list(rows.items())[1:]}
    assert len(cells) == 8 and "4 rollouts" in out.stdout and "2 groups" in out.stdout
    name = lambda part: next(c for n, c in cells.items() if part in n)
    assert name("alpha 0.3") == [0, 0, 1, 50] and name("min")[0] == 0               # against itself: no change
    assert name("mean")[0] == 77.8 and name("mean")[1] == pytest.approx(2 ** .5 * 7 / 9, abs=1e-3)   # 7 of 9 turns
    assert name("mean")[2] == -1 and name("alpha 0.1")[0] == 77.8 and name("last")[0] == 77.8
    assert replay(log, "--how", "turn").returncode == 0
    assert replay(log, "--how", "sum").returncode == 2  # unequal turn counts cannot be summed: said in one line
    assert "Traceback" not in replay(log, "--how", "sum").stderr


def test_replay_names_every_bad_record(tmp_path):
    log = tmp_path / "r.jsonl"
    bad = ['{"step": 0', '[]', rollout(0, "a", 0, ["0.5"]).strip(), rollout(0, "a", 1, [NAN]).strip(),
           rollout(0, "a", 2, []).strip(), '{"step": 0, "id": "a", "rollout": 0}', rollout(0, "a", 0, [True]).strip()]
    log.write_bytes("\n".join([rollout(0, "a", 0, [.5]).strip(), *bad]).encode() + b"\n\xff\n")
    out = replay(log)
    assert out.returncode == 2 and "Traceback" not in out.stderr and not out.stdout
    for n in range(2, 10):
        assert f"{log}:{n}: " in out.stderr
    assert "8 bad records" in out.stderr
    log.write_text("")
    assert "0 groups" in replay(log).stderr
    for args in ([log], [tmp_path / "none.jsonl"], [log, "--how", "last"], []):
        out = replay(*args)
        assert out.returncode == 2 and out.stderr and "Traceback" not in out.stderr
    assert replay("--help").returncode == 0
