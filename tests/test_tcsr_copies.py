"""tcsr.py is meant to be copied: alone in a folder with numpy, inside TRL's GRPOTrainer, under a verl-style reward.

The two snippets are what the README shows, character for character; the tests run them as they stand."""
import ast
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import tcsr  # noqa: E402

TRL_SNIPPET = '''\
from itertools import zip_longest
import numpy as np, torch, trl, tcsr
def pad(rows, fill):                                            # ragged lists -> (N, longest)
    return np.array(list(zip_longest(*rows, fillvalue=fill))).T
class TCSRTrainer(trl.GRPOTrainer):     # rollout_func returns two more lists per rollout: turn_rewards and turn_id
    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)   # TRL has merged those lists into inputs
        rewards = pad([row["turn_rewards"] for row in inputs], None).astype(float)      # (N, T), None = unjudged
        happened = pad([[True] * len(row["turn_rewards"]) for row in inputs], False)    # (N, T)
        shape = -1, self.num_generations, rewards.shape[1]                              # (B, G, T)
        adv, _ = tcsr.advantages(rewards.reshape(shape), happened.reshape(shape), how="turn")
        tokens = tcsr.to_tokens(adv.reshape(rewards.shape), pad([row["turn_id"] for row in inputs], -1))  # (N, L)
        out["advantages"] = torch.as_tensor(tokens).to(out["advantages"])  # aligned with completion_ids: no [:, 1:]
        return out
'''

VERL_SNIPPET = '''\
import tcsr
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    # turn_scores: one tcsr.turn_reward(...) per turn, as your interaction returned them; None = could not be judged
    running = tcsr.tcsr(extra_info["turn_scores"], alpha=0.3)
    return float(running[-1])       # r~_T; verl normalises it in the group. NaN = nothing judged: filter that rollout
'''

# Refuses every import but numpy and the standard library, then runs the doctests of the copy in the folder argv[1].
ALONE = '''
import sys
class OnlyNumpy:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names | {"numpy", "tcsr"}:
            raise ImportError("not in an empty folder: " + name)
sys.meta_path.insert(0, OnlyNumpy())
sys.path.insert(0, sys.argv[1])
import doctest, tcsr
assert tcsr.__file__.startswith(sys.argv[1])
public = [n for n, f in vars(tcsr).items() if callable(f) and not n.startswith("_") and n != "replay"]
examined = [t.name for t in doctest.DocTestFinder().find(tcsr) if t.examples]
assert {"tcsr." + n for n in public} <= set(examined), (public, examined)
failed, tried = doctest.testmod(tcsr)
print(failed, tried)
'''


def test_alone_in_an_empty_folder_with_numpy_only(tmp_path):
    shutil.copy(ROOT / "tcsr.py", tmp_path)
    out = subprocess.run([sys.executable, "-I", "-c", ALONE, tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    failed, tried = map(int, out.stdout.split())
    assert failed == 0 and tried >= 6, out.stdout


def test_imports_nothing_else_and_carries_its_licence():
    source = (ROOT / "tcsr.py").read_text()
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {a.name for n in nodes for a in n.names} | {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    assert names == {"numpy", "argparse", "json"}
    top = [n for n in ast.parse(source).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert [a.name for n in top for a in n.names] == ["numpy"]          # argparse and json: inside the replay only
    assert source.startswith("# SPDX-License-Identifier: MIT\n# Copyright (c) ")
    assert max(map(len, source.splitlines())) <= 120


@pytest.mark.parametrize("snippet", [TRL_SNIPPET, VERL_SNIPPET], ids=["trl", "verl"])
def test_snippets_are_short_and_the_readmes(snippet):
    assert len(snippet.splitlines()) < 15 and max(map(len, snippet.splitlines())) <= 120
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    assert snippet in readme.read_text()


def test_verl_reward_gives_the_same_number():
    scope = {}
    exec(VERL_SNIPPET, scope)
    judged = [[(10, 8, 10), (8, 10, 9), (1, 1, 2)], [(10, 10, 10), None, (6, 8, 10)], [(4, 1, 5), (10, 8, 8)]]
    rewards = [[None if s is None else float(tcsr.turn_reward(*s)) for s in turns] for turns in judged]
    # verl's reward manager calls by keyword, one rollout at a time
    scores = [scope["compute_score"](data_source="steer", solution_str="...", ground_truth="", extra_info={
        "turn_scores": r, "num_turns": len(r)}) for r in rewards]
    padded = np.array([r + [None] * (3 - len(r)) for r in rewards], float)[None]        # (1, G, T)
    mask = np.arange(3) < np.array([[len(r)] for r in rewards])[None]
    ours, _ = tcsr.advantages(padded, mask)
    np.testing.assert_allclose(scores, tcsr.tcsr(padded, mask=mask)[0, :, -1], rtol=1e-12)
    np.testing.assert_allclose(tcsr.group_advantages([scores])[0], ours[0, :, 0], rtol=1e-9)
    verl = (np.array(scores) - np.mean(scores)) / (np.std(scores, ddof=1) + 1e-6)       # as its GRPO estimator does
    np.testing.assert_allclose(verl, ours[0, :, 0], rtol=1e-4)
    assert all(isinstance(s, float) for s in scores) and len(set(scores)) == 3


# ---------------------------------------------------------------- TRL

WORDS = [f"w{i}" for i in range(24)]
G, TURNS, NEW = 3, 3, 5


def tiny_student():
    """A random 2-layer Qwen2 and a word-level tokenizer: enough for GRPOTrainer, nothing downloaded"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    vocab = {w: i for i, w in enumerate(["<pad>", "<end>", *WORDS])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<end>", pad_token="<pad>", padding_side="left")
    net = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=1, pad_token_id=0, bos_token_id=None))
    return tok, net


def test_two_steps_in_a_real_trl_trainer(tmp_path, monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from datasets import Dataset
    from trl import GRPOConfig
    scope, seen, losses = {}, [], []
    exec(TRL_SNIPPET, scope)
    tok, net = tiny_student()
    tutor = random.Random(0)

    def rollout(prompts, trainer):
        """A tutor that answers with two random words; the third rollout of a group stops after one turn."""
        start = [tok(p)["input_ids"] for p in prompts]
        rows = [{"completion_ids": [], "env_mask": [], "turn_id": [], "turn_rewards": []} for _ in prompts]
        for t in range(TURNS):
            new, _ = trainer._generate_single_turn([p + r["completion_ids"] for p, r in zip(start, rows)], None, {}, 1)
            for i, (row, ids) in enumerate(zip(rows, new)):
                if i % G == 2 and t > 0:
                    continue
                user = tok(" ".join(tutor.choices(WORDS, k=2)))["input_ids"] if t else []   # context before each reply
                row["completion_ids"] += user + ids
                row["env_mask"] += [0] * len(user) + [1] * len(ids)
                row["turn_id"] += [-1] * len(user) + [t] * len(ids)
                row["turn_rewards"].append(None if (i, t) == (1, 1) else sum(x % 2 for x in ids) / len(ids))
        seen.append(rows)
        return {"prompt_ids": start, "logprobs": None, **{k: [row[k] for row in rows] for k in rows[0]}}

    class Watched(scope["TCSRTrainer"]):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            losses.append((float(loss.detach()), inputs["advantages"].shape, inputs["completion_ids"].shape))
            return loss

    def nothing(completions, **_):          # TRL's own advantages are then all 0: what moves the weights is ours
        return [0.0] * len(completions)

    args = GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2 * G, num_generations=G, beta=0.0,
        max_completion_length=64, generation_kwargs={"max_new_tokens": NEW, "min_new_tokens": 2}, loss_type="grpo",
        learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True, bf16=False, gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, seed=0)
    data = Dataset.from_list([{"prompt": " ".join(WORDS[i:i + 4])} for i in range(8)])
    before = [p.detach().clone() for p in net.parameters()]
    try:
        trainer = Watched(model=net, reward_funcs=nothing, args=args, train_dataset=data, processing_class=tok,
                          rollout_func=rollout)
        trainer.train()
    finally:
        torch.set_num_threads(threads)

    assert len(seen) == len(losses) == trainer.state.global_step == 2
    assert any((a != b.detach()).any() for a, b in zip(before, trainer.model.parameters()))
    for rows, (loss, adv_shape, ids_shape) in zip(seen, losses):
        assert adv_shape == ids_shape                                   # per token, (N, L)
        assert abs(loss) > 1e-4                                 # else the comparison below would prove nothing
        # on-policy the ratio is 1, so TRL's loss is -(mean over rollouts of the mean over their tokens of A)
        want = 0.0
        for b in range(2):
            group = rows[b * G:(b + 1) * G]
            r = np.array([row["turn_rewards"] + [None] * (TURNS - len(row["turn_rewards"])) for row in group], float)
            mask = np.arange(TURNS) < np.array([[len(row["turn_rewards"])] for row in group])
            adv = tcsr.advantages(r[None], mask[None], how="turn")[0][0]                 # (G, T)
            for g, row in enumerate(group):
                own = [t for t in row["turn_id"] if t >= 0]
                want -= sum(adv[g, t] for t in own) / len(own) / (2 * G)
        assert loss == pytest.approx(want, abs=1e-5)
