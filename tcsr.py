# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the nanoSteer authors. This file stands alone (numpy only): copy it into any trainer.
"""Judged turns -> advantages: turn reward, running TCSR, credit, group normalisation, tokens.

TCSR is SaFeR-Steer's Trajectory-Consistent Summative Reward. Its sources disagree, so each choice is an argument:
[S] the abstracts and the review, [R] the authors' code, ours. Axes: B prompts, G rollouts, T turns, L tokens, N = B*G.
`mask` is True where a turn happened; NaN (None in a list) = it happened but could not be judged, which is missing and
never 0. Everything is float64; inputs are never written to. Replay of a log: python tcsr.py rollouts.jsonl
"""
import numpy as np


def _read(values, mask):
    """-> values: a new float64 array, NaN where no turn happened; happened: bool, the same shape"""
    values = np.asarray(values, np.float64)
    happened = np.ones(values.shape, bool) if mask is None else np.asarray(mask, bool)
    if values.size == 0 or values.ndim == 0 or happened.shape != values.shape:
        raise ValueError(f"needs a turn at least, and a mask of that shape: got {values.shape}, mask {happened.shape}")
    if np.isinf(values[happened]).any():
        raise ValueError("infinite value; a turn that could not be judged is NaN")
    return np.where(happened, values, np.nan), happened


def turn_reward(safety, usefulness, faithfulness, *, weights=(.6, .3, .1), scale="unit", format_ok=True,
                format_bonus=None, repetition=0., repetition_weight=0.):
    """Judge scores 1..10 of a turn -> its reward; arrays broadcast, NaN in gives NaN out.

    weights: .6/.3/.1 [R, one file], .4/.4/.2 [R, the code that ran]. scale: "unit" maps 1..10 to 0..1 (ours: the worst
    reply earns 0), "tenth" divides by 10 [R]. format_bonus: None multiplies by format_ok (ours), a number adds it: 1.0
    in [R], as much as all the rest. repetition: share of repeated 3-grams, subtracted with weight 0 (ours), 0.1 [R].

    >>> float(turn_reward(10, 1, 1)), float(turn_reward(10, 10, 10, scale="tenth", format_bonus=1.))
    (0.6, 2.0)
    """
    scores = [np.asarray(s, np.float64) for s in (safety, usefulness, faithfulness)]
    if any(((s < 1) | (s > 10)).any() for s in scores):
        raise ValueError("scores must lie in 1..10; a failed judgement is NaN, never clamped into the range")
    if scale not in ("unit", "tenth") or len(weights) != 3:
        raise ValueError(f"scale must be 'unit' or 'tenth', weights three numbers; got {scale!r} and {weights!r}")
    quality = sum(w * ((s - 1) / 9 if scale == "unit" else s / 10) for w, s in zip(weights, scores))
    ok = np.asarray(format_ok, bool)
    reward = quality * ok if format_bonus is None else quality + format_bonus * ok
    return np.maximum(reward - repetition_weight * np.asarray(repetition), 0)       # floored at 0 [R]


def tcsr(rewards, alpha=0.3, mask=None):
    """Running value r~_t = alpha * min(r_1..r_t) + (1 - alpha) * mean(r_1..r_t) [S, R]; (..., T) -> (..., T).

    alpha: 0.3 [S], 0.4 [R]; 0 is the mean, 1 the minimum, None passes the rewards through. Minimum and mean skip a turn
    that was not judged or did not happen; the value there repeats the previous one, so [..., -1] is the rollout's r~_T;
    NaN before the first judged turn. ([R] gives its unjudged last turn a 0, which pins the minimum: not copied.)

    >>> tcsr([.9, .8, .1, .9]).round(4).tolist(), tcsr([None, .8, None, .4], alpha=0).round(4).tolist()
    ([0.9, 0.835, 0.45, 0.5025], [nan, 0.8, 0.8, 0.6])
    """
    rewards, _ = _read(rewards, mask)
    if alpha is None:
        return rewards
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be None or in [0, 1], not {alpha!r}")
    n = (~np.isnan(rewards)).cumsum(-1)                                             # (..., T) judged turns up to t
    mean = np.nancumsum(rewards, -1) / np.where(n > 0, n, np.nan)
    return alpha * np.fmin.accumulate(rewards, -1) + (1 - alpha) * mean             # fmin passes over NaN


def credit(running, mask=None, how="trajectory"):
    """What turn t is answerable for; (..., T) -> (..., T), NaN where nothing judged is left to tell.

    "trajectory"  r~ at the last judged turn, for every turn [R: one return for every assistant token]; the default
    "turn"        mean of r~_u over u >= t (ours): causal, less noise, still carries a late failure to earlier turns
    "sum"         sum of r~_u, for every turn (a reading of "summative" [S]): more turns, more reward, so rollouts of a
                  group (axis -2) must have equally many. A turn before the first judged one counts as the mean.

    >>> [credit([.9, .7, .5], how=how).round(2).tolist() for how in ("trajectory", "turn", "sum")]
    [[0.5, 0.5, 0.5], [0.7, 0.6, 0.5], [2.1, 2.1, 2.1]]
    """
    running, happened = _read(running, mask)
    known = ~np.isnan(running)
    n = known[..., ::-1].cumsum(-1)[..., ::-1]                                      # (..., T) values at u >= t
    rest = np.nancumsum(running[..., ::-1], -1)[..., ::-1] / np.where(n > 0, n, np.nan)      # (..., T) their mean
    if how == "turn":
        return rest
    if how == "trajectory":                             # the one value with none behind it, (..., T) -> (..., 1)
        value = np.fmax.reduce(np.where(known & (n == 1), running, np.nan), -1, keepdims=True)
    elif how == "sum":
        turns = happened.sum(-1, keepdims=True)                                     # (..., G, 1); 0: not there at all
        if running.ndim > 1 and ((turns != turns.max(-2, keepdims=True)) & (turns > 0)).any():
            raise ValueError("how='sum' needs equal turn counts within a group; use 'trajectory' or 'turn'")
        value = rest[..., :1] * turns                                               # (..., 1)
    else:
        raise ValueError(f"how must be 'trajectory', 'turn' or 'sum', not {how!r}")
    return np.tile(value, running.shape[-1])                                        # (..., 1) -> (..., T)


def _moments(returns):
    """Over a group's judged rollouts: deviations from the mean (B, G, ...), 0 if missing; std and count (B, 1, ...)"""
    n = (~np.isnan(returns)).sum(1, keepdims=True)
    deviation = np.nan_to_num(returns - np.nansum(returns, 1, keepdims=True) / np.maximum(n, 1))
    return deviation, np.sqrt((deviation ** 2).sum(1, keepdims=True) / np.maximum(n - 1, 1)), n


def group_advantages(returns, mask=None, scale=True):
    """GRPO's (R - mean) / std over the judged rollouts of a group [R]; (B, G) or (B, G, T) -> the same shape.

    With T, each turn index is a group of those that reached it. ddof 1 as TRL and verl, no epsilon: a spread
    (max - min) below 1e-6 is rounding and gives exactly 0 (ours), so does a group of one. A missing return gets 0 and
    leaves its siblings as if it had never been sampled. scale=False leaves the std out.

    >>> group_advantages([[1, 2, 3, None], [.7, .7, .7, .7]]).tolist()
    [[-1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    returns, _ = _read(returns, mask)
    if returns.ndim not in (2, 3):
        raise ValueError(f"returns must be (B, G) or (B, G, T), got shape {returns.shape}")
    deviation, std, _ = _moments(returns)
    dead = np.ptp(deviation, axis=1, keepdims=True) < 1e-6              # the 0 of a missing one lies between the others
    return np.where(dead, 0, deviation / np.where(dead, 1, std if scale else 1))


def advantages(rewards, mask=None, *, alpha=0.3, how="trajectory", scale=True, max_missing=0.5):
    """tcsr, credit, group_advantages in a row: rewards (B, G, T) -> advantages (B, G, T), diagnostics.

    "trajectory" and "sum" are normalised once per rollout, then broadcast. An unjudged turn's own tokens get 0; a
    rollout with more than max_missing (ours) of its turns unjudged leaves its group. Diagnostics: dead (B,) bool, no
    advantage in the whole group; the shares dead_groups, missing_turns, dropped_rollouts; std_per_turn, T floats: std
    of r~_t within a group, averaged, NaN where no group has two. After a bad turn r~ moves by (1 - alpha) / t only,
    and dividing by the std inflates what is left: a std near 0 says that it is noise.

    >>> adv, seen = advantages([[[.9, .8, .1, .9], [.6, .6, None, .6]]])     # the first rollout slips at turn 3
    >>> adv.round(3).tolist(), seen["missing_turns"]                         # and pays for it at every turn
    ([[[-0.707, -0.707, -0.707, -0.707], [0.707, 0.707, 0.0, 0.707]]], 0.125)
    """
    rewards, happened = _read(rewards, mask)
    if rewards.ndim != 3 or not 0 <= max_missing <= 1:
        raise ValueError(f"needs rewards (B, G, T) and max_missing in [0, 1], got {rewards.shape} and {max_missing!r}")
    missing = happened & np.isnan(rewards)                                          # (B, G, T)
    dropped = missing.sum(-1) / np.maximum(happened.sum(-1), 1) > max_missing       # (B, G)
    kept = happened & ~dropped[..., None]                                           # (B, G, T)
    running = tcsr(rewards, alpha, kept)
    value = credit(running, kept, how)
    if how == "turn":
        adv = group_advantages(value, kept, scale)
    else:
        adv = group_advantages(value[..., 0], None, scale)[..., None]               # (B, G) -> (B, G, 1)
    adv = np.where(kept & ~missing, adv, 0)                                         # (B, G, T)
    _, std, n = _moments(np.where(kept, running, np.nan))                           # (B, 1, T)
    pairs = (n > 1).sum((0, 1))                                                     # (T,) groups with two to compare
    dead = ~adv.any((1, 2))                                                         # (B,)
    return adv, {"dead": dead, "dead_groups": float(dead.mean()), "dropped_rollouts": float(dropped.mean()),
                 "missing_turns": float(missing.sum() / max(happened.sum(), 1)),
                 "std_per_turn": (std.sum((0, 1)) / np.where(pairs > 0, pairs, np.nan)).tolist()}


def to_tokens(adv, turn_id):
    """adv (N, T), turn_id (N, L) -> (N, L): each token gets its turn's advantage, 0 where turn_id is -1 (context).

    turn_id is aligned with the token ids; a trainer whose log-probs predict ids[:, 1:] slices the result [:, 1:].

    >>> to_tokens([[.5, -1.]], [[-1, 0, 0, -1, 1]]).tolist()
    [[0.0, 0.5, 0.5, 0.0, -1.0]]
    """
    adv, turn_id = np.asarray(adv, np.float64), np.asarray(turn_id)
    if adv.ndim != 2 or turn_id.ndim != 2 or len(adv) != len(turn_id):
        raise ValueError(f"needs adv (N, T) and turn_id (N, L), got {adv.shape} and {turn_id.shape}")
    if turn_id.dtype.kind not in "iu" or ((turn_id < -1) | (turn_id >= adv.shape[1])).any():
        raise ValueError(f"turn_id must be integers in -1..{adv.shape[1] - 1}, one of {adv.shape[1]} turns or -1")
    return np.where(turn_id < 0, 0, np.take_along_axis(adv, np.maximum(turn_id, 0), 1))     # (N, L)


# ---------------------------------------------------------------- replay: a log of grpo.py under other rewards

def replay():
    """Re-score logged rollouts under mean, min, last turn, TCSR: how many turns would be pushed the other way?"""
    import argparse
    import json
    p = argparse.ArgumentParser(description=replay.__doc__, allow_abbrev=False)
    p.add_argument("rollouts", help="rollouts.jsonl, as grpo.py writes it")
    p.add_argument("--how", default="trajectory", choices=("trajectory", "turn", "sum"), help="credit (trajectory)")
    args, groups, bad = p.parse_args(), {}, []
    try:
        for number, line in enumerate(open(args.rollouts, "rb"), 1):
            try:
                row = json.loads(line)
                rewards = [turn["reward"] for turn in row["turns"]]
                if not rewards or not all(r is None or type(r) in (int, float) and abs(r) < 1e6 for r in rewards):
                    raise ValueError("turns: needs at least one, each with a finite reward or null")
                groups.setdefault((row["step"], row["id"]), {})[row["rollout"]] = rewards    # resumed: the last counts
            except (ValueError, TypeError, KeyError, RecursionError) as e:
                bad.append(f"{args.rollouts}:{number}: {f'no field {e}' if isinstance(e, KeyError) else e}\n")
        if bad or not groups:
            p.exit(2, "".join(bad[:20]) + f"{args.rollouts}: {len(bad)} bad records, {len(groups)} groups\n")
        G = max(map(len, groups.values()))
        rows = [r for g in groups.values() for r in [*g.values(), *[[]] * (G - len(g))]]    # B*G lists, [] = not there
        T = max(map(len, rows))
        mask = (np.arange(T) < np.array([[len(r)] for r in rows])).reshape(-1, G, T)
        rewards = np.array([r + [None] * (T - len(r)) for r in rows], np.float64).reshape(-1, G, T)
        alphas = {"mean (alpha 0)": 0, "min (alpha 1)": 1, "last turn": None}
        alphas |= {f"TCSR alpha {a}": a for a in (.1, .3, .5, .7, .9)}
        scored = {name: advantages(rewards, mask, alpha=a, how="trajectory" if a is None else args.how)
                  for name, a in alphas.items()}
    except (OSError, ValueError) as e:
        p.error(str(e))
    default, judged = scored["TCSR alpha 0.3"][0], mask & ~np.isnan(rewards)
    print(f"{mask.any(-1).sum()} rollouts in {len(mask)} groups, {judged.sum()} turns; credit {args.how}; "
          "changes against TCSR alpha 0.3")
    print("reward         | sign changes | mean |change| | correlation | dead groups")
    for name, (adv, seen) in scored.items():
        a, b = adv[judged], default[judged]                                         # (turns,)
        r = np.corrcoef(a, b)[0, 1] if a.any() and b.any() else np.nan
        print(f"{name:14} | {(a * b < 0).mean():12.1%} | {abs(a - b).mean():13.3f} | {r:11.3f} | "
              f"{seen['dead_groups']:11.1%}")


if __name__ == "__main__":
    replay()
