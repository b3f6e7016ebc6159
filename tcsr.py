# SPDX-License-Identifier: MIT. Copyright (c) 2026 the nanoSteer authors. Needs numpy only: copy it.
"""TCSR: turn rewards -> one advantage per turn. One bad turn counts for the whole dialogue.

This is the trajectory-consistent reward of SaFeR-Steer (arXiv:2604.16358). After turn t it is
    tcsr_t = alpha * min(r_1..r_t) + (1 - alpha) * mean(r_1..r_t)

Shapes: B prompts, G rollouts per prompt, T turns, N = B * G rollouts, L tokens. mask is True where
a turn happened. NaN (None in a list) is a turn that could not be judged: it never counts as 0.

>>> adv, info = advantages([[[.9, .8, .1, .9], [.6, .6, .6, .6]]])
>>> adv.round(3).tolist()       # the first rollout slips at turn 3 and pays for it at every turn
[[[-0.707, -0.707, -0.707, -0.707], [0.707, 0.707, 0.707, 0.707]]]
"""
import numpy as np


def turn_reward(safety, usefulness, faithfulness, *, weights=(.6, .3, .1), scale="unit",
                format_ok=True, format_bonus=None, repetition=0., repetition_weight=0.):
    """The scores of a turn, each 1..10 -> its reward. Arrays broadcast. The defaults are ours.

    scale "unit" maps 1..10 to 0..1, "tenth" divides by 10. format_bonus is added if format_ok; None
    multiplies by format_ok. repetition is the share of repeated 3-grams, subtracted by weight.
    >>> float(turn_reward(10, 1, 1)), float(turn_reward(10, 10, 10, format_ok=False))
    (0.6, 0.0)
    """
    scores = np.stack(np.broadcast_arrays(safety, usefulness, faithfulness)).astype(float)
    if ((scores < 1) | (scores > 10)).any():
        raise ValueError("scores must lie in 1..10; a failed judgement is NaN")
    scaled = (scores - 1) / 9 if scale == "unit" else scores / 10
    reward = np.tensordot(weights, scaled, axes=1)
    reward = reward * format_ok if format_bonus is None else reward + format_bonus * format_ok
    return np.maximum(reward - repetition_weight * np.asarray(repetition), 0.0)


def tcsr(rewards, alpha=0.3, mask=None):
    """The running TCSR value after each turn, (..., T) -> (..., T).

    An unjudged turn repeats the value before it. alpha: 0 is the mean, 1 the minimum, None returns
    the rewards. The paper does not state it; 0.3 is the released code's.
    >>> tcsr([.9, .8, .1, .9]).round(4).tolist()
    [0.9, 0.835, 0.45, 0.5025]
    """
    rewards, _ = _masked(rewards, mask)
    if alpha is None:
        return rewards
    count = np.cumsum(~np.isnan(rewards), axis=-1)                  # judged turns up to turn t
    mean = np.nancumsum(rewards, axis=-1) / np.where(count > 0, count, np.nan)
    minimum = np.fmin.accumulate(rewards, axis=-1)                  # fmin ignores NaN
    return alpha * minimum + (1 - alpha) * mean


def credit(running, mask=None, how="trajectory"):
    """TCSR values -> the return that each turn is trained on, (..., T) -> (..., T), NaN if none.
    "trajectory": the last value, for every turn (released code, our default)
    "turn":       the mean of the values from this turn on: a turn is not blamed for the past
    "sum":        the sum of all values, for every turn (paper); groups need equally many turns
    >>> [credit([.9, .7, .5], how=how).round(2).tolist() for how in ("trajectory", "turn", "sum")]
    [[0.5, 0.5, 0.5], [0.7, 0.6, 0.5], [2.1, 2.1, 2.1]]
    """
    running, happened = _masked(running, mask)
    returns = np.full(running.shape, np.nan)
    if how == "sum":
        count = happened.sum(-1, keepdims=True)                     # (..., G, 1)
        if running.ndim > 1 and ((count > 0) & (count < count.max(-2, keepdims=True))).any():
            raise ValueError("how='sum' needs equally many turns in all rollouts of a group")
        returns[...] = _mean(running)[..., None] * count
    for t in range(running.shape[-1]):
        if how == "turn":
            returns[..., t] = _mean(running[..., t:])
        elif how == "trajectory":                                   # later values replace earlier
            returns = np.where(np.isnan(running[..., t, None]), returns, running[..., t, None])
        elif how != "sum":
            raise ValueError(f"how must be 'trajectory', 'turn' or 'sum', not {how!r}")
    return returns


def group_advantages(returns, mask=None, scale=True):
    """GRPO's baseline over the G rollouts of a prompt, (B, G) or (B, G, T) -> the same shape.

    Subtracts their mean and, if scale, divides by their standard deviation (ddof 1). A missing
    return gets 0 and does not change its siblings. Equal returns (to 1e-6) get exactly 0.
    >>> group_advantages([[1, 2, 3, None], [.7, .7, .7, .7]]).tolist()
    [[-1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    returns, _ = _masked(returns, mask)
    count = (~np.isnan(returns)).sum(1, keepdims=True)              # (B, 1) or (B, 1, T)
    mean = np.nansum(returns, 1, keepdims=True) / np.maximum(count, 1)
    deviation = np.nan_to_num(returns - mean)
    std = np.sqrt((deviation ** 2).sum(1, keepdims=True) / np.maximum(count - 1, 1))
    equal = np.ptp(deviation, axis=1, keepdims=True) < 1e-6         # what is left is rounding
    return np.where(equal, 0.0, deviation / np.where(equal, 1.0, std if scale else 1.0))


def advantages(rewards, mask=None, *, alpha=0.3, how="trajectory", scale=True, max_missing=0.5):
    """tcsr, credit and group_advantages in a row: rewards (B, G, T) -> advantages (B, G, T), info.

    A rollout with more than max_missing of its turns unjudged leaves its group. info: returns
    (B, G, T), dead (B,) for groups without any advantage, and three shares.
    """
    rewards, happened = _masked(rewards, mask)
    missing = happened & np.isnan(rewards)                          # (B, G, T)
    dropped = missing.sum(-1) > max_missing * happened.sum(-1)      # (B, G)
    kept = happened & ~dropped[..., None]
    returns = credit(tcsr(rewards, alpha, kept), kept, how)
    adv = group_advantages(returns, kept if how == "turn" else None, scale)
    adv = np.where(kept & ~missing, adv, 0.0)
    dead = ~adv.any((1, 2))
    info = {"returns": returns, "dead": dead, "dead_groups": float(dead.mean())}
    info["missing_turns"] = float(missing.sum() / max(happened.sum(), 1))
    return adv, {**info, "dropped_rollouts": float(dropped.mean())}


def to_tokens(adv, turn_id):
    """adv (N, T), turn_id (N, L) -> (N, L): the advantage of each token's turn, 0 where it is -1.
    >>> to_tokens([[.5, -1.]], [[-1, 0, 0, -1, 1]]).tolist()
    [[0.0, 0.5, 0.5, 0.0, -1.0]]
    """
    adv, turn_id = np.asarray(adv, float), np.asarray(turn_id)
    return np.where(turn_id < 0, 0.0, np.take_along_axis(adv, np.maximum(turn_id, 0), 1))


def _masked(values, mask):      # -> values with NaN where no turn happened, and where one happened
    values = np.asarray(values, float)
    happened = np.ones(values.shape, bool) if mask is None else np.asarray(mask, bool)
    return np.where(happened, values, np.nan), happened


def _mean(values):              # over the last axis, without NaN
    count = (~np.isnan(values)).sum(-1)
    return np.nansum(values, -1) / np.where(count > 0, count, np.nan)
