"""What a 3B or a 7B on a GPU needs, on small models of the same shape."""
import pytest
import torch

import grpo
import sft
from conftest import grpo_args, scripted
from test_rollout import actor, images_of, keys_of, lively, play  # noqa: F401, the fixture is used by name


# ---------------------------------------------------------------- decoding

@pytest.mark.parametrize("block", [8, 64, 4096])
@pytest.mark.parametrize("weights", ["dense", "base"])
def test_a_step_whose_shapes_never_change_says_the_same(actor, mixed, weights, block, monkeypatch):
    """What a GPU records and repeats, run on a CPU: rows leave, turns are ragged, replies end early, and memory that was
    never written is full of NaN."""
    student, dense = actor
    lm = dense if weights == "dense" else None
    real = grpo.Cache

    class Dirty(real):
        def __init__(self, *args):
            super().__init__(*args)
            for kv in self.kv:
                kv.fill_(torch.nan)
    monkeypatch.setattr(grpo, "Cache", Dirty)
    monkeypatch.setattr(grpo.FixedStep, "BLOCK", block)
    shapes, step = set(), grpo.FixedStep.step
    monkeypatch.setattr(grpo.FixedStep, "step", lambda self: (shapes.add(tuple(self.mask.shape)), step(self))[1])
    for temperature in ("1.0", "0"):
        flags = ["--temperature", temperature]
        expected = play(student, mixed, *flags, lm=lm)
        talks = grpo.rollout(student, mixed, keys_of(mixed), scripted, grpo_args(*flags), images_of(student, mixed), lm, fixed=True)
        for a, b in zip(talks, expected):
            assert (a.ids, a.turn_id, a.turns) == (b.ids, b.turn_id, b.turns)
            assert a.logps == pytest.approx(b.logps, abs=1e-5)
    assert len({rows for rows, *_ in shapes}) > 1 and all(s % block == 0 or s == 600 for *_, s in shapes)
