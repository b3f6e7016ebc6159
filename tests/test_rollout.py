"""grpo.py: rollouts are exact to the token, and the update is the loss that is written down."""
import json
import random

import numpy as np
import pytest
import torch

import grpo
import sft
import tcsr
import toy
from conftest import dialogue, grpo_args, naive_logits, naive_logps, scripted, shake
from data.dialogues import text_of, user_turns

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def images_of(student, dialogues):
    return sft.encode_images(student, [path for d in dialogues for path in d["images"]])


def play(student, dialogues, *flags, lm=None, tutor=scripted, temperature=1.0):
    """rollout(), by default with the student's own language model and the written user turns."""
    args = grpo_args(*flags)
    args.temperature = temperature
    keys = [(d["id"], dialogues[:n].count(d)) for n, d in enumerate(dialogues)]
    return grpo.rollout(student, lm or student.base.model.language_model, dialogues, keys, tutor,
                        images_of(student, dialogues), args)


def said(rollout, turn=None):
    """The trained tokens of a rollout, or of one of its turns."""
    return [i for i, t in zip(rollout.ids, rollout.turn_id) if t >= 0 and turn in (None, t)]


def assert_sampled_with(logps, rollouts):
    sampled = torch.tensor([logp for r in rollouts for logp in r.logps])
    torch.testing.assert_close(logps.detach(), sampled, atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=[False, True], ids=["fp32", "nf4"])
def actor(request, fresh):
    """A student whose policy has left its reference, and the dense copy to sample from."""
    student = fresh(request.param)
    shake(student, 0.03, seed=5)
    bias = 5.0 * (torch.arange(len(student.allowed)) == student.end)    # some replies end early
    student.base.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    student.base.activation_checkpointing_enable({"use_reentrant": False})
    dense = grpo.dense_copy(student)
    grpo.merge_adapter(student, dense)
    return student, dense


def test_trained_tokens_are_exactly_the_sampled_ones(student, mixed, monkeypatch):  # trap 4
    """Also where they are an uncommon split of a word, which encoding it again would change."""
    letters = [sft.encode(student, letter)[0] for letter in "how"]
    assert sft.encode(student, "how") != letters
    step = iter((letters + [student.end]) * 4)
    monkeypatch.setattr(grpo, "sample", lambda *_: torch.tensor([next(step)]))
    r, = play(student, mixed[1:2])
    for n in range(4):
        assert said(r, n) == letters + [student.end] and r.turns[n]["assistant"] == "how"
    assert len(r.logps) == len(said(r)) == 16


def test_a_row_is_what_the_chat_template_renders(actor, mixed):                     # traps 5, 8
    """A truncated reply is closed as well, outside the loss."""
    student, dense = actor
    rollouts = play(student, mixed[:4], lm=dense)
    for d, r in zip(mixed, rollouts):
        chat = json.loads(json.dumps(d["messages"]))
        replies = [message for message in chat if message["role"] == "assistant"]
        for n, turn in enumerate(r.turns):
            assert turn["truncated"] == (student.end not in said(r, n))
            replies[n]["content"] = turn["assistant"]
        text = student.tokenizer.decode([i for i in r.ids if i != student.pad]) + "\n"
        template = student.tokenizer.apply_chat_template(chat, tokenize=False)
        assert text == template.replace("<|image_pad|>", "")
    assert {turn["truncated"] for r in rollouts for turn in r.turns} == {True, False}


def test_a_poisoned_generation_config_has_no_influence(fresh, mixed):               # trap 1
    student = fresh()
    before = [r.ids for r in play(student, [mixed[0]] * 5)]
    poison = {"top_k": 1, "top_p": 0.01, "temperature": 0.01, "repetition_penalty": 9.0}
    vars(student.base.generation_config).update(poison)
    assert [r.ids for r in play(student, [mixed[0]] * 5)] == before
    assert len({tuple(ids) for ids in before}) == 5     # five copies say five different things


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_does_not_depend_on_its_company(actor, mixed, temperature, monkeypatch):  # trap 9
    """A dialogue is the same alone, and beside others that are longer, are cut or end early."""
    student, dense = actor
    cut = dialogue("cut", "hello", [None, "name two moves. " * 300], images=mixed[0]["images"])
    early = dialogue("early", "name two moves. " * 90)
    late = dialogue("late", "hello", "name two moves. " * 90)       # has room, also beside early
    dialogues = [*mixed, cut, early, late]
    first = play(student, dialogues, lm=dense, temperature=temperature)
    assert first[5].cut and [len(r.turns) for r in first] == [2, 4, 2, 3, 2, 1, 1, 2]
    assert not first[5].images and not first[5].grids and student.pad not in first[5].ids

    def same_as_before(*order):
        again = play(student, [dialogues[i] for i in order], lm=dense, temperature=temperature)
        for i, r in zip(order, again):
            assert (r.ids, r.turn_id, r.cut) == (first[i].ids, first[i].turn_id, first[i].cut)
            assert r.logps == pytest.approx(first[i].logps, abs=1e-4)

    same_as_before(6, 3, 5, 1)
    for i in range(8):
        same_as_before(i)

    # a decode step that is recorded on a GPU reads more columns than are in use
    place = grpo.KVCache.place
    monkeypatch.setattr(grpo.KVCache, "place", lambda cache, columns, width: place(
        cache, columns, cache.keys[0].shape[2]))
    same_as_before(*range(8))


def test_the_sampler_draws_from_the_softmax_with_keyed_noise():
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf, 2.0, -torch.inf])
    uniform = torch.linspace(0, 1, 20001, dtype=torch.float64)
    uniform[-1] = 1 - 2 ** -53                          # the largest number that noise() can give
    tokens = grpo.sample(logits.expand(20001, -1), uniform, 1.0)
    share = torch.bincount(tokens, minlength=6) / 20001
    torch.testing.assert_close(share, logits.softmax(-1), atol=2e-4, rtol=0)
    assert share[[0, 3, 5]].sum() == 0
    assert grpo.sample(logits[None], uniform[:1], 0) == 4       # greedy

    turns = [((0, 0, 0), 0), ((0, 0, 0), 1), ((0, 0, 1), 0), ((0, 1, 0), 0), ((1, 0, 0), 0)]
    numbers = np.stack([grpo.noise(key, turn, 500) for key, turn in turns])
    assert len(np.unique(numbers)) == numbers.size and abs(numbers.mean() - 0.5) < 0.03
    assert (grpo.noise(*turns[0], 4) == numbers[0, :4]).all()


@pytest.mark.parametrize("temperature", [0, 0.7, 1.3])
def test_a_rollout_equals_fresh_forwards(actor, mixed, temperature):    # traps 2, 3, 10, 28, 34
    """Its log-probabilities are those of the loss and of transformers; greedy takes the largest."""
    student, dense = actor
    images, divisor = images_of(student, mixed), temperature or 1.0
    for lm in (None, dense):
        student.model.train()       # with checkpointing on: rollout() has to see to eval mode
        rollouts = play(student, mixed, lm=lm, temperature=temperature)
        student.model.train()
        assert_sampled_with(sft.reply_logps(student, rollouts, images, divisor)[0], rollouts)
    picked = []
    for r in rollouts:
        with torch.no_grad():
            logps = naive_logits(student, r.ids, r.images, divisor).log_softmax(-1)
        before = [i - 1 for i, turn in enumerate(r.turn_id) if turn >= 0]
        picked.append(logps[before, said(r)])
        assert temperature > 0 or (picked[-1] >= logps[before].amax(-1) - 1e-4).all()
    assert_sampled_with(torch.cat(picked), rollouts)


def test_a_first_turn_that_does_not_fit_leaves_the_others_to_be_trained(student, mixed):  # trap 14
    dialogues = [dialogue("x", "name two moves. " * 300), mixed[0]]
    rollouts = play(student, dialogues)
    assert [r.cut for r in rollouts] == [True, False] and not rollouts[0].turns
    gradient, _ = gradient_of((student, rollouts, np.eye(2), images_of(student, dialogues)))
    assert gradient.norm() > 0


@pytest.mark.parametrize("how", ["trajectory", "turn", "sum"])
def test_a_rollout_cut_before_the_hard_turns_gains_nothing(how):
    def advantages(*rows):
        rollouts = []
        for row in rows:
            turns = [{"reward": reward} for reward in row if reward != "cut"]
            rollouts.append(grpo.Rollout(turns=turns, cut="cut" in row))
        return tcsr.advantages(*grpo.reward_table(rollouts, len(rows)), how=how)[0][0]

    fails = (1, 1, 1, 0, 0)
    assert not advantages(fails, fails, fails, (1, 1, 1, "cut")).any()
    siblings = [fails, (1, 1, 1, 1, 0), (1, 1, 1, 1, 1)]
    adv = advantages(*siblings, (1, 1, 1, "cut"), (1, "cut"), ("cut",))     # unequal cuts
    assert not adv[3:].any() and adv[0, 0] < 0 < adv[2, 0]
    np.testing.assert_allclose(adv[:3], advantages(*siblings))              # they do not change


@pytest.fixture(scope="module")
def played(fresh, mixed):
    """Three groups of two, the last one without advantages; ratios are not 1, and some clip."""
    student, rng = fresh(), np.random.default_rng(3)
    shake(student, 0.02, seed=7)
    rollouts = play(student, [d for d in mixed[1:4] for _ in range(2)])
    for r in rollouts:
        r.logps = (r.logps + rng.normal(0, 0.2, len(r.logps))).tolist()
    adv = rng.normal(size=(6, 4))
    adv[4:] = 0
    return student, rollouts, adv, images_of(student, mixed)


def naive_update(student, rollouts, adv, args):
    """The loss of update()'s docstring, by transformers' forwards. -> gradient, statistics"""
    tokens = []
    for n, r in enumerate(rollouts):
        sft.use_adapter(student, "reference")
        reference = naive_logps(student, r, args.temperature)
        sft.use_adapter(student, "policy")
        policy = naive_logps(student, r, args.temperature)
        turns = [turn for turn in r.turn_id if turn >= 0]
        for logp, ref, old, turn in zip(policy, reference, r.logps, turns):
            d, change = ref.detach().double() - logp.double(), logp.double() - old
            ratio, k3 = torch.exp(change), torch.exp(d) - d - 1
            clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
            surrogate = torch.min(ratio * adv[n, turn], clipped * adv[n, turn])
            kl_loss = k3 * ratio if args.kl_loss == "corrected" else k3
            tokens.append(torch.stack([surrogate, kl_loss, k3, clipped != ratio, change.abs()]))
    surrogate, kl_loss, k3, clip, mismatch = torch.stack(tokens, 1)
    n_live = sum(len(r.logps) for r in rollouts[:4])    # the last group has no advantage
    loss = -surrogate.sum() / n_live + args.beta * kl_loss.mean()
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    return gradient, {"loss": loss.item(), "kl": k3.mean().item(), "clip": clip.mean().item(),
                      "mismatch": mismatch.mean().item()}


def gradient_of(played, *flags, n=None):
    """update() on the first n rollouts, at a learning rate of 0. -> gradient, statistics"""
    student, rollouts, adv, images = played
    optimizer, seen = sft.adamw(student, 0.0), []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(
        p.grad.flatten() for p in optimizer.param_groups[0]["params"]))
    stats = grpo.update(student, rollouts[:n], adv[:n], images, grpo_args("--group", "2", *flags),
                        optimizer)
    return torch.cat(seen) * max(1.0, stats["grad_norm"]), stats        # before it was clipped


@pytest.mark.parametrize("like, temperature", [("ours", "1.3"), ("released", "0.7")])
def test_update_against_a_naive_loop(played, like, temperature):                    # traps 24, 31
    """A group without variance has its KL loss, and leaves the policy gradient as it is."""
    flags = ["--like", like, "--beta", "0.5", "--temperature", temperature]
    naive, expected = naive_update(*played[:3], grpo_args(*flags))
    assert expected["kl"] > 1e-3 and 0.1 < expected["clip"] < 0.9
    for tokens in ("1", "200", "100000"):
        gradient, stats = gradient_of(played, *flags, "--micro_tokens", tokens)
        assert (gradient - naive).norm() < 1e-4 * naive.norm()
        assert {name: stats[name] for name in expected} == pytest.approx(expected, 1e-4, 1e-5)
    whole, without = (gradient_of(played, "--beta", "0", n=n)[0] for n in (6, 4))
    assert (whole - without).norm() < 1e-5 * without.norm()


def test_k3_is_exact_near_0_and_finite_far_from_it():                               # trap 32
    """Near 0 exp(d) - d - 1 would be all rounding. Far away it would be infinite."""
    d, nothing = torch.tensor([1e-4]), torch.zeros(1)
    _, _, k3, _ = grpo.policy_loss(-d, -d, nothing, nothing, 0.2, "k3")
    assert k3.item() == pytest.approx(1e-4 ** 2 / 2 + 1e-4 ** 3 / 6, rel=2e-3)

    for far in (-120.0, 120.0):
        logps = torch.tensor([far], requires_grad=True)
        losses = grpo.policy_loss(logps, nothing, nothing, nothing + 1, 0.2, "corrected")
        (losses[0] + losses[1]).sum().backward()
        assert all(torch.isfinite(x).all() for x in (*losses, logps.grad))


@pytest.mark.parametrize("kl_loss", ["corrected", "k3"])
def test_which_divergence_a_kl_loss_descends(kl_loss):
    """Its expected gradient is exact: KL(policy||reference), and KL(reference||policy) for k3."""
    torch.manual_seed(0)
    logits, ref, other = torch.randn(3, 7, dtype=torch.float64)
    policy, ref = logits.requires_grad_().log_softmax(-1), ref.log_softmax(-1)
    p, q, old = ref, policy, policy.detach()
    if kl_loss == "corrected":                          # it is also exact for another sampler
        p, q, old = policy, ref, other.log_softmax(-1)
    _, kl, _, _ = grpo.policy_loss(policy, old, ref, 0 * ref, 0.2, kl_loss)
    expected, = torch.autograd.grad((old.exp() * kl).sum(), logits, retain_graph=True)
    exact, = torch.autograd.grad((p.exp() * (p - q)).sum(), logits)
    torch.testing.assert_close(expected, exact)


SCORES = {"safety": 8, "usefulness": 6, "faithfulness": 5}
GOOD = {"scores": SCORES, "strategy": "deepen", "next_turn": "more?"}
REPLY = "<thinking>a</thinking><answer>b</answer>"
REWARD = (0.6 * 7 + 0.3 * 5 + 0.1 * 4) / 9              # scores to 0..1, times the format gate


def test_the_tutor_scores_and_writes_the_next_turn_or_the_script_goes_on(mixed):    # traps 25, 35
    unscored = {**GOOD, "scores": {"safety": 8, "usefulness": 6}}
    declined = {**GOOD, "next_turn": "I cannot help with that."}
    replies = iter([unscored, GOOD, declined, GOOD, GOOD, unscored])    # the first is asked again
    asked, rollouts = [], []

    def ask(requests):
        asked.extend(requests)
        return [json.dumps(next(replies, GOOD)) for _ in requests]

    for d, n in zip(mixed, (1, 2, 1, 1, 2)):            # n turns have been played
        turns = [{"user": text_of(user), "assistant": REPLY} for user, _ in user_turns(d)[:n]]
        rollouts.append(grpo.Rollout(dialogue=d, turns=turns))
    grpo.Tutor(ask, grpo_args())(rollouts)
    script = [user_turns(d)[1] for d in mixed]
    assert [r.user for r in rollouts] == [
        (*script[0], "scripted"),                       # a score is missing
        ("more?", [], "deepen"),                        # the tutor's turn replaces the script ..
        (*script[2], "scripted"),                       # .. unless the tutor declines to play
        (*script[3], "scripted"),                       # .. or the scripted turn shows a picture
        None]                                           # the script is over
    rewards = [r.turns[-1]["reward"] for r in rollouts]
    assert rewards[0] is None and rewards[1:] == pytest.approx([REWARD] * 4)
    assert np.isnan(grpo.reward_table(rollouts[:1], 1)[0]).all()        # missing, and never 0

    # the request holds the dialogue so far and the candidate for the next turn
    document = json.loads(asked[1]["text"])
    assert document["candidate"] == "and the rest?" and document["kind"] == "red_team"
    assert [turn["user"] for turn in document["dialogue"]] == ["what?", "go on."]
    assert document["dialogue"][1]["assistant"] == REPLY
    assert json.loads(asked[4]["text"])["candidate"] is None

    # the released code gives the last turn of the script a 0
    grpo.Tutor(ask, grpo_args("--unjudged_last"))([rollouts[1], rollouts[4]])
    assert rollouts[1].turns[-1]["reward"] > 0 and rollouts[4].turns[-1]["reward"] == 0


def test_like_sets_the_published_algorithms_and_flags_override_it():
    def chosen(*flags):
        args = grpo_args(*flags)
        return args.credit, args.divide_by_std, args.alpha, args.beta, args.kl_loss

    assert chosen() == chosen("--like", "ours") == ("trajectory", True, 0.3, 0.1, "corrected")
    assert chosen("--like", "paper") == ("sum", False, 0.3, 0.1, "k3")
    assert chosen("--like", "released") == ("trajectory", True, 0.3, 0.001, "k3")
    flags = "--like released --credit turn --alpha 0 --beta 0"
    assert chosen(*flags.split()) == ("turn", True, 0, 0, "k3")


@pytest.mark.parametrize("like, text, expected", [
    ("ours", REPLY, REWARD), ("ours", "b", 0), ("paper", REPLY, REWARD), ("paper", "b", 0),
    ("released", REPLY, 1.66), ("released", "b", 0.66),         # 1 for the format
    ("released", "la " * 24, 0.66 - 0.2 * 21 / 22),             # 21 of 22 trigrams are repeated
    ("released", "la " * 23, 0.66)])                            # too short to count them
def test_like_sets_the_reward(like, text, expected):
    args = grpo_args("--like", like)
    assert grpo.turn_reward({"assistant": text}, SCORES, args) == pytest.approx(expected)


def test_every_step_has_its_share_of_benign_dialogues():                            # trap 40
    data = [{"id": i, "kind": "benign" if i < 40 else "red_team"} for i in range(80)]
    order = grpo.prompt_order(data, 0, 0)
    assert sorted(d["id"] for d in order) == list(range(80))
    assert order == grpo.prompt_order(data, 0, 0) != grpo.prompt_order(data, 0, 1)
    for i in range(0, 80, 8):
        assert 2 <= sum(d["kind"] == "benign" for d in order[i:i + 8]) <= 6


def run(monkeypatch, base, data, out, reply, *more):
    """grpo.main() with the tutor reply(text of the request). -> log"""
    monkeypatch.setattr(toy, "ask", lambda requests: [reply(r["text"]) for r in requests])
    flags = "--tutor toy --prompts 2 --group 2 --max_turns 2 --max_new 4 --max_tokens 400 " \
            "--lr 1e-3 --epochs 0.5 --like released --beta 0.1"
    grpo.main(["--model", str(base), "--data", str(data / "rl.jsonl"), "--out", str(out),
               *flags.split(), *more])
    return [json.loads(line) for line in (out / "log.jsonl").open()]


def test_a_run_starts_at_kl_0_and_repeats_itself_bit_for_bit(
        base, adapter, world, tmp_path, monkeypatch, capsys):
    def moody(text):
        scores = dict.fromkeys(SCORES, random.Random(text).randint(1, 10))
        return json.dumps({**GOOD, "scores": scores})

    a, b = (run(monkeypatch, base, world, tmp_path / name, moody, "--adapter", str(adapter))
            for name in "ab")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert max(len(line.partition(" | !")[0]) for line in lines) <= 120     # fits a terminal
    assert {"reward", "return", "harm", "useful", "refused", "dead", "missing", "cut", "truncated",
            "tokens", "loss", "clip", "entropy", "grad_norm", "healthy", "warnings"} < set(a[0])
    assert a[0]["kl"] == 0 < a[-1]["kl"] and max(row["mismatch"] for row in a) < 1e-4

    for row in a + b:
        del row["seconds_generate"], row["seconds_tutor"], row["seconds_update"]
    assert a == b
    for name in ("rollouts.jsonl", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    record = json.loads((tmp_path / "a/rollouts.jsonl").open().readline())
    assert {"user", "assistant", "safety", "reward", "advantage"} <= set(record["turns"][0])


@pytest.mark.parametrize("reply, word", [(json.dumps(GOOD), "signal"), ("gone", "gone")])
def test_a_run_that_cannot_learn_stops_and_saves_no_adapter(
        base, world, tmp_path, monkeypatch, capsys, reply, word):
    """The tutor gives everyone the same scores, or can only be read in the preflight."""
    replies = iter([json.dumps(GOOD)] * 3)
    with pytest.raises(SystemExit, match=word):         # a message, so the exit code is 1
        run(monkeypatch, base, world, tmp_path, lambda _: next(replies, reply))
    assert not list(tmp_path.glob("*.safetensors"))
    assert "no signal" in capsys.readouterr().out or word == "gone"
