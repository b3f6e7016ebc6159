"""sft.py: what the student is, which tokens it reads and learns, and the numbers it learns from."""
import json
import random

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import sft
import synth
import toy
from conftest import HOSTILE, dialogue, naive_logits, naive_logps, shake

CONTROL = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>"]


def policy(student):
    return [p for n, p in student.model.named_parameters() if ".policy." in n]


def gradient(student):
    """All gradients of the policy as one vector; cleared."""
    vector = torch.cat([p.grad.flatten() for p in policy(student)])
    student.model.zero_grad()
    return vector


def close(a, b, rel=1e-6):
    assert (a - b).norm() <= rel * b.norm(), f"relative difference {((a - b).norm() / b.norm()).item():.2e}"


# ---------------------------------------------------------------- loading

def test_nf4_is_the_language_model_and_nothing_else(fresh):  # trap 15
    student = fresh(nf4=True)
    four = [n for n, m in student.base.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert four and all("language_model" in n for n in four)
    dense = [n for n, m in student.base.named_modules() if type(m) is torch.nn.Linear and "lora" not in n]
    assert not any("language_model" in n for n in dense) and any("visual" in n for n in dense) and "lm_head" in dense
    # frozen by hand: embeddings, tower and head keep their precision and learn nothing
    assert {p.dtype for p in student.base.model.visual.parameters()} == {torch.float32}
    assert {n.split(".")[-2] for n, p in student.model.named_parameters() if p.requires_grad} == {"policy"}


def test_lora_is_on_every_linear_of_the_language_model_and_none_of_the_tower(student):  # trap 16
    adapted = {n.split(".lora_A")[0] for n, _ in student.model.named_parameters() if ".lora_A.policy" in n}
    lm = student.base.model.language_model
    assert len(adapted) == 7 * lm.config.num_hidden_layers
    assert not any("visual" in n for n in adapted)
    assert all(m.p == 0 if isinstance(m, torch.nn.Dropout) else True for m in student.model.modules())  # trap 33


def test_image_budget_holds_at_loading(base):  # trap 13
    for pixels, most in ((28 * 56, 2), (56 * 56, 4), (10 ** 9, 16)):
        student = sft.load_student(base, False, max_pixels=pixels)
        height, width = sft.image_grid(student, Image.new("RGB", (4000, 3000)))
        assert 1 <= height * width <= most


def test_a_template_that_does_not_close_a_reply_is_refused(base):
    student = sft.load_student(base, False)
    student.tok.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ValueError, match="im_end"):
        sft.make_student(student.base, student.tok, student.image_processor)


# ---------------------------------------------------------------- adapters

def test_trainable_set_survives_every_switch(fresh):  # trap 18
    student = fresh()
    trainable = lambda: sorted(n for n, p in student.model.named_parameters() if p.requires_grad)
    before = trainable()
    assert before and all(".policy." in n for n in before)
    for name in ("reference", "policy", "reference", "reference", "policy"):
        sft.use_adapter(student, name)
        assert student.model.active_adapters == [name] and trainable() == before
    student.model.add_adapter("other", student.model.peft_config["policy"])  # a third one must not wake up either
    sft.use_adapter(student, "policy")
    assert trainable() == before


@pytest.mark.parametrize("nf4", [False, True])
def test_adapter_round_trip(base, fresh, tmp_path, mixed, nf4):  # trap 21
    student, rows = fresh(nf4), None
    shake(student, 0.03)
    rows = [sft.render(student, d)[0] for d in mixed]
    images = sft.encode_images(student, [p for r in rows for p in r.images])
    logps = lambda s: sft.reply_logps(s, rows, images)[0].detach()
    saved = logps(student)
    sft.save_adapter(student, tmp_path)
    again = sft.load_student(base, nf4)
    plain = logps(again)
    sft.load_adapter(again, tmp_path, "policy")
    assert torch.equal(logps(again), saved) and (plain - saved).abs().max() > 0.1
    assert all("policy" not in k and "visual" not in k for k in sft.load_file(tmp_path / "adapter_model.safetensors"))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize("change", [
    lambda s: {k.replace("layers.0", "layers.9"): v for k, v in s.items()},  # places that the model has not
    lambda s: {k.replace("language_model.", ""): v for k, v in s.items()},  # prefixes of another transformers version
    lambda s: dict(list(s.items())[1:]),  # a weight is missing
])
def test_an_adapter_that_does_not_fit_raises(base, adapter, tmp_path, change):  # trap 21
    state = change(sft.load_file(adapter / "adapter_model.safetensors"))
    sft.save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(ValueError, match="does not fit"):
        sft.load_adapter(sft.load_student(base, False), tmp_path, "policy")


@pytest.mark.parametrize("change", [{"lora_dropout": 0.3}, {"use_dora": True}, {"target_modules": ["q_proj", "v_proj"]},
                                    {"modules_to_save": ["lm_head"]}, {"alpha_pattern": {"q_proj": 4}}, []])
def test_an_adapter_of_another_kind_is_named(base, adapter, tmp_path, change, capsys):  # traps 16, 33
    """peft would load it, and loss, sampling or merging would be wrong."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change if change else change))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="not an adapter of sft.py: .*" + "".join(change)):
        sft.load_adapter(sft.load_student(base, False), tmp_path, "policy")
    with pytest.raises(SystemExit) as stop:
        sft.merge(sft.parse_args(["merge", "--model", str(base), "--adapter", str(tmp_path), "--out", f"{tmp_path}/out"]))
    assert stop.value.code == 2 and "not an adapter of sft.py" in capsys.readouterr().err


def test_an_adapter_of_another_place_and_peft_is_still_ours(base, adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    other = {"peft_version": "0.20.0", "base_model_name_or_path": "elsewhere", "inference_mode": True, "revision": "main"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | other))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    student = sft.load_student(base, False)
    sft.load_adapter(student, tmp_path, "policy")
    assert sum(p.requires_grad for p in student.model.parameters()) == len(sft.load_file(tmp_path / "adapter_model.safetensors"))


def test_saving_an_adapter_asks_no_hub(student, tmp_path, monkeypatch):
    config = student.model.peft_config["policy"]
    monkeypatch.setattr(config, "base_model_name_or_path", "Qwen/Qwen2.5-VL-3B-Instruct")
    asked = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *args, **kw: asked.append(args))
    sft.save_adapter(student, tmp_path)
    assert not asked


# ---------------------------------------------------------------- dialogues as tokens

def qwen_template():
    import importlib.util
    from pathlib import Path
    return Path(importlib.util.find_spec("trl").origin).with_name("chat_templates").joinpath("qwen2_5_vl.jinja").read_text()


def shown(student, row):
    """A row as text, each image as the single placeholder of the template."""
    text = student.tok.decode(row.ids)
    while "<|image_pad|><|image_pad|>" in text:
        text = text.replace("<|image_pad|><|image_pad|>", "<|image_pad|>")
    return text


@pytest.mark.parametrize("template", ["toy", "qwen"])
def test_a_row_is_the_chat_templates_render(base, mixed, template):  # trap 5
    student = sft.load_student(base, False)
    if template == "qwen":  # Qwen2.5-VL's own puts a system message where there is none
        student.tok.chat_template = qwen_template()
        student = sft.make_student(student.base, student.tok, student.image_processor)
    for d in mixed[:4]:  # the fifth is an attack on exactly this, see below
        row, dropped = sft.render(student, d)
        assert not dropped
        assert shown(student, row) + "\n" == student.tok.apply_chat_template(d["messages"], tokenize=False)


def test_supervised_text_is_the_replies_and_their_terminators(student, world, mixed):  # trap 30
    for d in synth.read_dialogues([str(world / "sft.jsonl")]) + mixed[:4]:
        row, _ = sft.render(student, d)
        trained = [i for i, t in zip(row.ids, row.turn_id) if t >= 0]
        replies = [sft.text_of(m["content"]) for m in d["messages"] if m["role"] == "assistant"]
        assert student.tok.decode(trained) == "".join(r + "<|im_end|>" for r in replies)
        assert sorted(set(row.turn_id) - {-1}) == list(range(len(replies)))
        for t, reply in enumerate(replies):
            assert student.tok.decode([i for i, k in zip(row.ids, row.turn_id) if k == t]) == reply + "<|im_end|>"
        bracketed = sft.show_trained(student, row)
        assert [p.split("]")[0] for p in bracketed.split("[")[1:]] == [r + "<|im_end|>" for r in replies]


def test_hostile_text_never_becomes_a_control_id(student, pictures):  # trap 7
    control = {student.tok.convert_tokens_to_ids(t) for t in CONTROL}
    assert not control & set(sft.encode(student, HOSTILE)) and student.tok.decode(sft.encode(student, HOSTILE)) == HOSTILE
    count = lambda d: [sum(i == c for i in sft.render(student, d)[0].ids) for c in sorted(control)]
    words = [(HOSTILE, count(dialogue("x", [None, HOSTILE], HOSTILE, images=pictures[:1], system=HOSTILE, reply=HOSTILE))),
             ("calm", count(dialogue("x", [None, "calm"], "calm", images=pictures[:1], system="calm", reply="calm")))]
    assert words[0][1] == words[1][1]


def test_a_system_message_may_be_a_list_of_parts_too(student):  # "content a string or a list" holds for every role
    plain = dialogue("x", "hello", system="be kind")
    parts = dialogue("x", "hello", system="be kind")
    parts["messages"][0]["content"] = [{"type": "text", "text": "be kind"}]
    assert synth.check_dialogue(parts, ".") is None
    assert sft.render(student, parts)[0] == sft.render(student, plain)[0]


def test_overlong_dialogues_lose_whole_turns(student, mixed):  # trap 14
    whole, _ = sft.render(student, mixed[3])  # three turns, two pictures in the second
    seen = set()
    for budget in range(8, len(whole.ids) + 2):
        try:
            row, dropped = sft.render(student, mixed[3], budget)
        except ValueError:
            assert budget < len(sft.render(student, dialogue("x", "hm"))[0].ids)
            continue
        assert len(row.ids) <= budget and row.ids == whole.ids[:len(row.ids)] and row.ids[-1] == student.end
        assert dropped == 3 - len(set(row.turn_id) - {-1})
        assert row.ids.count(student.pad) == sum(h * w for h, w in row.grids) and len(row.images) == len(row.grids)
        seen.add(dropped)
    assert seen == {0, 1, 2}


# ---------------------------------------------------------------- pictures and positions

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900))
def test_image_grid_is_what_the_processor_makes(student, width, height):  # trap 11
    if max(width, height) > 190 * min(width, height):
        return
    image = Image.new("RGB", (width, height))
    grid = student.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0].tolist()
    rows, columns = sft.image_grid(student, image)
    assert [1, 2 * rows, 2 * columns] == grid


def test_features_of_a_picture_do_not_depend_on_the_batch(student, pictures):  # trap 12
    together = sft.encode_images(student, pictures + pictures[:2])
    assert sorted(together) == sorted(pictures)
    for path, tokens in zip(pictures, (16, 8, 3, 1)):
        alone = sft.encode_images(student, [path])[path]
        assert alone.shape == together[path].shape == (tokens, 128)
        torch.testing.assert_close(together[path], alone, atol=1e-5, rtol=1e-4)
    assert sft.encode_images(student, []) == {}


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1", "LA", "I;16"])
def test_every_kind_of_picture_becomes_rgb(student, tmp_path, mode):  # trap 13
    grey = Image.new("RGB", (56, 56), (90, 90, 90))
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    (Image.new("I;16", (56, 56), 90 * 257) if mode == "I;16" else grey.convert(mode)).save(path)
    assert synth.open_image(path).mode == "RGB" and len(sft.encode_images(student, [str(path)])[str(path)]) == 4


def test_positions_are_the_models_own(student, mixed):
    for d in mixed:
        row, _ = sft.render(student, d)
        ids = torch.tensor([row.ids])
        grid = torch.tensor([[1, 2 * h, 2 * w] for h, w in row.grids]) if row.grids else None
        theirs, _ = student.base.model.get_rope_index(ids, (ids == student.pad).int(), image_grid_thw=grid)
        ours, after = sft.mrope_positions(student, row.ids, row.grids)
        assert torch.equal(torch.tensor(ours).T, theirs[:, 0]) and after == theirs.max() + 1
        # in two pieces, as a rollout counts: the seam changes nothing
        cut = row.ids.index(student.end) + 1
        n = sum(i == student.seams["image"][0][0] for i in row.ids[:cut])
        head, middle = sft.mrope_positions(student, row.ids[:cut], row.grids[:n])
        tail, _ = sft.mrope_positions(student, row.ids[cut:], row.grids[n:], middle)
        assert head + tail == ours


# ---------------------------------------------------------------- the arithmetic

def batch_of(student, mixed):
    rows = [sft.render(student, d)[0] for d in mixed]
    return rows, sft.encode_images(student, [p for r in rows for p in r.images])


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_reply_logps_equal_a_naive_forward(student, mixed, temperature):  # traps 3, 9, 12, 28
    rows, images = batch_of(student, mixed)
    with torch.no_grad():
        ours, entropy = sft.reply_logps(student, rows, images, temperature)
        naive = torch.stack([lp for row in rows for lp in naive_logps(student, row, temperature)])
        torch.testing.assert_close(ours, naive, atol=1e-4, rtol=0)
        logits = naive_logits(student, rows[0].ids, rows[0].images, temperature)[torch.tensor(rows[0].turn_id).roll(-1) >= 0]
        expected = torch.distributions.Categorical(logits=logits[:, student.allowed]).entropy()
        torch.testing.assert_close(entropy[:len(expected)], expected, atol=1e-4, rtol=0)


def test_loss_depends_on_replies_alone(student, mixed):  # trap 29: no context token is a target
    rows, images = batch_of(student, mixed)
    seen, real = [], sft.policy_logits

    def spy(student, hidden, temperature=1.0):
        seen.append(len(hidden))
        return real(student, hidden, temperature)
    sft.policy_logits = spy
    try:
        sft.reply_logps(student, rows, images)
    finally:
        sft.policy_logits = real
    assert sum(seen) == sum(t >= 0 for r in rows for t in r.turn_id)  # context costs no logits either


@pytest.mark.parametrize("nf4", [False, True])
def test_sft_loss_and_gradient_against_a_naive_loop_and_in_any_split(fresh, mixed, nf4):  # trap 31
    student = fresh(nf4)
    student.base.activation_checkpointing_enable({"use_reentrant": False})
    student.model.train()
    args = sft.parse_args("--model m --data d --out o".split())
    mixed = mixed * 2  # equal lengths too, so that rows do share a forward
    tokens = [lp for d in mixed for lp in naive_logps(student, sft.render(student, d)[0])]
    loss = -sum(tokens) / len(tokens)
    loss.backward()
    naive = gradient(student)
    args.micro_tokens = 10 ** 6
    whole, n = sft.loss_over(student, mixed, args, backward=True)
    at_once = gradient(student)
    assert n == len(tokens) and whole == pytest.approx(loss.item(), rel=1e-5)
    close(at_once, naive, 1e-5)
    for args.micro_tokens in (1, 300):
        value, _ = sft.loss_over(student, mixed, args, backward=True)
        assert value == pytest.approx(whole, rel=1e-6)
        close(gradient(student), at_once, 2e-6)
    assert sft.loss_over(student, mixed, args)[0] == pytest.approx(whole, rel=1e-6)
    assert all(p.grad is None or not p.grad.any() for p in student.model.parameters())


def test_chunked_logps_equal_naive_ones_with_gradients(student):  # trap 22
    torch.manual_seed(1)
    hidden, weight = torch.randn(23, 128), torch.randn(23)
    targets = student.allowed.nonzero()[torch.randint(int(student.allowed.sum()), (23,)), 0]

    def run(f):
        h = hidden.clone().requires_grad_()
        logps = f(h)
        (logps * weight).sum().backward()
        return logps.detach(), h.grad
    naive = run(lambda h: (student.base.lm_head(h) / 0.7).masked_fill(~student.allowed, -torch.inf)
                .log_softmax(-1)[range(23), targets])
    for chunk in (1, 4, 23, 2048):
        ours = run(lambda h: sft.token_logps(student, h, targets, 0.7, chunk)[0])
        torch.testing.assert_close(ours, naive, atol=1e-6, rtol=1e-5)
    empty, _ = sft.token_logps(student, hidden[:0].requires_grad_(), targets[:0])
    assert len(empty) == 0


def test_no_logits_are_kept_for_the_backward_pass(student):  # trap 22: a bare loop would bound nothing
    hidden, kept = torch.randn(64, 128, requires_grad=True), []
    weight = student.base.lm_head.weight
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        sft.token_logps(student, hidden, torch.full((64,), student.end), chunk=8)
    assert not [t.shape for t in kept if t.shape[-1] == len(weight) and t.data_ptr() != weight.data_ptr()]


def test_training_goes_on_after_an_evaluation(fresh, mixed):
    """bitsandbytes repacks NF4 weights at the first forward without gradients in eval mode, for a kernel that has no
    backward (on CPUs with AVX512-BF16)."""
    student, args = fresh(nf4=True), sft.parse_args("--model m --data d --out o".split())
    student.model.train()
    sft.loss_over(student, mixed, args, backward=True)
    before = gradient(student)
    student.model.eval()
    with torch.no_grad():
        sft.loss_over(student, mixed, args)
        student.base(input_ids=torch.tensor([[10, 11, 12]]))
    student.model.train()
    sft.loss_over(student, mixed, args, backward=True)
    assert before.norm() > 0 and torch.equal(gradient(student), before)


def test_micro_batches_hold_the_budget_and_everything():
    rng = random.Random(0)
    rows = [sft.Row(ids=[0] * rng.randint(1, 200)) for _ in range(70)]
    for budget in (1, 150, 1000, 10 ** 6):
        batches = sft.micro_batches(rows, budget)
        assert sorted(i for b in batches for i in b) == list(range(70))
        assert all(len(b) == 1 or len(b) * max(len(rows[i].ids) for i in b) <= budget for b in batches)
    sizes = [len(b) * max(len(rows[i].ids) for i in b) for b in sft.micro_batches(rows, 2000)]
    assert sum(sizes) < 1.3 * sum(len(r.ids) for r in rows)  # sorted by length: little padding


def test_orders_and_rates():
    orders = [[i for b in sft.epoch_order(11, 4, 3, e) for i in b] for e in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1] and all(sorted(o) == list(range(11)) for o in orders)
    rates = [sft.rate(i, 100, 0.1) for i in range(100)]
    assert rates[9] == rates[10] == max(rates) == 1 and rates[0] == 0.1 and 0 <= rates[-1] < 1e-3
    assert sft.rate(0, 1, 0.1) > 0  # a run of one step trains


# ---------------------------------------------------------------- the script

def run(base, data, out, *more):
    sft.main(sft.parse_args(["--model", str(base), "--data", str(data), "--out", str(out), "--lora_r", "4",
                             "--lr", "1e-2", "--batch", "8", "--held_out", "0.2", *more]))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_learns_and_repeats_itself(base, world, tmp_path):
    log = run(base, world / "sft.jsonl", tmp_path / "a", "--epochs", "3", "--eval_every", "4", "--no-nf4")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and "held_out" in log[3]
    assert json.loads((tmp_path / "a/meta.json").read_text())["step"] == len(log)
    again = run(base, world / "sft.jsonl", tmp_path / "b", "--epochs", "3", "--eval_every", "4", "--no-nf4")
    assert [l["loss"] for l in log] == [l["loss"] for l in again]
    a, b = (sft.load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(SystemExit) as stopped:  # no run is lost to another
        run(base, world / "sft.jsonl", tmp_path / "a")
    assert stopped.value.code == 2


def test_padding_stays_under_five_percent(base, world, tmp_path, monkeypatch):
    cells, real = [], sft.hidden_states
    monkeypatch.setattr(sft, "hidden_states", lambda student, ids, *rest: (cells.append(ids.numel()), real(student, ids, *rest))[1])
    args = sft.parse_args(["--model", str(base), "--data", str(world / "sft.jsonl"), "--out", str(tmp_path / "a"),
                           "--held_out", "0", "--epochs", "1", "--no-checkpointing"])
    sft.main(args)
    student = sft.load_student(base, False)
    tokens = sum(len(sft.render(student, d)[0].ids) for d in synth.read_dialogues(args.data))
    assert tokens > 0.95 * sum(cells), f"padding {1 - tokens / sum(cells):.1%}"


def refused(capsys, *args):
    """The script must stop with exit code 2 and a word about it. -> what it said"""
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_dialogue_without_a_reply_is_bad_input_for_sft(base, world, tmp_path, capsys):
    record = json.loads((world / "sft.jsonl").read_text().splitlines()[0])
    record |= {"images": [], "messages": [{"role": "user", "content": "only a question"}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    assert record["id"] in refused(capsys, base, tmp_path / "x.jsonl", tmp_path / "out")


def test_a_model_that_is_not_there_is_bad_input(world, tmp_path, capsys):
    assert "nowhere" in refused(capsys, tmp_path / "nowhere", world / "sft.jsonl", tmp_path / "out")


def test_a_first_turn_that_does_not_fit_is_bad_input_or_skipped(base, world, tmp_path, capsys):  # trap 14
    long = dialogue("long", "name two moves. " * 200)
    rows = [json.loads(l) for l in (world / "sft.jsonl").read_text().splitlines()]
    for r in rows:  # text alone, so that the file may lie here
        r |= {"images": [], "messages": [{**m, "content": sft.text_of(m["content"])} for m in r["messages"]]}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [long] + rows))
    assert "long" in refused(capsys, base, tmp_path / "x.jsonl", tmp_path / "a", "--max_tokens", "400")
    assert run(base, tmp_path / "x.jsonl", tmp_path / "b", "--max_tokens", "400", "--skip_bad", "--epochs", "1")
