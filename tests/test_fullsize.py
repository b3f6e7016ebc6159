"""fullsize.py: its arithmetic against what happens at a small size, and its rows on a CPU."""
import json
import weakref

import bitsandbytes
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

import fullsize
import grpo
import sft
from conftest import grpo_args

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:Paged optim")


class Peak(TorchDispatchMode):
    """The most bytes that new tensors held at one time. A GPU's allocator counts the same."""

    def __init__(self, known):
        super().__init__()
        self.now = self.most = 0
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            storage = tensor.untyped_storage() if torch.is_tensor(tensor) else None
            if storage and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.most = max(self.most, self.now)
        return output

    def free(self, key):
        self.now -= self.live.pop(key)


def nf4_tensors(student):
    """Those of all layers in NF4, without the two tables that the layers have in common."""
    tensors = []
    for module in student.base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            tensors += [module.weight, state.absmax, state.offset, state.state2.absmax]
    return tensors


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small student with the dtypes of a GPU, its dense copy, and the tensors of both."""
    real = AutoModelForImageTextToText.from_pretrained

    def load(path, dtype, quantization_config, **more):
        quantization_config.bnb_4bit_compute_dtype = torch.bfloat16
        return real(path, dtype=torch.bfloat16, quantization_config=quantization_config, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fullsize, "OUT", tmp_path_factory.mktemp("out"))
        fullsize.SHAPES["small"] = (256, 688, 2, 4, 2, 1536)
        patch.setattr(AutoModelForImageTextToText, "from_pretrained", load)
        student, dense = fullsize.load(fullsize.make_base("small"))
    student.base.activation_checkpointing_enable({"use_reentrant": False})
    parameters = [*student.model.parameters(), *dense.parameters(), *student.model.buffers()]
    return student, dense, parameters + nf4_tensors(student)


def planned(row, phase):
    """The bytes that come and go in a phase"""
    parts = fullsize.memory("small", row)[phase]
    return sum(parts.get(name, 0) for name in ("KV cache", "gradients", "activations"))


@pytest.mark.parametrize("size, n", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_the_plan_counts_the_weights_of_the_published_model(size, n, capsys):
    """n is from the index of the published checkpoint."""
    fullsize.main(["--size", size, "--plan"])
    assert "sft-8k, update: " in capsys.readouterr().out
    model, parts = fullsize.published(size), fullsize.memory(size, fullsize.LONG)["rollout"]
    assert parts["bf16"] + parts["dense copy"] == 2 * n
    sft.add_lora(sft.Student(model, *[None] * 6), fullsize.RANK, 64)
    assert parts["LoRA"] == 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    cache = grpo.KVCache(model.config.text_config, 40, 8192, torch.bfloat16, "meta")
    assert parts["KV cache"] == sum(x.nbytes for x in cache.keys + cache.values)


def test_nf4_and_optimizer_take_what_bitsandbytes_takes(small):
    parts = fullsize.memory("small", fullsize.LONG)["update"]
    assert parts["NF4"] == sum(x.nbytes for x in nf4_tensors(small[0]))
    p = torch.nn.Parameter(torch.zeros(parts["LoRA"] // 8))         # of the policy
    p.grad = torch.zeros_like(p)
    optimizer = bitsandbytes.optim.PagedAdamW8bit([p])
    optimizer.step()
    state = optimizer.state[p]
    held = [state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2")]
    assert parts["optimizer"] == sum(held)


def test_an_sft_step_and_an_update_take_what_is_planned(small):
    (student, _, tensors), plan = small, planned({"micro": 512}, "update")
    rows = [grpo.Rollout([99] * 512, [-1] * 99 + [0] * 413, logps=[-7.0] * 413) for _ in range(4)]
    student.model.train()
    args = grpo_args("--group", "2", "--micro_tokens", "512")
    with Peak(tensors) as peak:
        sft.loss_over(student, rows, args, backward=True)
    assert plan == pytest.approx(peak.most, rel=0.15)
    optimizer, advantages = sft.adamw(student, 1e-4), torch.ones(4, 1).numpy()
    optimizer.zero_grad()
    with Peak(tensors) as peak:
        grpo.update(student, rows, advantages, {}, args, optimizer)
    assert plan == pytest.approx(peak.most, rel=0.15)


@pytest.mark.parametrize("turns, user, columns", [(1, 20, 400), (10, 200, 2460)])
def test_rollouts_take_what_is_planned(small, turns, user, columns):
    """Most is needed by the first user turn with its picture, or by a late one."""
    row = {"rows": 5, "turns": turns, "user": user, "reply": 2, "columns": columns}
    with Peak(small[2]) as peak:
        rollouts, _ = fullsize.play(*small[:2], row, picture=turns == 1)
    assert len(rollouts[0].turns) == turns
    assert planned(row, "rollout") == pytest.approx(peak.most, rel=0.15)


def test_every_row_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fullsize, "OUT", tmp_path)
    fullsize.main(["--size", "tiny"])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert results == [json.loads(line) for line in open(tmp_path / "tiny.jsonl")]
    assert list(dict.fromkeys(r["row"] for r in results[1:])) == list(fullsize.ROWS)
    assert all(r.get("ok", True) and r.get("mismatch", 0) < 1e-5 for r in results)
