"""tcsr.py inside TRL and verl (two snippets to copy), and our loss beside TRL's."""
import random
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

import grpo
import tcsr
import toy

TRL_SNIPPET = '''\
import numpy as np
import torch
import trl

import tcsr


def pad(rows, fill):
    """Lists of unequal length -> (N, longest)"""
    longest = max(len(row) for row in rows)
    return np.array([row + [fill] * (longest - len(row)) for row in rows])


class TCSRTrainer(trl.GRPOTrainer):
    """Its rollout_func returns two more lists per rollout: turn_rewards and turn_id."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)    # puts those lists into inputs
        rewards = pad([row["turn_rewards"] for row in inputs], np.nan)              # (N, T)
        mask = pad([[True] * len(row["turn_rewards"]) for row in inputs], False)    # (N, T)
        turn_id = pad([row["turn_id"] for row in inputs], -1)                       # (N, L)

        shape = (-1, self.num_generations, rewards.shape[1])                        # (B, G, T)
        adv, _ = tcsr.advantages(rewards.reshape(shape), mask.reshape(shape), how="turn")
        adv = tcsr.to_tokens(adv.reshape(rewards.shape), turn_id)                   # (N, L)
        output["advantages"] = torch.tensor(adv).to(output["advantages"])   # one per completion id
        return output
'''

VERL_SNIPPET = '''\
import tcsr


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """turn_scores: tcsr.turn_reward(...) of each turn, None if it could not be judged."""
    running = tcsr.tcsr(extra_info["turn_scores"], alpha=0.3)
    return float(running[-1])       # verl compares it in the group; drop rollouts that have NaN
'''


def test_a_verl_reward_leads_to_our_advantages():
    scope = {}
    exec(VERL_SNIPPET, scope)
    rewards = [[0.9, 0.8, 0.1], [1.0, None, 0.7], [0.3, 0.8, 0.9]]
    # verl calls it by keyword, for one rollout at a time
    scores = [scope["compute_score"](data_source="steer", solution_str="..", ground_truth="",
                                     extra_info={"turn_scores": turns}) for turns in rewards]
    verl = (np.array(scores) - np.mean(scores)) / (np.std(scores, ddof=1) + 1e-6)
    adv, _ = tcsr.advantages([rewards])
    assert verl == pytest.approx(adv[0, :, 0], rel=1e-4)


# ---- TRL

G, TURNS = 3, 3


def play(prompts, trainer, tokenizer):
    """TRL's rollout_func. The user speaks before later turns; every third rollout has one turn."""
    rows = [{"prompt_ids": tokenizer(prompt)["input_ids"], "completion_ids": [], "env_mask": [],
             "turn_id": [], "turn_rewards": []} for prompt in prompts]
    for t in range(TURNS):
        so_far = [row["prompt_ids"] + row["completion_ids"] for row in rows]
        replies, _ = trainer._generate_single_turn(so_far, None, {}, 1)
        for i, (row, reply) in enumerate(zip(rows, replies)):
            if i % G == 2 and t > 0:
                continue
            user = tokenizer("go on.")["input_ids"] if t > 0 else []
            row["completion_ids"] += user + reply
            row["env_mask"] += [0] * len(user) + [1] * len(reply)
            row["turn_id"] += [-1] * len(user) + [t] * len(reply)
            reward = sum(token % 2 for token in reply) / len(reply)
            row["turn_rewards"].append(np.nan if (i, t) == (1, 1) else reward)      # one unjudged
    return rows


def expected_loss(rows):
    """On-policy all ratios are 1, so it is minus the mean over rollouts of their mean advantage."""
    means = []
    for start in range(0, len(rows), G):
        rewards, mask = np.full((1, G, TURNS), np.nan), np.zeros((1, G, TURNS), bool)
        for g, row in enumerate(rows[start:start + G]):
            rewards[0, g, :len(row["turn_rewards"])] = row["turn_rewards"]
            mask[0, g, :len(row["turn_rewards"])] = True
        adv, _ = tcsr.advantages(rewards, mask, how="turn")
        for g, row in enumerate(rows[start:start + G]):
            means.append(np.mean([adv[0, g, t] for t in row["turn_id"] if t >= 0]))
    return -np.mean(means)


def test_two_steps_of_a_real_trl_trainer(tmp_path):
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig
    scope, played, losses = {}, [], []
    exec(TRL_SNIPPET, scope)
    tokenizer = toy.make_tokenizer(random.Random(0))
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id))

    def rollout_func(prompts, trainer):
        rows = play(prompts, trainer, tokenizer)
        played.append(rows)
        output = {"logprobs": None}
        for name in rows[0]:
            output[name] = [row[name] for row in rows]
        return output

    class Watched(scope["TCSRTrainer"]):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            losses.append(loss.item())
            return loss

    def no_reward(completions, **_):        # all of TRL's own advantages are 0, so only ours train
        return [0.0] * len(completions)

    config = GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2 * G, num_generations=G,
        generation_kwargs={"max_new_tokens": 5, "min_new_tokens": 2}, max_completion_length=64,
        loss_type="grpo", beta=0.0, learning_rate=1e-2, use_cpu=True, bf16=False, seed=0,
        gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False)
    data = Dataset.from_list([{"prompt": f"name {word}."} for word in ("a box", "two moves")])
    before = [p.detach().clone() for p in model.parameters()]
    Watched(model=model, reward_funcs=no_reward, args=config, train_dataset=data,
            processing_class=tokenizer, rollout_func=rollout_func).train()

    assert len(played) == 2 and min(map(abs, losses)) > 1e-4
    assert losses == pytest.approx([expected_loss(rows) for rows in played], abs=1e-5)
    assert any((a != b).any() for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("kl_loss", ["corrected", "k3"])
def test_loss_and_gradient_equal_trls(kl_loss):
    trl = pytest.importorskip("trl", minversion="1.16")
    torch.manual_seed(1)
    old, ref, adv, change = torch.randn(4, 3, 5)
    logps, mask = (old + 0.3 * change).requires_grad_(), (torch.rand(3, 5) < 0.7).float()
    trainer = MagicMock(beta=0.3, epsilon_low=0.2, epsilon_high=0.2, loss_type="bnpo",
                        top_entropy_quantile=1.0, importance_sampling_level="token",
                        off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
                        _entropy_bonus_enabled=False, **{"model.training": False})
    trainer.args = SimpleNamespace(use_bias_correction_kl=kl_loss == "corrected", delta=None)
    trainer.accelerator.gather.return_value = mask      # for metrics only
    trainer._get_per_token_logps_and_entropies.return_value = logps, 0 * mask, None
    theirs = trl.GRPOTrainer._compute_loss(trainer, None, {
        "prompt_ids": mask, "prompt_mask": mask, "completion_ids": mask, "completion_mask": mask,
        "advantages": adv, "old_per_token_logps": old, "ref_per_token_logps": ref})
    policy, kl, _, _ = grpo.policy_loss(logps, old, ref, adv, 0.2, kl_loss)
    ours = ((policy + 0.3 * kl) * mask).sum() / mask.sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logps)[0] for loss in (ours, theirs)))
