"""plan.py counts the weights of the published models; the rows of fullsize.py run on a CPU."""
import json

import pytest

import fullsize
import plan

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:Paged optim")


@pytest.mark.parametrize("size, n", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_the_plan_counts_the_weights_of_the_published_model(size, n, capsys):
    """n is what the index of the published checkpoint says."""
    plan.main([size])
    assert "sft-8k" in capsys.readouterr().out
    parts = plan.memory(size, plan.LONG)["rollout"]
    assert parts["bf16"] + parts["dense copy"] == 2 * n


def test_every_row_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    """On a GPU each row has the planned memory beside the measured one."""
    monkeypatch.setattr(fullsize, "OUT", tmp_path)
    fullsize.main(["--size", "tiny"])
    results = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert {r["row"] for r in results[1:]} == set(fullsize.ROWS)
    assert all(r.get("ok", True) and r.get("mismatch", 0) < 1e-5 for r in results)
