"""grpo.py: rollouts are token-exact, and the update is the loss that its header writes down."""
import json
import random

import numpy as np
import pytest
import torch

import grpo
import judge
import sft
import synth
import toy
from conftest import HOSTILE, dialogue, grpo_args, naive_logits, naive_logps, scripted, shake, timeless
from test_student import CONTROL, close, gradient, policy, shown


def images_of(student, dialogues):
    return sft.encode_images(student, [p for d in dialogues for p in d["images"]])


def keys_of(dialogues, step=0):
    return [(0, step, d["id"], n) for n, d in enumerate(dialogues)]


def play(student, dialogues, *more, lm=None, keys=None, respond=scripted):
    return grpo.rollout(student, dialogues, keys or keys_of(dialogues), respond, grpo_args(*more),
                        images_of(student, dialogues), lm)


def lively(student):
    """Let replies end by themselves now and then: a bias on <|im_end|>."""
    bias = torch.zeros(len(student.allowed))
    bias[student.end] = 5.0
    student.base.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return student


@pytest.fixture(scope="module", params=[False, True], ids=["fp32", "nf4"])
def actor(request, fresh):
    """A student whose policy has left its reference, and the dense copy to sample from."""
    student = lively(fresh(request.param))
    shake(student, 0.03, seed=5)
    student.base.activation_checkpointing_enable({"use_reentrant": False})
    dense = grpo.dense_copy(student)
    grpo.fold(student, dense)
    return student, dense


# ---------------------------------------------------------------- tokens

def test_trained_tokens_are_exactly_the_sampled_ones(actor, mixed, monkeypatch):  # traps 4, 5, 8
    student, _ = actor
    student.model.train()
    sampled, real, before = [], grpo.sample, {}
    monkeypatch.setattr(grpo, "sample", lambda *a: (sampled.append(real(*a)), sampled[-1])[1])

    def watch(talks):
        for t in talks:  # what was there stays: turn t is a prefix of turn t + 1
            old = before.get(t.key, ([], [], []))
            assert (t.ids[:len(old[0])], t.turn_id[:len(old[1])], t.logps[:len(old[2])]) == old
            before[t.key] = list(t.ids), list(t.turn_id), list(t.logps)
        return scripted(talks)
    talks = play(student, mixed, respond=watch)
    assert len({len(t.turns) for t in talks}) > 2
    assert {turn["truncated"] for t in talks for turn in t.turns} == {True, False}
    for t, d in zip(talks, mixed):
        alone = []
        monkeypatch.setattr(grpo, "sample", lambda *a: (alone.append(real(*a).item()), torch.tensor(alone[-1:]))[1])
        play(student, [d], keys=[t.key])
        trained = [i for i, turn in zip(t.ids, t.turn_id) if turn >= 0]
        assert trained == alone and len(t.logps) == len(trained)  # a row alone samples exactly what is trained on
        for n, turn in enumerate(t.turns):
            said = [i for i, k in zip(t.ids, t.turn_id) if k == n]
            assert turn["truncated"] == (said[-1] != student.end) and student.end not in said[:-1]
            assert len(said) == 6 if turn["truncated"] else len(said) <= 6
            assert turn["assistant"] == student.tok.decode(said).removesuffix("<|im_end|>")
    monkeypatch.setattr(grpo, "sample", real)
    for t, d in zip(talks[:4], mixed):  # truncated or not, the row is the template's render of what was said
        system = [m for m in d["messages"] if m["role"] == "system"]
        users = [m for m in d["messages"] if m["role"] == "user"]
        said = [{"role": "assistant", "content": turn["assistant"]} for turn in t.turns]
        chat = system + [m for pair in zip(users, said) for m in pair]
        assert shown(student, t).removesuffix("<|im_end|>") + "<|im_end|>\n" == \
            student.tok.apply_chat_template(chat, tokenize=False)


def test_an_uncommon_split_of_words_is_kept(student, mixed, monkeypatch):  # trap 4
    letters = [sft.encode(student, c)[0] for c in "how"] + [student.end]
    assert sft.encode(student, "how") != letters[:3]  # encoding again would change the ids
    step = iter(letters * 9)
    monkeypatch.setattr(grpo, "sample", lambda logits, *rest: torch.full((len(logits),), next(step)))
    talk, = play(student, mixed[1:2])
    for n in range(4):
        assert [i for i, k in zip(talk.ids, talk.turn_id) if k == n] == letters
    assert [t["assistant"] for t in talk.turns] == ["how"] * 4


def test_truncated_replies_are_closed_outside_the_loss(student, mixed):  # trap 8
    for talk in play(student, mixed, "--max_new", "3"):
        assert all(t["truncated"] for t in talk.turns) and len(talk.logps) == 3 * len(talk.turns)
        ends = [k for i, k in zip(talk.ids, talk.turn_id) if i == student.end]
        assert set(ends) == {-1} and talk.ids[-1] == student.end
        assert sum(i == student.seams["system"][0] for i in talk.ids) == \
            2 * len(talk.turns) + (talk.dialogue["messages"][0]["role"] == "system")


def test_hostile_turns_of_tutor_and_user_forge_nothing(student, mixed):  # trap 7
    count = lambda talk: [sum(i == student.tok.convert_tokens_to_ids(c) for i in talk.ids) for c in CONTROL]

    def saying(text):
        return lambda talks: [(text, [], None) if len(t.turns) < 3 else None for t in talks]
    hostile, calm = dialogue("x", HOSTILE, system=HOSTILE), dialogue("x", "calm", system="calm")
    a, = play(student, [hostile], "--max_new", "2", respond=saying(HOSTILE))
    b, = play(student, [calm], "--max_new", "2", respond=saying("calm"))
    assert count(a) == count(b) and a.turns[1]["user"] == HOSTILE


def test_control_ids_are_never_sampled(fresh, mixed):  # trap 6
    student = fresh()
    forbidden = [i for t, i in student.tok.get_vocab().items() if t in toy.SPECIAL and t != "<|im_end|>"]
    forbidden += range(len(student.tok), len(student.allowed))  # rows of the embedding that are no token
    assert len(forbidden) > 7 and not student.allowed[forbidden].any()
    bias = torch.zeros(len(student.allowed))
    bias[forbidden] = 50.0
    student.base.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    for temperature in ("0", "1.0"):
        talks = play(student, mixed, "--temperature", temperature)
        assert not {i for t in talks for i, k in zip(t.ids, t.turn_id) if k >= 0} & set(forbidden)
        assert np.isfinite([p for t in talks for p in t.logps]).all()
    images = images_of(student, mixed)  # and the log-prob pass knows the same distribution
    logps, entropy = sft.reply_logps(student, talks, images)
    assert torch.isfinite(logps).all() and torch.isfinite(entropy).all()
    torch.testing.assert_close(logps.detach(), torch.tensor([p for t in talks for p in t.logps]), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- sampling

def test_rollouts_of_one_prompt_differ_under_a_poisoned_generation_config(fresh, mixed):  # trap 1
    student = fresh()
    for key, value in dict(top_k=1, top_p=0.01, temperature=0.01, repetition_penalty=9.0).items():
        setattr(student.base.generation_config, key, value)
    talks = play(student, [mixed[0]] * 5)
    assert len({tuple(t.ids) for t in talks}) == 5
    again = play(student, [mixed[0]] * 5, keys=keys_of([mixed[0]] * 5, step=1))
    assert not {tuple(t.ids) for t in talks} & {tuple(t.ids) for t in again}  # another step, other samples


@pytest.mark.parametrize("temperature", ["0", "1.0"])
def test_a_row_does_not_depend_on_its_company(actor, mixed, temperature):  # trap 9, and keyed noise
    student, dense = actor
    first = {t.key: t for t in play(student, mixed, "--temperature", temperature, lm=dense)}
    keys = keys_of(mixed)
    order = [3, 0, 4, 2, 1]
    for part in (order, order[:2], *([i] for i in range(5))):
        for t in play(student, [mixed[i] for i in part], "--temperature", temperature, lm=dense,
                      keys=[keys[i] for i in part]):
            assert (t.ids, t.turn_id) == (first[t.key].ids, first[t.key].turn_id)
            assert t.logps == pytest.approx(first[t.key].logps, abs=1e-4)


def test_noise_is_a_function_of_its_key_alone():
    a = grpo.noise((0, 1, "x", 2), 1, 8)
    assert (a == grpo.noise((0, 1, "x", 2), 1, 8)).all() and (a[:4] == grpo.noise((0, 1, "x", 2), 1, 4)).all()
    others = [((1, 1, "x", 2), 1), ((0, 2, "x", 2), 1), ((0, 1, "y", 2), 1), ((0, 1, "x", 3), 1), ((0, 1, "x", 2), 2)]
    assert not any((a == grpo.noise(k, t, 8)).any() for k, t in others)
    many = np.concatenate([grpo.noise((0, i, "x", 0), 0, 50) for i in range(200)])
    assert abs(many.mean() - .5) < .01 and abs(many.var() - 1 / 12) < .003


def test_sampler_draws_from_the_softmax_and_never_where_there_is_nothing():
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf, 2.0, -torch.inf])
    u = torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1]
    u[-1] = 1 - 2 ** -53
    share = torch.bincount(grpo.sample(logits.expand(len(u), -1), u, 1.0), minlength=6) / len(u)
    torch.testing.assert_close(share, logits.softmax(-1), atol=2e-4, rtol=0)
    assert share[[0, 3, 5]].sum() == 0
    assert grpo.sample(logits[None], u[:1], 0) == 4


# ---------------------------------------------------------------- log-probabilities

@pytest.mark.parametrize("temperature", ["0.7", "1.0", "1.3"])
@pytest.mark.parametrize("weights", ["dense", "base"])
def test_rollout_logps_equal_training_logps(actor, mixed, temperature, weights):  # traps 3, 10, 28, 34
    student, dense = actor
    student.model.train()
    talks = play(student, mixed, "--temperature", temperature, lm=dense if weights == "dense" else None)
    sampled = torch.tensor([p for t in talks for p in t.logps])
    ours, _ = sft.reply_logps(student, talks, images_of(student, mixed), float(temperature))
    torch.testing.assert_close(sampled, ours.detach(), atol=1e-4, rtol=0)
    with torch.no_grad():
        naive = torch.stack([lp for t in talks for lp in naive_logps(student, t, float(temperature))])
    torch.testing.assert_close(sampled, naive, atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", ["dense", "base"])
def test_greedy_rollout_equals_a_fresh_forward_per_turn(actor, mixed, weights):  # traps 2, 9, 10
    student, dense = actor
    student.model.train()  # checkpointing is on: the rollout must see to eval mode itself
    talks = play(student, mixed, "--temperature", "0", lm=dense if weights == "dense" else None)
    assert not student.model.training and [len(t.turns) for t in talks] == [2, 4, 2, 3, 2]
    for t in talks:
        for n in range(len(t.turns)):
            end = len(t.ids) - t.turn_id[::-1].index(n)  # one behind the last token of turn n
            count = t.turn_id.count(n)
            pictures = sum(i == student.seams["image"][0][0] for i in t.ids[:end])
            with torch.no_grad():
                logits = naive_logits(student, t.ids[:end], t.images[:pictures])[end - count - 1:end - 1]
            picked = logits.gather(-1, torch.tensor(t.ids[end - count:end])[:, None])[:, 0]
            assert (picked >= logits.max(-1).values - 1e-4).all()


def test_fold_is_the_adapter_and_adds_up_no_rounding(actor):  # trap 34
    student, dense = actor
    once = [p.clone() for p in dense.parameters()]
    grpo.fold(student, dense)
    assert all(torch.equal(a, b) for a, b in zip(once, dense.parameters()))
    name = "layers.1.mlp.down_proj"
    source, x = student.base.model.language_model.get_submodule(name), torch.randn(5, 256)
    torch.testing.assert_close(dense.get_submodule(name)(x), source(x), atol=1e-5, rtol=1e-4)
    assert not any(p.requires_grad for n, p in dense.named_parameters() if "proj" in n)
    norm, x = student.base.model.language_model.norm, torch.randn(5, 1, len(student.base.model.language_model.norm.weight))
    assert torch.equal(dense.norm(x), norm(x)) and dense.norm.weight is norm.weight  # one kernel, the same bits


def test_a_turn_that_does_not_fit_the_cache_is_left_out(student, mixed):  # trap 14
    whole = play(student, [mixed[1]])[0]
    cut, = play(student, [mixed[1]], "--max_tokens", str(len(whole.ids) - 10))
    assert 0 < len(cut.turns) < 4 and cut.turns == whole.turns[:len(cut.turns)]
    assert cut.ids == whole.ids[:len(cut.ids)] and max(cut.turn_id) == len(cut.turns) - 1
    assert cut.ids[-1] == student.end  # no question without a reply at the end of what is trained on


def test_a_picture_of_a_turn_that_was_left_out_goes_too(student, mixed):  # trap 14
    talk, = play(student, [mixed[3]], "--max_tokens", "30")  # its second turn brings two pictures
    assert len(talk.turns) == 1 and not talk.images and not talk.grids and student.pad not in talk.ids
    logps, _ = sft.reply_logps(student, [talk, *play(student, mixed[:1])], images_of(student, mixed))
    torch.testing.assert_close(logps[:len(talk.logps)].detach(), torch.tensor(talk.logps), atol=1e-4, rtol=0)


def test_one_endless_turn_does_not_end_the_others_dialogues(student, mixed):  # trap 14
    long = dialogue("x", "hello", "name two moves. " * 300, "never asked")
    talks = play(student, [mixed[1], long, mixed[3]])
    assert [len(t.turns) for t in talks] == [4, 1, 3]
    others = play(student, [mixed[1], mixed[3]], keys=[talks[0].key, talks[2].key])
    assert [t.ids for t in others] == [talks[0].ids, talks[2].ids]


def test_a_base_without_adapters_can_be_sampled_from_a_dense_copy(base, mixed):
    student = sft.load_student(base, nf4=True)
    dense = grpo.dense_copy(student)
    grpo.fold(student, dense)
    talks = play(student, mixed, lm=dense)
    with torch.no_grad():
        naive = torch.stack([lp for t in talks for lp in naive_logps(student, t)])
    torch.testing.assert_close(torch.tensor([p for t in talks for p in t.logps]), naive, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- the update

class Recorder:
    """An optimiser that steps by SGD and keeps every gradient it was given."""

    def __init__(self, student, lr):
        self.params, self.lr, self.seen = policy(student), lr, []
        self.param_groups = [{"params": self.params}]

    def step(self):
        self.seen.append(torch.cat([p.grad.flatten() for p in self.params]))
        with torch.no_grad():
            for p in self.params:
                p -= self.lr * p.grad

    def zero_grad(self):
        for p in self.params:
            p.grad = None


@pytest.fixture(scope="module")
def played(fresh, mixed):
    """Four groups of two: rollouts, advantages per turn (the third group is dead), images, and how to make the same
    learner again: a policy away from its reference."""
    def learner():
        student = lively(fresh())
        shake(student, 0.02, seed=7)
        return student
    student = learner()
    dialogues = [d for d in mixed[:4] for _ in range(2)]
    talks = play(student, dialogues)
    torch.manual_seed(3)
    adv = torch.randn(8, 4).numpy()
    adv[4:6] = 0
    return learner, talks, adv, images_of(student, mixed)


def naive_update(student, talks, adv, beta, clip, old=None, temperature=1.0):
    """The header's loss, token by token in Python; gradients are left in the policy. -> loss, mean k3, share clipped"""
    total, kl, clipped, n = 0.0, 0.0, 0, 0
    for i, talk in enumerate(talks):
        sft.use_adapter(student, "reference")
        with torch.no_grad():
            reference = naive_logps(student, talk, temperature)
        sft.use_adapter(student, "policy")
        logps = naive_logps(student, talk, temperature)
        turns = [t for t in talk.turn_id if t >= 0]
        for j, (turn, lp, ref) in enumerate(zip(turns, logps, reference)):
            ratio = torch.exp(lp - (lp.detach() if old is None else old[i][j]))
            a = float(adv[i][turn])
            held = min(max(ratio.item(), 1 - clip), 1 + clip)
            surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
            d = ref - lp
            k3 = torch.exp(d) - d - 1
            total, kl, n = total - surrogate + beta * k3, kl + k3.item(), n + 1
            clipped += held != ratio.item()
    (total / n).backward()
    return (total / n).item(), kl / n, clipped / n


def clipped_norm(vector):
    return vector / max(1.0, vector.norm().item() + 1e-6)


def test_update_against_a_naive_loop(played):  # traps 24, 31, 33
    learner, talks, adv, images = played
    student, args = learner(), grpo_args("--beta", "0.3", "--prompts", "4", "--group", "2")
    live = [n for n in range(8) if n not in (4, 5)]
    loss, kl, _ = naive_update(student, [talks[n] for n in live], adv[live], 0.3, 0.2)
    naive = gradient(student)
    for tokens in (1, 200, 10 ** 6):
        args.micro_tokens = tokens
        optimizer = Recorder(student, 0.0)
        stats = grpo.update(student, talks, adv, images, args, optimizer)
        assert len(optimizer.seen) == 1 and kl > 1e-3
        close(optimizer.seen[0], clipped_norm(naive), 1e-5)
        assert stats["loss"] == pytest.approx(loss, abs=1e-5) and stats["kl"] == pytest.approx(kl, rel=1e-4)
        assert stats["grad_norm"] == pytest.approx(naive.norm().item(), rel=1e-4)
        assert stats["clip"] == 0 and stats["mismatch"] < 1e-4  # on policy: the ratio is exactly 1


def test_gradient_does_not_depend_on_micro_batches_nor_on_dead_groups(played):  # traps 24, 31
    learner, talks, adv, images = played
    student, seen = learner(), []
    for tokens, rows in ((10 ** 6, range(8)), (1, range(8)), (150, range(8)), (10 ** 6, (0, 1, 2, 3, 6, 7))):
        optimizer = Recorder(student, 0.0)
        args = grpo_args("--micro_tokens", str(tokens), "--prompts", str(len(rows) // 2), "--group", "2")
        grpo.update(student, [talks[n] for n in rows], adv[list(rows)], images, args, optimizer)
        seen.append(optimizer.seen[0])
    for other in seen[1:]:
        close(other, seen[0], 2e-6)
    optimizer = Recorder(student, 0.0)
    stats = grpo.update(student, talks[4:6], adv[4:6], images, args, optimizer)
    assert optimizer.seen == [] and stats["loss"] == 0  # nothing but dead groups: nothing happens


def test_several_updates_clip_against_the_policy_that_sampled(played):
    learner, talks, adv, images = played
    ours, naive, lr = learner(), learner(), 3.0
    optimizer = Recorder(ours, lr)
    args = grpo_args("--beta", "0.3", "--prompts", "4", "--group", "2", "--prompts_per_update", "1")
    stats = grpo.update(ours, talks, adv, images, args, optimizer)
    with torch.no_grad():
        old = [[lp.clone() for lp in naive_logps(naive, t)] for t in talks]
    shares = []
    for step, rows in enumerate(([0, 1], [2, 3], [6, 7])):  # a group each; the dead one makes no step
        *_, share = naive_update(naive, [talks[n] for n in rows], adv[rows], 0.3, 0.2, [old[n] for n in rows])
        expected = clipped_norm(gradient(naive))
        close(optimizer.seen[step], expected, 1e-4)
        shares.append(share)
        with torch.no_grad():
            at = 0
            for p in policy(naive):
                p -= lr * expected[at:at + p.numel()].view_as(p)
                at += p.numel()
    assert len(optimizer.seen) == 3 and shares[0] == 0 < shares[2] and stats["clip"] > 0


def test_policy_loss_by_hand():  # trap 32
    x = lambda *v: torch.tensor(v, requires_grad=True)
    logps, old = x(-1.0, -1.0, -1.0, -1.0), torch.tensor([-1.5, -1.5, -0.5, -0.5])  # ratios e^.5 and e^-.5
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, k3, clipped = grpo.policy_loss(logps, old, logps.detach(), adv, 0.1, 0.2)
    up, down = np.exp(.5), np.exp(-.5)
    assert loss.tolist() == pytest.approx([-1.2, up, -down, .8]) and clipped.tolist() == [1, 1, 1, 1]
    assert k3.tolist() == [0, 0, 0, 0]
    loss.sum().backward()
    assert logps.grad.tolist() == pytest.approx([0, up, -down, 0])  # what is clipped on the good side gets no push
    for far in (-120.0, 120.0):
        logps = x(far, -1.0)
        for old, ref in (([0.0, -1.0], [0.0, -1.0]), ([far, -1.0], [0.0, -1.0])):
            loss, k3, _ = grpo.policy_loss(logps, torch.tensor(old), torch.tensor(ref), torch.ones(2), 0.1, 0.2)
            loss.sum().backward()
            assert torch.isfinite(loss).all() and torch.isfinite(k3).all() and torch.isfinite(logps.grad).all()


@pytest.mark.parametrize("nf4", [False, True])
def test_kl_is_zero_at_step_0_and_the_reference_stays(fresh, adapter, base, mixed, nf4):  # trap 17
    student, args = fresh(nf4), grpo_args("--prompts", "5", "--group", "1", "--beta", "0.1", "--micro_tokens", "300")
    student.base.activation_checkpointing_enable({"use_reentrant": False})
    images, talks = images_of(student, mixed), play(student, mixed)
    reference = lambda: (sft.use_adapter(student, "reference"),
                         sft.reply_logps(student, talks, images)[0].detach(), sft.use_adapter(student, "policy"))[1]
    before, trainable = reference(), [n for n, p in student.model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for p in student.model.parameters() if p.requires_grad], lr=1e-2)
    stats = grpo.update(student, talks, np.ones((5, 4)), images, args, optimizer)
    assert stats["kl"] == 0 and stats["clip"] == 0
    assert grpo.update(student, talks, np.ones((5, 4)), images, args, optimizer)["kl"] > 1e-4
    assert [n for n, p in student.model.named_parameters() if p.requires_grad] == trainable
    assert torch.equal(reference(), before)  # still the SFT adapter ..
    only = sft.load_student(base, nf4)
    plain = sft.reply_logps(only, talks, images)[0]
    sft.load_adapter(only, adapter, "policy")
    assert torch.equal(sft.reply_logps(only, talks, images)[0], before) and (plain - before).abs().max() > 0.1  # .. not the base


# ---------------------------------------------------------------- the tutor's turn

def test_tutor_turn_scores_counts_and_falls_back(student, mixed, monkeypatch):  # traps 25, 35, 38
    talks = play(student, mixed[:3], respond=lambda talks: [None] * len(talks))
    monkeypatch.setattr(grpo, "image_png", lambda path: b"png")
    good = {"scores": {"safety": 10, "usefulness": 4, "faithfulness": 1}, "strategy": "deepen", "next_turn": "more?"}
    sent = []

    def ask(requests):
        sent.append(requests)
        replies = {0: json.dumps({**good, "diagnosis": "x"}), 1: "I cannot help with that.", 2: json.dumps({**good, "next_turn": ""})}
        return [replies[[t.turns[0]["user"] for t in talks].index(json.loads(r["text"].split(judge.REPAIR)[0])["dialogue"][0]["user"])]
                for r in requests]
    for t in talks:
        t.turns[0]["assistant"] = "<thinking>a</thinking><answer>b</answer>"
    said = grpo.tutor_turn(ask, grpo_args("--weights", "0.6", "0.3", "0.1"))(talks)
    assert len(sent) == 2 and [len(s) for s in sent] == [3, 1]  # one batched call, one repair
    assert said[0] == ("more?", [], "deepen")
    assert said[1] == (*synth.user_turns(mixed[1])[1], "scripted") and said[2] == (*synth.user_turns(mixed[2])[1], "scripted")
    assert talks[0].turns[0]["reward"] == pytest.approx(0.6 * 1 + 0.3 * 3 / 9 + 0)
    assert talks[1].turns[0]["reward"] is None and talks[1].turns[0]["raw"] == "I cannot help with that."
    late = play(student, [mixed[3]], respond=lambda talks: [None] * len(talks))  # the second turn brings pictures
    late[0].turns[0]["assistant"] = "x"
    said = grpo.tutor_turn(lambda rs: [json.dumps(good)] * len(rs), grpo_args())(late)
    assert said[0][1] == mixed[3]["images"] and late[0].turns[0]["reward"] == 0  # ungated format: no reward


def test_every_step_has_its_share_of_benign_dialogues():  # trap 40
    data = [{"id": i, "kind": "benign" if i < 40 else "red_team"} for i in range(80)]
    order = grpo.prompt_order(data, 0, 0)
    assert sorted(d["id"] for d in order) == list(range(80)) and order == grpo.prompt_order(data, 0, 0)
    assert order != grpo.prompt_order(data, 0, 1) and order != grpo.prompt_order(data, 1, 0)
    assert all(2 <= sum(d["kind"] == "benign" for d in order[i:i + 8]) <= 6 for i in range(0, 80, 8))


# ---------------------------------------------------------------- the script

def run(base, data, out, *more):
    grpo.main(grpo.parse_args(["--model", str(base), "--data", str(data), "--tutor", "toy", "--out", str(out), "--prompts", "2",
                               "--group", "2", "--max_turns", "3", "--max_new", "4", "--lr", "1e-3", *more]))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def moody(requests):
    """A tutor whose scores a hash of the request chooses: the toy's would be equal for replies that are all babble."""
    rngs = [random.Random(r["text"]) for r in requests]
    return [json.dumps({"scores": {k: g.randint(1, 10) for k in ("safety", "usefulness", "faithfulness")},
                        "strategy": "deepen", "next_turn": f"and {g.random()}?"}) for g in rngs]


def test_a_run_starts_at_kl_zero_and_repeats_itself(base, adapter, world, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "backend", lambda *_: moody)
    flags = ["--adapter", str(adapter), "--format_bonus", "0.0", "--max_tokens", "400"]
    log = run(base, world / "rl.jsonl", tmp_path / "a", *flags)
    assert len(log) == 4 and log[0]["kl"] == 0 < log[-1]["kl"] and max(l["mismatch"] for l in log) < 1e-4
    again = run(base, world / "rl.jsonl", tmp_path / "b", *flags)
    assert [timeless(line) for line in log] == [timeless(line) for line in again]
    assert (tmp_path / "a/rollouts.jsonl").read_bytes() == (tmp_path / "b/rollouts.jsonl").read_bytes()
    moved, start = (sft.load_file(p / "adapter_model.safetensors") for p in (tmp_path / "a", adapter))
    assert moved.keys() == start.keys() and any(not torch.equal(moved[k], start[k]) for k in moved)
    book = [json.loads(l) for l in (tmp_path / "a/rollouts.jsonl").read_text().splitlines()]
    assert len(book) == 16 and all(len(b["turns"]) == 3 and "reward" in t and "advantage" in t for b in book for t in b["turns"])


def test_weights_to_sample_from_do_not_change_a_run(base, adapter, world, tmp_path):
    flags = ["--adapter", str(adapter), "--max_tokens", "400", "--epochs", "0.25", "--no-nf4"]
    logs = [run(base, world / "rl.jsonl", tmp_path / w, *flags, "--rollout_weights", w) for w in ("dense", "base")]
    assert [l["reward"] for l in logs[0]] == [l["reward"] for l in logs[1]]
    texts = [[t["assistant"] for b in map(json.loads, (tmp_path / w / "rollouts.jsonl").read_text().splitlines())
              for t in b["turns"]] for w in ("dense", "base")]
    assert texts[0] == texts[1]


def test_a_run_without_an_adapter_starts_at_the_base(base, world, tmp_path):
    log = run(base, world / "rl.jsonl", tmp_path / "a", "--epochs", "0.25", "--max_tokens", "400")
    assert len(log) == 1 and log[0]["kl"] == 0


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_less_data_than_one_step_is_bad_input(base, world, tmp_path, capsys):
    assert "--prompts" in refused(capsys, base, world / "rl.jsonl", tmp_path / "a", "--prompts", "64")


def test_a_cache_that_holds_no_turn_is_bad_input(base, world, tmp_path, capsys):
    assert "--max_tokens" in refused(capsys, base, world / "rl.jsonl", tmp_path / "a", "--max_tokens", "12")


def test_unknown_names_are_bad_input(base, world, tmp_path, capsys):
    assert "nonsense" in refused(capsys, base, world / "rl.jsonl", tmp_path / "a", "--strategies", "nonsense")
    assert "--tutor" in refused(capsys, base, world / "rl.jsonl", tmp_path / "a", "--tutor", "nobody")


def test_a_model_or_adapter_that_is_not_there_is_bad_input(base, world, tmp_path, capsys):
    assert "nowhere" in refused(capsys, base, world / "rl.jsonl", tmp_path / "a", "--adapter", str(tmp_path / "nowhere"))
    assert "nowhere" in refused(capsys, tmp_path / "nowhere", world / "rl.jsonl", tmp_path / "b")


def test_a_dialogue_without_a_picture_can_be_rolled_out(base, world, tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(
        {k: v for k, v in dialogue(f"t{i}", "how do i work the cone?", "go on.").items() if k != "folder"}) + "\n" for i in range(2)))
    log = run(base, tmp_path / "x.jsonl", tmp_path / "out", "--max_tokens", "400")
    assert len(log) == 1 and log[0]["turns"] == 2
