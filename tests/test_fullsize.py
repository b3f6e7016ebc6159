"""fullsize.py: its arithmetic against what happens at a small size, and its rows on a CPU."""
import gc
import json
import weakref

import bitsandbytes
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fullsize
import grpo
import sft
from conftest import grpo_args

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:Paged optim")


class Peak(TorchDispatchMode):
    """The most bytes that new tensors held at one time. A GPU's allocator counts the same."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        old = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in old}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(output)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.most = max(self.most, self.now)
        return output

    def free(self, key):
        self.now -= self.live.pop(key)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small student with the dtypes of a GPU, and its dense copy."""
    real = sft.AutoModelForImageTextToText.from_pretrained

    def load(path, dtype, quantization_config, **more):
        quantization_config.bnb_4bit_compute_dtype = torch.bfloat16
        return real(path, dtype=torch.bfloat16, quantization_config=quantization_config, **more)

    fullsize.OUT = tmp_path_factory.mktemp("out")
    fullsize.SHAPES["small"] = (256, 688, 2, 4, 2, 1536)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.AutoModelForImageTextToText, "from_pretrained", load)
        student, dense = fullsize.load(fullsize.make_base("small"))
    student.base.activation_checkpointing_enable({"use_reentrant": False})
    return student, dense


def planned(row, phase):
    parts = fullsize.memory("small", row)[phase]
    return sum(parts.get(name, 0) for name in ("KV cache", "gradients", "activations"))


@pytest.mark.parametrize("size, n", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_the_plan_counts_the_weights_of_the_published_model(size, n, capsys):
    """n is what the index of the published checkpoint says."""
    fullsize.main(["--size", size, "--plan"])
    assert "sft-8k" in capsys.readouterr().out
    parts = fullsize.memory(size, fullsize.LONG)["rollout"]
    assert parts["bf16"] + parts["dense copy"] == 2 * n
    model = fullsize.published.__wrapped__(size)                # one of our own
    sft.add_lora(sft.Student(model, *[None] * 6), fullsize.RANK, 64)
    assert parts["LoRA"] == 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_nf4_and_optimizer_take_what_bitsandbytes_takes(small):
    parts, nf4 = fullsize.memory("small", fullsize.LONG)["update"], 0
    for module in small[0].base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            scales = (state.absmax, state.offset, state.state2.absmax)
            nf4 += sum(x.nbytes for x in (module.weight, *scales))
    p = torch.nn.Parameter(torch.zeros(parts["LoRA"] // 8))         # of the policy
    p.grad = torch.zeros_like(p)
    optimizer = bitsandbytes.optim.PagedAdamW8bit([p])
    optimizer.step()
    held = [optimizer.state[p][key].nbytes for key in ("state1", "state2", "absmax1", "absmax2")]
    assert (parts["NF4"], parts["optimizer"]) == (nf4, sum(held))


def test_an_sft_step_and_an_update_take_what_is_planned(small):
    student, plan = small[0], planned({"micro": 512}, "update")
    args, optimizer = grpo_args("--group", "2", "--micro_tokens", "512"), sft.adamw(student, 1e-4)
    rows = [grpo.Rollout([99] * 512, [-1] * 99 + [0] * 413, logps=[-7.0] * 413) for _ in range(4)]
    with Peak() as peak:
        grpo.update(student, rows, torch.ones(4, 1).numpy(), {}, args, optimizer)
    assert plan == pytest.approx(peak.most, rel=0.1)
    with Peak() as peak:
        sft.loss_over(student, rows, args, backward=True)
    assert plan == pytest.approx(peak.most, rel=0.1)


@pytest.mark.parametrize("turns, user, columns", [(1, 20, 400), (10, 200, 2460)])
def test_rollouts_take_what_is_planned(small, turns, user, columns):
    """Most is needed by the first user turn with its picture, or by a late one."""
    row = {"rows": 5, "turns": turns, "user": user, "reply": 2, "columns": columns}
    with Peak() as peak:
        fullsize.play(*small, row, picture=turns == 1)
    assert planned(row, "rollout") == pytest.approx(peak.most, rel=0.1)


def test_every_row_runs_on_a_cpu(small, capsys):
    fullsize.main(["--size", "tiny"])
    results = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert {r["row"] for r in results[1:]} == set(fullsize.ROWS)
    assert all(r.get("ok", True) and r.get("mismatch", 0) < 1e-5 for r in results)
