"""What a 3B or a 7B on a GPU needs, on small models of the same shape."""
import json
import os
import random
import shutil
import socket
import tempfile
import weakref
from collections import Counter
from types import SimpleNamespace

import accelerate
import bitsandbytes as bnb
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2_5_VLForConditionalGeneration as Model

import fullsize
import grpo
import judge
import sft
import toy
from conftest import dialogue, grpo_args, scripted, shake, timeless
from test_rollout import actor, images_of, keys_of, moody, play, played, policy  # noqa: F401, two are fixtures
from test_student import close, gradient

PUBLISHED = {"3b": 3_754_622_976, "7b": 8_292_166_656}  # weights, by the index of the published checkpoints


@pytest.fixture(scope="module")
def tok():
    return toy.make_tokenizer(random.Random(0))


@pytest.fixture(scope="module")
def small(tmp_path_factory, tok):
    """A folder with the 7B's shape: more heads than keys, an lm_head of its own, images of up to 12.8 M pixels."""
    patch = pytest.MonkeyPatch()
    patch.setitem(fullsize.SIZES, "small", ((256, 688, 2, 4, 2, 1536, False), (64, 128, 2, 4)))
    patch.setitem(fullsize.SIDE, "small", 56)
    patch.setattr(toy, "make_tokenizer", lambda rng: tok)
    folder = tmp_path_factory.mktemp("out") / "small"
    folder.mkdir()
    yield fullsize.make_base("small", folder)
    patch.undo()


@pytest.fixture
def bf16(monkeypatch):
    """Load as on a GPU; on a CPU everything is fp32 otherwise."""
    real = Model.from_pretrained

    def load(path, dtype, quantization_config=None, **more):
        if quantization_config:
            quantization_config.bnb_4bit_compute_dtype = torch.bfloat16
        return real(path, dtype=torch.bfloat16, quantization_config=quantization_config, **more)
    monkeypatch.setattr(Model, "from_pretrained", load)


# ---------------------------------------------------------------- precision

def test_precision_by_prefix_is_what_fits_a_gpu(small, bf16):  # traps 15, 16, 19
    student = sft.load_student(small)
    sft.add_lora(student, 8, 16)
    student.model.add_adapter("reference", student.model.peft_config["policy"])
    sft.use_adapter(student, "policy")
    student.base.activation_checkpointing_enable({"use_reentrant": False})
    student.model.train()
    part = lambda name: next(p for p in ("lora_", "visual", "embed_tokens", "lm_head", "norm", "proj", "") if p in name)
    seen = Counter((part(n), p.dtype) for n, p in student.model.named_parameters())
    layers, bf = student.base.config.text_config.num_hidden_layers, torch.bfloat16
    tower = len([*student.base.model.visual.parameters()])
    assert seen == {("proj", torch.uint8): 7 * layers, ("proj", bf): 3 * layers, ("norm", bf): 2 * layers + 1,
                    ("visual", bf): tower, ("embed_tokens", bf): 1, ("lm_head", bf): 1,
                    ("lora_", torch.float32): 2 * 2 * 7 * layers}
    for m in student.base.modules():
        if isinstance(m, bnb.nn.Linear4bit):
            assert m.weight.quant_state.nested and m.weight.quant_state.quant_type == "nf4"  # double quantisation


def test_the_default_budget_is_512_x_512(small):  # trap 13
    student = sft.load_student(small)
    assert student.image_processor.size["longest_edge"] == 512 * 512
    assert sft.image_grid(student, SimpleNamespace(width=512, height=512)) == (18, 18)
    for size in ((4000, 3000), (513, 512), (9000, 60)):
        height, width = sft.image_grid(student, SimpleNamespace(width=size[0], height=size[1]))
        assert height * width <= (512 // 28) ** 2 + 10


def test_the_tower_sees_a_few_images_at_a_time_and_their_features_wait_on_the_cpu(student, pictures, monkeypatch):
    together = sft.encode_images(student, pictures)
    monkeypatch.setitem(student.image_processor.size, "longest_edge", 8192 * 28 * 28 // 2)  # as if two were a lot
    seen, real, model = [], student.base.model.get_image_features, student.base.model
    monkeypatch.setattr(model, "get_image_features", lambda x, grid: (seen.append(len(grid)), real(x, grid))[1])
    some = sft.encode_images(student, pictures)
    assert seen == [2, 2]
    for path in pictures:
        torch.testing.assert_close(some[path], together[path], atol=1e-5, rtol=1e-4)


def test_a_machine_with_torchvision_sees_the_same_pictures(base, monkeypatch):
    from transformers.models.auto import image_processing_auto as auto
    backends, real = [], auto._load_backend_class
    monkeypatch.setattr(auto, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(auto, "_load_backend_class", lambda name, backend, *rest: (
        backends.append(backend), real(name, "pil", *rest))[1])
    sft.load_student(base, nf4=False)
    assert backends == ["pil"]


def test_patches_by_product_are_those_of_the_convolution(fresh, pictures, monkeypatch):
    student = fresh(reference=False)
    convolved = sft.encode_images(student, pictures)
    sft.patches_by_product(student.base)
    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", None)  # which is not called now
    for path, features in sft.encode_images(student, pictures).items():
        torch.testing.assert_close(features, convolved[path], atol=1e-5, rtol=1e-4)


def test_turns_that_do_not_fit_are_counted_aloud(student, mixed, capsys):  # trap 14
    args = sft.parse_args("--model m --data d --out o --held_out 0 --skip_bad --max_tokens 60".split())
    whole = sum(sft.render(student, d)[1] for d in mixed)
    dropped = sum(sft.render(student, d, 60)[1] for d in mixed[:2] + mixed[3:4])
    sft.train_and_held_out(student, mixed[:2] + mixed[3:4], args)
    assert whole == 0 < dropped and f"{dropped} turns dropped beyond 60 tokens" in capsys.readouterr().out


def test_checkpointing_keeps_a_state_a_layer_and_the_same_gradient(fresh, mixed):  # trap 2
    student = fresh()
    rows, images = [sft.render(student, d)[0] for d in mixed], images_of(student, mixed)

    def run():
        kept = Counter()
        keep = lambda t: (kept.update({t.data_ptr(): t.nbytes}), t)[1]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = sft.reply_logps(student, rows, images)[0].sum()
        loss.backward()
        grads = [p.grad.clone() for p in student.model.parameters() if p.grad is not None]
        student.model.zero_grad()
        return sum(kept.values()), grads
    student.model.train()
    whole, plain = run()
    student.base.activation_checkpointing_enable({"use_reentrant": False})
    student.model.train()
    little, checked = run()
    assert little < whole / 4 and all(torch.equal(a, b) for a, b in zip(plain, checked))


# ---------------------------------------------------------------- the optimiser

def test_the_optimiser_is_paged_and_8_bit_on_a_gpu_and_torchs_on_a_cpu(fresh):
    student = fresh()
    optimizer = sft.adamw(student, 1e-3)
    assert type(optimizer) is torch.optim.AdamW and optimizer.param_groups[0]["weight_decay"] == 0
    assert optimizer.param_groups[0]["params"] == [p for n, p in student.model.named_parameters() if ".policy." in n]
    there = SimpleNamespace(model=torch.nn.Linear(2, 2))
    there.model.parameters = lambda: [SimpleNamespace(requires_grad=True, is_cuda=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bnb.optim, "PagedAdamW8bit", lambda params, **more: ("paged", len(params), more))
        assert sft.adamw(there, 1e-3) == ("paged", 1, {"lr": 1e-3, "weight_decay": 0.0})


def test_the_gpus_optimiser_goes_on_from_its_state(tmp_path):
    """What a checkpoint keeps of it is enough: four steps are two, a file, and two."""
    def train(steps, state=None):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 128) if state is None else state["p"])
        optimizer = bnb.optim.PagedAdamW8bit([p], lr=1e-2, weight_decay=0.0)
        if state:
            optimizer.load_state_dict(state["optimizer"])
        for step in steps:
            p.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return {"p": p.detach(), "optimizer": optimizer.state_dict()}
    torch.save(train([0, 1]), tmp_path / "state.pt")
    assert torch.equal(train([2, 3], torch.load(tmp_path / "state.pt"))["p"], train(range(4))["p"])


def test_a_resumed_optimiser_does_not_take_ordinary_memory_for_pages(tmp_path, monkeypatch):
    """A paged tensor is CPU memory with two attributes, which torch.save keeps. bitsandbytes prefetches what has them; for
    memory that is not paged the driver says no, and the process ends. "meta" stands for the card."""
    def paged(p, dtype):
        state = torch.zeros(p.shape, dtype=dtype)
        state.is_paged, state.page_deviceid = True, 0
        return state
    p = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = bnb.optim.PagedAdamW8bit([p])
    optimizer.get_state_buffer = paged
    optimizer.init_state(optimizer.param_groups[0], p, 0, 0)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    monkeypatch.setattr(sft, "load_weights", lambda *args: None)
    there = torch.nn.Parameter(torch.zeros(64, 128, device="meta"))
    resumed = bnb.optim.PagedAdamW8bit([there])
    sft.begin(sft.Run(None, 0.0, {}, {}, tmp_path), SimpleNamespace(base=SimpleNamespace(device="meta")), resumed)
    for name in ("state1", "state2"):
        assert resumed.state[there][name].is_meta and not getattr(resumed.state[there][name], "is_paged", False)


# ---------------------------------------------------------------- merging

@pytest.fixture
def hub(small, tmp_path):
    """-> f(rename): the base as the hub has it, in two files with an index."""
    def make(rename=lambda key: key):
        folder, weights = tmp_path / "hub", {rename(k): v for k, v in sft.load_file(small / "model.safetensors").items()}
        folder.mkdir()
        for file in small.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copy(file, folder)
        (folder / "LICENSE").write_text("terms")
        names = {k: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(sorted(weights))}
        for name in set(names.values()):
            sft.save_file({k: v for k, v in weights.items() if names[k] == name}, folder / name, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        return folder
    return make


def learned(base, folder, r=8):
    student = sft.load_student(base, nf4=False)
    sft.add_lora(student, r, 2 * r)
    shake(student, 0.02)
    folder.mkdir()
    sft.save_adapter(student, folder)
    return student


def merged(base, adapter, out):
    sft.merge(sft.parse_args(["merge", "--model", str(base), "--adapter", str(adapter), "--out", str(out)]))


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])  # the hub's, and transformers 5's
def test_a_merged_folder_is_the_base_with_other_weights(hub, bf16, mixed, tmp_path, prefix):  # traps 20, 21
    base = hub(lambda key: key.replace("model.", prefix, 1) if key.startswith("model.") else key)
    student, out = learned(base, tmp_path / "adapter"), tmp_path / "out"
    merged(base, tmp_path / "adapter", out)
    assert {f.name for f in out.iterdir()} == {f.name for f in base.iterdir()} | {"meta.json"}
    assert all((out / f.name).read_bytes() == f.read_bytes() for f in base.iterdir() if f.suffix != ".safetensors")
    changed = 0
    for file in base.glob("*.safetensors"):
        a, b = sft.load_file(file), sft.load_file(out / file.name)
        kinds = lambda x: {k: (v.dtype, v.shape) for k, v in x.items()}
        assert kinds(a) == kinds(b) and {v.dtype for v in a.values()} == {torch.bfloat16}
        assert all(torch.equal(a[k], b[k]) for k in a if "visual" in k or "_proj.weight" not in k)
        changed += sum(not torch.equal(a[k], b[k]) for k in a)
    assert changed == 14  # seven linears in two layers
    again, plain = sft.load_student(out, nf4=False), sft.load_student(base, nf4=False)
    rows = [sft.render(again, d)[0] for d in mixed]
    logps = lambda s: sft.reply_logps(s, rows, images_of(s, mixed))[0].detach()
    whole, far = logps(student), (logps(plain) - logps(student)).abs().mean()
    assert (logps(again) - whole).abs().mean() < far / 20 and far > 0.05


def test_merging_an_adapter_of_another_model_is_bad_input(hub, small, base, tmp_path, capsys):  # trap 21
    learned(base, tmp_path / "other")
    folder = hub()
    learned(folder, tmp_path / "part")
    state = sft.load_file(tmp_path / "part/adapter_model.safetensors")
    sft.save_file(dict([*state.items()][2:]), tmp_path / "part/adapter_model.safetensors")  # one layer's pair is missing
    for adapter in ("other", "part", "nowhere"):
        with pytest.raises(SystemExit) as stopped:
            merged(folder, tmp_path / adapter, tmp_path / "out")
        assert stopped.value.code == 2 and adapter in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_merging_into_an_unsound_base_is_bad_input(hub, tmp_path, capsys):
    """Half a download would otherwise be merged, and the scale of FP8 weights be left out."""
    learned(folder := hub(), tmp_path / "adapter")
    second = folder / "model-00002-of-00002.safetensors"
    whole = sft.load_file(second)

    def refused():
        with pytest.raises(SystemExit) as stopped:
            merged(folder, tmp_path / "adapter", tmp_path / "out")
        return stopped.value.code == 2 and str(folder) in capsys.readouterr().err and not (tmp_path / "out").exists()
    sft.save_file({k: v.to(torch.float8_e4m3fn) if "_proj" in k else v for k, v in whole.items()}, second)
    assert refused()
    second.write_bytes(second.read_bytes()[:-9])
    assert refused()
    second.unlink()
    assert refused()
    for file in folder.glob("model*"):
        file.unlink()  # .bin files only
    assert refused()


# ---------------------------------------------------------------- decoding

class Tape(TorchDispatchMode):
    """A CUDA graph on a CPU: what was done is done again with the same memory, and Python is not asked."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.done.append((function, args, kwargs or {}, function(*args, **(kwargs or {}))))
        return self.done[-1][-1]

    def replay(self):
        for function, args, kwargs, out in self.done:
            for then, now in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs))):
                then.copy_(now)


@pytest.mark.parametrize("block", [16, 512])
@pytest.mark.parametrize("weights", ["dense", "base"])
def test_a_step_recorded_once_says_the_same(actor, mixed, weights, block, monkeypatch):
    """What a GPU records and repeats, on a CPU: rows leave, turns are ragged, replies end early, and memory that was
    never written is full of NaN."""
    student, dense = actor
    lm = dense if weights == "dense" else None

    class Dirty(grpo.Cache):
        def __init__(self, *args):
            super().__init__(*args)
            for kv in self.kv:
                kv.fill_(torch.nan)
    monkeypatch.setattr(grpo, "Cache", Dirty)
    monkeypatch.setattr(grpo.FixedStep, "BLOCK", block)
    shapes, real = [], grpo.FixedStep.step

    def step(self):
        shapes.append(tuple(self.mask.shape))
        if self.graph:
            self.graph.replay()
        else:
            with Tape() as self.graph:
                self.said = real(self)
        return [x.clone() for x in self.said]
    monkeypatch.setattr(grpo.FixedStep, "step", step)
    for temperature in ("1.0", "0"):
        flags = ["--temperature", temperature]
        expected = play(student, mixed, *flags, lm=lm)
        talks = grpo.rollout(student, mixed, keys_of(mixed), scripted, grpo_args(*flags), images_of(student, mixed), lm,
                             fixed=True)
        for a, b in zip(talks, expected):
            assert (a.ids, a.turn_id, a.turns) == (b.ids, b.turn_id, b.turns)
            assert a.logps == pytest.approx(b.logps, abs=1e-5)
    assert len({rows for rows, *_ in shapes}) > 1 and all(s % block == 0 or s == 600 for *_, s in shapes)


def test_a_step_is_recorded_again_only_when_rows_leave_or_columns_run_out(student, mixed, monkeypatch):
    made, real = [], grpo.FixedStep.__init__

    def spy(self, student, cache, *rest):
        made.append(len(cache.attend))
        real(self, student, cache, *rest)
    monkeypatch.setattr(grpo.FixedStep, "__init__", spy)
    many = [dialogue(f"m{n}", *["go on."] * 6) for n in range(3)]
    grpo.rollout(student, many, keys_of(many), scripted, grpo_args("--max_new", "3"), {}, fixed=True)
    assert made == [3]  # six turns, one recording
    made.clear()
    grpo.rollout(student, mixed, keys_of(mixed), scripted, grpo_args(), images_of(student, mixed), fixed=True)
    assert made == sorted(set(made), reverse=True) and len(made) > 1


@pytest.mark.parametrize("weights", ["dense", "base"])
def test_what_a_gpu_records_neither_waits_for_the_cpu_nor_reads_from_it(fresh, weights, monkeypatch):
    """The device "meta" for the card: what is there has no value for Python to look at, and nothing from here is let in."""
    class OnTheCard(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            assert all(x.is_meta for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)), function
            return out
    student = fresh(reference=False)
    student.model.to("meta").eval()
    student.allowed = student.allowed.to("meta")
    lm = grpo.dense_copy(student) if weights == "dense" else student.base.model.language_model
    cache = grpo.Cache(lm.config, 3, 64, torch.float32, "meta")
    for temperature in (1.0, 0.0):
        step = grpo.FixedStep(student, cache, lm, temperature, 8)
        with torch.no_grad(), OnTheCard(), monkeypatch.context() as patch:
            patch.setattr(torch, "tensor", None)  # Python's numbers would be copied there, and recorded as they were
            step.step()


def test_decoding_reads_keys_and_values_as_they_lie(actor, mixed, monkeypatch):
    """Grouped-query attention over one new column: sdpa is handed the cache itself, two heads for the queries of four."""
    student, dense = actor
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **more):
        seen.append((query.shape, key.shape, any(key.data_ptr() == kv.data_ptr() for c in caches for kv in c.kv)))
        return real(query, key, value, **more)
    caches, init = [], grpo.Cache.__init__
    monkeypatch.setattr(grpo.Cache, "__init__", lambda self, *args: (caches.append(self), init(self, *args))[1])
    images = images_of(student, mixed)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for fixed in (False, True):
        seen.clear()
        stop = lambda talks: [None] * len(talks)
        grpo.rollout(student, mixed, keys_of(mixed), stop, grpo_args(), images, dense, fixed=fixed)
        decode = seen[dense.config.num_hidden_layers:]  # after the prompt
        assert decode and all(q[1] == k[1] == 2 and q[2] == 2 and in_place for q, k, in_place in decode)


def test_a_card_neither_plans_attention_for_every_length_nor_computes_adapters_at_a_crawl():
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.matmul.allow_tf32


# ---------------------------------------------------------------- memory by arithmetic

class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it, other than known ones, held at one time: what a GPU's allocator counts."""

    def __init__(self, known=()):
        super().__init__()
        self.now, self.most, self.live = 0, 0, {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.live and not t.is_meta:
                self.live[key] = t.untyped_storage().nbytes()
                self.now += self.live[key]
                weakref.finalize(t.untyped_storage(), self.free, key)
        self.most = max(self.most, self.now)
        return out

    def free(self, key):
        self.now -= self.live.pop(key)


@pytest.mark.parametrize("name", ["sft", "update", "rollout"])
def test_planned_memory_is_what_a_step_takes(small, bf16, name):
    row = {"sft": dict(fullsize.SFT, tokens=512, batch=2),
           "update": dict(fullsize.GRPO, prompts=2, group=2, turns=2, user=120, reply=8, columns=290, micro=290),
           "rollout": dict(fullsize.GRPO, prompts=2, group=6, turns=1, user=30, reply=4, columns=52, micro=52,
                           weights="base")}[name]
    with Peak() as peak:
        getattr(fullsize, f"run_{row['kind']}")(row, small, small)
    planned = fullsize.plan("small", row, state=8, at_once=2 ** 20)
    assert ("cache" in planned) == (name == "rollout")
    assert sum(planned.values()) == pytest.approx(peak.most, rel=0.15), planned


def test_planned_memory_of_a_late_prompt(small, bf16):
    """Keys and values repeated for every head: what a prompt costs when much lies behind it."""
    student = sft.load_student(small, nf4=False)
    rows, behind = 64, 600
    cache = grpo.Cache(student.base.config.text_config, rows, behind + 16, torch.bfloat16, "cpu")
    cache.used, cache.attend[:, :behind] = behind, True
    ids = torch.full((rows, 8), 20)
    with torch.no_grad(), Peak([*student.base.parameters(), *cache.kv]) as peak:
        sft.hidden_states(student, ids, ids.expand(3, -1, -1), [], cache.mask(ids > 0), cache)
    row = dict(fullsize.GRPO, prompts=16, group=4, user=0, reply=8, columns=behind + 16, micro=1)
    planned = fullsize.plan("small", row)
    assert planned["activations"] == pytest.approx(peak.most, rel=0.15)


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_planned_weights_are_those_of_the_published_model(size, tok):
    with torch.device("meta"):
        model = Model._from_config(fullsize.config(size, tok), dtype=torch.bfloat16)
    linears, rest = fullsize.shapes(size)
    layers = model.config.text_config.num_hidden_layers
    parts = {"language": lambda n, p: "layers" in n and p.ndim == 2, "projector": lambda n, p: "merger" in n,
             "tower": lambda n, p: "visual" in n, "embeddings": lambda n, p: p.ndim == 2, "biases and norms": lambda n, p: True}
    per = Counter()
    for name, p in model.named_parameters():
        per[next(part for part, has in parts.items() if has(name, p))] += p.numel()
    assert per == {**rest, "language": layers * sum(a * b for a, b in linears)} and per.total() == PUBLISHED[size]
    student = SimpleNamespace(model=model)
    sft.add_lora(student, fullsize.RANK, 64)
    adapter = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    row = fullsize.ROWS["grpo-8k"]
    planned = fullsize.plan(size, row)
    assert planned["adapters"] == 2 * 4 * adapter
    cache = grpo.Cache(model.config.text_config, 40, 8192, torch.bfloat16, "meta")
    assert planned["cache"] == sum(kv.nbytes for kv in cache.kv)


def test_planned_nf4_and_optimiser_bytes_are_bitsandbytes(small):
    student = sft.load_student(small)
    sft.add_lora(student, fullsize.RANK, 64)
    linears, rest = fullsize.shapes("small")
    states = [m.weight.quant_state for m in student.base.modules() if isinstance(m, bnb.nn.Linear4bit)]
    four = sum(m.weight.nbytes for m in student.base.modules() if isinstance(m, bnb.nn.Linear4bit))
    four += sum(t.nbytes for s in states for t in (s.absmax, s.offset, s.state2.absmax))
    planned = fullsize.plan("small", dict(fullsize.SFT, tokens=1), word=4)
    assert planned["weights"] - 4 * sum(rest.values()) == four
    params = [p for p in student.model.parameters() if p.requires_grad]
    optimizer = bnb.optim.PagedAdamW8bit(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    held = sum(t.nbytes for s in optimizer.state.values() for k, t in s.items() if torch.is_tensor(t) and "qmap" not in k)
    assert planned["optimizer"] == pytest.approx(held, rel=0.05)


def test_targets_hold_by_arithmetic():
    total = lambda size, row, **more: sum(fullsize.plan(size, {**fullsize.ROWS[row], **more}).values()) / fullsize.GIB
    assert total("3b", "sft-4k") < 12 and total("7b", "sft-8k") < 24
    assert total("3b", "grpo-8k") < 24 and total("7b", "grpo-8k") < 48


def test_the_whole_script_runs_on_a_cpu(tmp_path, tok, capsys, monkeypatch):
    monkeypatch.setattr(toy, "make_tokenizer", lambda rng: tok)
    for flags in (["--only", "sft-2k", "decode-2"], ["--only", "grpo"], ["--only", "sft-2k"]):
        fullsize.main(fullsize.parse_args(["--size", "tiny", "--out", str(tmp_path), *flags]))
    rows = capsys.readouterr().out.rsplit("| --- |\n", 1)[1].splitlines()
    assert [r.split("|")[1].strip() for r in rows[:3]] == ["tiny sft-2k", "tiny grpo", "tiny decode-2"]  # each once
    log = [json.loads(line) for line in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    assert [r["row"] for r in log] == ["sft-2k", "decode-2", "grpo", "sft-2k"]
    assert log[2]["seconds"].keys() >= {"generate", "tutor", "log-probs", "backward"}
    assert log[2]["mismatch"] < 1e-3
    for size in ("3b", "7b"):
        fullsize.main(fullsize.parse_args(["--size", size, "--plan"]))
    assert "| sft-8k |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="GPU"):
        fullsize.main(fullsize.parse_args(["--size", "3b"]))


# ---------------------------------------------------------------- two processes

def in_processes(work, folder, count=2):
    """Run work(rank) in forked processes that find each other as those of `accelerate launch` do. -> what they return"""
    def child(rank, port):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        accelerate.PartialState._reset_state()
        tempfile.tempdir = str(folder)
        torch.save(work(rank), folder / f"{rank}.pt")
        torch.distributed.destroy_process_group()
        os._exit(0)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [torch.multiprocessing.get_context("fork").Process(target=child, args=(rank, port)) for rank in range(count)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
        p.kill()
    assert [p.exitcode for p in processes] == [0] * count
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


@pytest.mark.parametrize("per_update", [0, 2])
def test_two_processes_learn_what_one_learns(played, tmp_path, per_update):
    """Given the same rollouts: the gradient to 1e-6, the weights after three steps to 1e-5."""
    learner, talks, adv, images = played

    def work(rank):
        if rank is not None:
            sft.join()
        args = grpo_args("--beta", "0.3", "--prompts", "4", "--group", "2", "--prompts_per_update", str(per_update))
        student, stats = learner(), []
        optimizer = sft.adamw(student, 1e-3)
        step, seen, grad = optimizer.step, [], lambda: torch.cat([p.grad.flatten() for p in policy(student)])
        optimizer.step = lambda: (seen.append(grad()), step())
        for _ in range(3):
            stats.append(grpo.update(student, talks, adv, images, args, optimizer))
        return seen, torch.cat([p.detach().flatten() for p in policy(student)]), stats
    one = work(None)
    for seen, weights, stats in in_processes(work, tmp_path):
        assert len(seen) == len(one[0]) == (3 if per_update == 0 else 6)
        close(seen[0], one[0][0], 1e-6)
        close(weights, one[1], 1e-5)
        for a, b in zip(stats, one[2]):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-6)


def test_two_processes_fine_tune_as_one(fresh, mixed, tmp_path):
    def work(rank):
        if rank is not None:
            sft.join()
        args, student = sft.parse_args("--model m --data d --out o".split()), fresh()
        student.model.train()
        loss, tokens = sft.loss_over(student, mixed, args, backward=True)
        sft.over_ranks([], policy(student))
        found = [loss, tokens, gradient(student)]
        student.model.eval()
        return [*found, sft.loss_over(student, mixed[:1], args)[0]]  # fewer dialogues than processes
    one = work(None)
    for loss, tokens, grad, held in in_processes(work, tmp_path):
        assert (loss, tokens, held) == pytest.approx((one[0], one[1], one[3]), rel=1e-6)
        close(grad, one[2], 1e-6)


def test_a_run_of_two_processes_is_a_run_of_one(base, adapter, world, tmp_path, monkeypatch):
    """Whole groups a process, the same noise: the same rollouts. Rank 0 alone logs and saves, and both go on from that."""
    monkeypatch.setattr(judge, "backend", lambda *_: moody)
    start = lambda out, *more: grpo.main(grpo.parse_args(
        f"--model {base} --adapter {adapter} --data {world}/rl.jsonl --tutor toy --out {tmp_path}/{out} --prompts 2 --group 2 "
        "--max_turns 3 --max_new 4 --max_tokens 400 --lr 1e-3 --epochs 0.5 --format_bonus 0 --no-nf4 --save_every 1".split()
        + list(more)))
    start("one")
    in_processes(lambda rank: start("two"), tmp_path)
    shutil.rmtree(tmp_path / "two/step_000002")
    in_processes(lambda rank: start("two", "--resume"), tmp_path)
    logs = [[json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()] for out in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 2
    for a, b in zip(*logs):
        numbers = lambda line: {k: v for k, v in timeless(line).items() if k != "warnings"}
        assert numbers(a) == pytest.approx(numbers(b), rel=1e-3, abs=1e-5) and a["warnings"] == b["warnings"]
    said = [[[turn["assistant"] for turn in json.loads(line)["turns"]] for line in
             (tmp_path / name / "rollouts.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert said[0] == said[1] and len(said[0]) == 8
    a, b = (sft.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    close(torch.cat([b[k].flatten() for k in a]), torch.cat([a[k].flatten() for k in a]), 1e-5)


@pytest.mark.parametrize("loser", [0, 1])
def test_whoever_loses_the_tutor_rank_0_saves(base, adapter, world, tmp_path, monkeypatch, loser):
    def start(rank):
        def ask(requests):
            if rank == loser and ask.calls == 4:  # the first turn of the second step
                raise judge.BackendError("http://tutor/v1: no reply")
            ask.calls += 1
            return moody(requests)
        ask.calls = 0
        judge.backend = lambda *_: ask
        with pytest.raises(SystemExit) as stop:
            grpo.main(grpo.parse_args(
                f"--model {base} --adapter {adapter} --data {world}/rl.jsonl --tutor toy --out {tmp_path}/out --prompts 2 "
                "--group 2 --max_turns 3 --max_new 4 --max_tokens 400 --format_bonus 0 --no-nf4".split()))
        return stop.value.code
    assert in_processes(start, tmp_path) == [1, 1]
    assert (tmp_path / "out/step_000001/adapter_model.safetensors").exists()
    assert len((tmp_path / "out/log.jsonl").read_text().splitlines()) == 1
