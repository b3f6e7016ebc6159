"""grpo.py: Stage III, tutor-in-the-loop GRPO on the student of sft.py.

For every seed dialogue G students answer in parallel. After each turn the tutor reads the exchange, scores it and writes
the next user turn, so each rollout is attacked where it stands. Turn rewards become TCSR returns, returns become
advantages within the group of G (tcsr.py), and the policy gradient is PPO's clipped one with a k3 KL to the SFT model:

    loss = -min(ratio A, clip(ratio) A) + beta (exp(d) - d - 1),   d = log pi_ref - log pi        mean over tokens

Deviations from the authors [R]: LoRA instead of all weights; every turn is judged, the last one too; a failed judgement
is missing, not 0; one on-policy update per batch of rollouts by default (theirs: 64 prompts, 32 updates).

    make toy                                                                                       # laptop, see there
    python grpo.py --model Qwen/Qwen2.5-VL-3B-Instruct --adapter out/sft --data data/synth/rl.jsonl \\
                   --tutor http://localhost:8000/v1 --tutor_model NAME --out out/grpo    # one GPU; the 7B by its name

Writes adapter and checkpoints as sft.py does, log.jsonl (a line a step) and rollouts.jsonl (every dialogue with its
scores and advantages). Defaults called ours are untested at 3B.
Shapes: B prompts, G rollouts each, N = B * G rows, T turns, L tokens, V vocabulary, M trained tokens, S cache columns.
"""

import argparse
import hashlib
import json
import math
import random
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

import judge
import tcsr
from sft import (Row, adamw, add_lora, add_user, begin, encode_images, finish, hidden_states, join, load_adapter,
                 load_student, micro_batches, mrope_positions, open_run, over_ranks, policy_logits, ranks, reply_logps,
                 save_checkpoint, show_trained, step_or_skip, steps_left, use_adapter, write_line)
from synth import fail, image_png, read_dialogues, text_of, user_turns
from accelerate.utils import gather_object
from peft.utils.integrations import dequantize_module_weight  # both after sft: it keeps bitsandbytes quick and quiet


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=judge.Help)
    add, flag = p.add_argument, argparse.BooleanOptionalAction
    add("--model", required=True, help="Hugging Face folder or name of the base the adapter was trained on")
    add("--adapter", help="adapter of sft.py: where the policy starts, and the frozen reference of the KL")
    add("--data", required=True, nargs="+", help="JSONL files of dialogues: first turns, and the scripts to fall back on")
    add("--tutor", required=True, help="chat back end that scores and attacks: toy, http(s)://host:port/v1, local:PATH (a "
        "second model here, 4-bit; local16: in bf16), or local:self (the student's base without its adapters)")
    add("--tutor_model", help="model name at that address; its key is in TUTOR_API_KEY or OPENAI_API_KEY")
    add("--concurrency", type=int, default=40, help="requests to a served back end at a time")
    add("--timeout", type=float, default=120.0, help="seconds for one reply of a served back end")
    add("--out", required=True, help="folder for adapter, logs and meta.json")
    add("--strategies", nargs="+", default=[*judge.STRATEGIES], help="what the tutor may use; evolutions always")
    add("--prompts", type=int, default=8, help="dialogues per step (B; ours); 64 [R] needs several GPUs")
    add("--group", type=int, default=5, help="rollouts per dialogue (G) [R]")
    add("--epochs", type=float, default=1, help="passes over the data [R]")
    add("--max_turns", type=int, default=10, help="turns per dialogue at most [R]")
    add("--max_new", type=int, default=512, help="new tokens per turn (ours)")
    add("--max_tokens", type=int, default=8192, help="cache columns per dialogue; beyond it trailing turns are dropped")
    add("--temperature", type=float, default=1.0, help="of sampling, and of the log-probabilities (ours)")
    add("--lr", type=float, default=1e-5, help="ours, for LoRA; 1e-6 [R] is for full fine-tuning")
    add("--lr_end", type=float, default=0.1, help="the rate falls in a line to this share of --lr (ours)")
    add("--beta", type=float, default=0.1, help="weight of the KL to the reference; 0.1 in one file, 0.001 in another [R]")
    add("--clip", type=float, default=0.2, help="PPO's epsilon (ours)")
    add("--prompts_per_update", type=int, default=0, help="optimiser steps per rollout batch = B / this; 0: one (ours)")
    add("--alpha", type=float, default=0.3, help="weight of the minimum in TCSR; 0.3 in the text, 0.4 in the code [R]")
    add("--credit", choices=("trajectory", "turn", "sum"), default="trajectory", help="see tcsr.credit")
    add("--weights", type=float, nargs=3, default=(0.6, 0.3, 0.1), metavar=("SAFETY", "USEFUL", "FAITHFUL"),
        help="of the turn reward; 0.4 0.4 0.2 in the code that ran [R]")
    add("--reward_scale", choices=("unit", "tenth"), default="unit", help="unit: 1..10 -> 0..1; tenth: / 10 [R]")
    add("--format_bonus", type=float, help="add this for well-formed replies (1.0 [R]) instead of multiplying by the gate")
    add("--repetition_weight", type=float, default=0.0, help="times the share of repeated 3-grams (0.1 [R])")
    add("--micro_tokens", type=int, default=8192, help="padded tokens per forward; less memory, same gradient")
    add("--rollout_weights", choices=("dense", "base"), default="dense",
        help="sample from a dense copy with the adapter folded in, or from the base itself (less memory, slower)")
    add("--eager", action="store_true", help="GPU: every kernel of a decode step from Python, instead of a recorded step")
    add("--max_pixels", type=int, default=512 * 512, help="image budget [R]")
    add("--nf4", action=flag, default=True, help="4-bit base (QLoRA)")
    add("--checkpointing", action=flag, default=True, help="recompute activations: less memory, a third more time")
    add("--save_every", type=int, default=10, help="steps between two checkpoints; the last two are kept (ours)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--allow_changes", action="store_true", help="resume although arguments or data are not those it began with")
    add("--skip_bad", action="store_true", help="go on without bad records instead of stopping")
    add("--allow_outside", action="store_true", help="pictures may lie outside the folder of their data file")
    add("--threads", type=int, default=0, help="CPU threads (0: torch's choice); use 1 beside other busy processes")
    add("--seed", type=int, default=0, help="order of the data, sampling noise")
    return p.parse_args(argv)


# ---------------------------------------------------------------- rollout

class Cache:
    """Keys and values of N rows, allocated once for a whole dialogue. `update` is all that transformers' attention asks
    of a cache. Columns are shared: a forward writes the same columns for every row, and what is padding in a row is
    masked by `attend`, so ragged rows stay in step."""

    def __init__(self, config, rows, columns, dtype, device):
        head = config.hidden_size // config.num_attention_heads
        self.kv = [torch.empty(2, rows, config.num_key_value_heads, columns, head, dtype=dtype, device=device)
                   for _ in range(config.num_hidden_layers)]
        self.attend = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        self.used = 0

    def update(self, keys, values, layer, *args, **kwargs):
        """keys, values (N, heads, L, head) of the new columns -> all so far (N, heads, used + L, head)."""
        end = self.used + keys.shape[2]
        self.kv[layer][0, :, :, self.used:end], self.kv[layer][1, :, :, self.used:end] = keys, values
        return self.kv[layer][0, :, :, :end], self.kv[layer][1, :, :, :end]

    def mask(self, real):
        """real (N, L): which of the new columns are tokens -> (N, 1, L, used + L), True = may look. A padding column
        sees itself, so that no softmax is over nothing; nobody else sees it."""
        n, length = real.shape
        self.attend[:, self.used:self.used + length] = real
        causal = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
        past = self.attend[:, None, :self.used].expand(n, length, -1)  # (N, L, used)
        new = causal & real[:, None] | torch.eye(length, dtype=torch.bool, device=real.device)  # (N, L, L)
        return torch.cat([past, new], -1)[:, None]

    def keep(self, rows):
        """Rows whose dialogue goes on move to the front; the rest leave the batch."""
        if len(rows) == len(self.attend):
            return
        for layer in range(len(self.kv)):
            self.kv[layer][:, :len(rows)] = self.kv[layer][:, rows]
            self.kv[layer] = self.kv[layer][:, :len(rows)]
        self.attend = self.attend[rows]


@dataclass
class Talk(Row):
    """A rollout: the row it is made of, and what was said and scored in it."""
    dialogue: dict = None
    key: tuple = ()  # of the sampling noise: (seed, step, prompt id, rollout)
    turns: list = field(default_factory=list)  # {"user", "assistant", "strategy", "truncated", ..scores}
    logps: list = field(default_factory=list)  # of the sampled tokens, as the sampler saw them
    cached: int = 0  # ids whose keys and values are in the cache
    position: int = 0  # the next token's
    cut: bool = False  # lost trailing turns for want of room


def noise(key, turn, n):
    """n uniforms for one row and turn. Keyed, so that neither timing, batch order nor rank changes a sample."""
    digest = hashlib.sha256(repr((*key, turn)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(n)


def sample(logits, uniform, temperature):
    """logits (N, V), uniform (N,) -> ids (N,): the inverse of the cumulative distribution, or argmax at temperature 0.
    Our own sampler, so that no default of a generation_config can leak in."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = logits.softmax(-1).double().cumsum(-1)  # (N, V)
    return (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)


def next_token(student, ids, positions, features, mask, cache, lm, uniform, temperature):
    """One forward over new columns and one draw a row -> token (N,), its log-probability (N,)."""
    hidden = hidden_states(student, ids, positions, features, mask, cache, lm)
    logits = policy_logits(student, hidden[:, -1], temperature or 1.0)  # (N, V)
    token = sample(logits, uniform, temperature)
    return token, logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)


def dense_copy(student):
    """A language model of plain linears to sample from: embeddings, norms and biases are the student's own tensors,
    each linear gets room for its weight. `fold` fills it."""
    lm = student.base.model.language_model
    with torch.device("meta"):
        dense = type(lm)._from_config(lm.config)
    dense.embed_tokens, dense.rotary_emb = lm.embed_tokens, lm.rotary_emb
    for name, module in [*dense.named_modules()]:
        if isinstance(module, torch.nn.Linear):
            source = lm.get_submodule(name)
            module.bias = getattr(source, "base_layer", source).bias
            shape, like = module.weight.shape, lm.embed_tokens.weight
            module.weight = torch.nn.Parameter(like.new_empty(shape), requires_grad=False)
        elif name.endswith("norm"):  # transformers' is eight kernels on a GPU, torch's is one; on a CPU the same bits
            norm = torch.nn.RMSNorm(module.weight.shape, module.variance_epsilon, device="meta")
            norm.weight = lm.get_submodule(name).weight
            dense.set_submodule(name, norm)
    return dense.eval()


@torch.no_grad()
def fold(student, dense):
    """dense weight <- dequantised base weight + the policy's LoRA update: the numbers the learner computes with. From
    the base each time, so that no rounding adds up."""
    lm = student.base.model.language_model
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear):
            source = lm.get_submodule(name)
            weight = dequantize_module_weight(getattr(source, "base_layer", source)).float()
            if "policy" in getattr(source, "lora_A", {}):
                weight = weight + source.get_delta_weight("policy").float()
            module.weight.copy_(weight)


@torch.no_grad()
def rollout(student, dialogues, keys, respond, args, images, lm=None, fixed=None):
    """Play all dialogues abreast, turn by turn, and return their Talks.

    Tokens go in as the sampler made them, never decoded and encoded again; a user turn is appended as new
    tokens with the template's seams. respond(talks) is called once a turn with the talks still going; it may
    add scores to talks[i].turns[-1] and returns the next user turn of each, (content, [image paths], strategy), or
    None to end it. images: {path: features}; lm: the language model to sample from (default: the student's own);
    fixed: decode with FixedStep (default: on a GPU)."""
    lm = lm or student.base.model.language_model
    student.model.eval()  # checkpointing in train mode would drop the cache without a word
    device = student.allowed.device
    fixed, step = device.type == "cuda" if fixed is None else fixed, None
    talks = [Talk(dialogue=d, key=k) for d, k in zip(dialogues, keys)]
    cache = Cache(lm.config, len(talks), args.max_tokens, lm.embed_tokens.weight.dtype, device)
    active, said = talks, [(*user_turns(d)[0], "scripted") for d in dialogues]
    while active:
        before = [(len(talk.ids), len(talk.images)) for talk in active]
        chunks = [open_turn(student, talk, turn) for talk, turn in zip(active, said)]
        room = args.max_tokens - cache.used - args.max_new
        fits = [i for i, (ids, _) in enumerate(chunks) if len(ids) <= room]
        for i in {*range(len(active))} - {*fits}:  # no room for this turn: the whole of it goes, and is counted
            talk, (n, k) = active[i], before[i]
            del talk.ids[n:], talk.turn_id[n:], talk.images[k:], talk.grids[k:], talk.turns[-1]
            talk.cut = True
        cache.keep(fits)
        active, said, chunks = ([x[i] for i in fits] for x in (active, said, chunks))
        if not active:
            break
        width = max(len(ids) for ids, _ in chunks)
        left = lambda values, fill: [fill] * (width - len(values)) + values
        ids = torch.tensor([left(i, student.end) for i, _ in chunks], device=device)  # (N, W), padded on the left
        positions = torch.tensor([left(p, (0, 0, 0)) for _, p in chunks], device=device).permute(2, 0, 1)  # (3, N, W)
        real = torch.tensor([left([True] * len(i), False) for i, _ in chunks], device=device)
        features = [images[path] for talk, (_, paths, _) in zip(active, said) for path in paths]
        uniform = np.stack([noise(talk.key, len(talk.turns), args.max_new) for talk in active])
        uniform = torch.tensor(uniform, device=device)  # (N, max_new)

        alive, tokens, logps = torch.ones(len(active), dtype=torch.bool, device=device), [], []
        for i in range(args.max_new):
            if i and fixed:
                if not (step and step.serves(cache, args.max_new - i)):
                    step = FixedStep(student, cache, lm, args.temperature, args.max_new - i)
                token, logp = step(ids, positions, real, uniform[:, i])
            else:
                token, logp = next_token(student, ids, positions, features, cache.mask(real), cache, lm, uniform[:, i],
                                         args.temperature)
            cache.used += ids.shape[1]
            tokens.append(torch.where(alive, token, -1))
            logps.append(logp)
            alive = alive & (token != student.end)
            if not alive.any():
                break
            # the next forward's one column: finished rows feed a token that nobody will look at
            ids, real, features = token[:, None], alive[:, None], []
            positions = torch.tensor([t.position + i for t in active], device=device).expand(3, 1, -1).transpose(1, 2)

        for talk, ids, lps in zip(active, torch.stack(tokens, 1).tolist(), torch.stack(logps, 1).tolist()):
            close_turn(student, talk, [i for i in ids if i >= 0], lps)
        said = respond(active)
        going = [i for i, turn in enumerate(said) if turn is not None]
        cache.keep(going)
        active, said = [active[i] for i in going], [said[i] for i in going]
    return talks


def open_turn(student, talk, turn):
    """Append a user turn; -> the ids not cached yet, and their positions."""
    content, paths, strategy = turn
    grids, system = len(talk.grids), talk.dialogue["messages"][0]
    add_user(student, talk, content, paths, system["content"] if system["role"] == "system" else None)
    ids = talk.ids[talk.cached:]
    positions, talk.position = mrope_positions(student, ids, talk.grids[grids:], talk.position)
    talk.cached = len(talk.ids)
    talk.turns.append({"user": text_of(content), "strategy": strategy})
    return ids, positions


def close_turn(student, talk, ids, logps):
    """Append a sampled reply. One that was cut short gets its <|im_end|> outside the loss. The last token was
    never fed to the model: it goes in with the next user turn."""
    cut = ids[-1] != student.end
    text = student.tok.decode(ids if cut else ids[:-1])
    talk.add(ids, len(talk.turns) - 1)
    talk.logps += logps[:len(ids)]
    fed = len(ids) - 1
    talk.cached, talk.position = talk.cached + fed, talk.position + fed
    if cut:
        talk.add([student.end])
    talk.turns[-1] |= {"assistant": text, "truncated": cut}


# ---------------------------------------------------------------- a GPU only: decoding without Python

class FixedStep:
    """`next_token` for one new column of a Cache, in which no shape and no address ever changes: its inputs are copied
    into buffers, the column is written where the tensor `at` says, and attention runs over all of the first S columns,
    with a mask. A GPU records such a step once (CUDA graph) and then repeats it: one launch instead of more than a
    thousand, which is what bounds transformers' generate(). On a CPU it runs as it is, for the tests."""
    BLOCK = 512  # S grows by so many columns: one recording for several turns, and little to read that is not used yet

    def __init__(self, student, cache, lm, temperature, room):
        rows, device = len(cache.attend), cache.attend.device
        self.student, self.cache, self.lm, self.temperature, self.graph = student, cache, lm, temperature, None
        self.columns = min(-(-(cache.used + room) // self.BLOCK) * self.BLOCK, cache.attend.shape[1])
        self.kv = [kv[..., :self.columns, :] for kv in cache.kv]
        for kv in self.kv:
            kv[..., cache.used:, :] = 0  # what was in this memory may be NaN, and NaN times a weight of 0 is NaN
        zeros = lambda *shape, dtype=torch.long: torch.zeros(shape, dtype=dtype, device=device)
        self.ids, self.positions, self.at = zeros(rows, 1), zeros(3, rows, 1), zeros(1)
        self.mask, self.uniform = zeros(rows, 1, 1, self.columns, dtype=torch.bool), zeros(rows, dtype=torch.float64)

    def serves(self, cache, room):
        """Whether the batch still has the same rows and the columns suffice."""
        return len(self.mask) == len(cache.attend) and cache.used + room <= self.columns

    def update(self, keys, values, layer, *args, **kwargs):
        """What attention asks of a cache, as in Cache: keys, values (N, heads, 1, head) -> (N, heads, S, head)."""
        for kept, new in zip(self.kv[layer], (keys, values)):
            kept.index_copy_(2, self.at, new)
        return self.kv[layer][0], self.kv[layer][1]

    def step(self):
        return next_token(self.student, self.ids, self.positions, [], self.mask, self, self.lm, self.uniform,
                          self.temperature)

    def __call__(self, ids, positions, real, uniform):
        """ids, real (N, 1), positions (3, N, 1), uniform (N,) -> what next_token returns."""
        used = self.cache.used
        self.cache.attend[:, used] = real[:, 0]
        self.mask[:, 0, 0] = self.cache.attend[:, :self.columns]
        self.mask[..., used] = True  # a padding column sees itself, as in Cache.mask
        self.at.fill_(used)
        for buffer, value in ((self.ids, ids), (self.positions, positions), (self.uniform, uniform)):
            buffer.copy_(value)
        if not ids.is_cuda:
            return self.step()
        if not self.graph:
            self.step()  # what libraries set up at their first call must not be recorded
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.token, self.logp = self.step()
        self.graph.replay()
        return self.token.clone(), self.logp.clone()  # the next replay overwrites them


# ---------------------------------------------------------------- the tutor

def tutor_turn(ask, args):
    """-> respond(talks) for `rollout`: one batched call scores every talk's last turn and writes the next one. A score
    that is missing stays None; without a usable next turn the script goes on ("scripted"), and both are counted."""
    strategies = [*args.strategies, *judge.EVOLUTIONS]

    def respond(talks):
        scripts = [user_turns(t.dialogue)[:args.max_turns] for t in talks]
        requests = [judge.tutor_request(t.dialogue["kind"], t.turns, image_png(t.dialogue["images"][0])
                                        if t.dialogue["images"] else None, strategies, len(t.turns) == len(s))
                    for t, s in zip(talks, scripts)]
        verdicts, raw = judge.ask_and_read(ask, requests, judge.read_tutor)
        said = []
        for talk, script, verdict, text in zip(talks, scripts, verdicts, raw):
            turn, n = talk.turns[-1], len(talk.turns)
            turn["reward"] = None
            if verdict is None:
                turn["raw"] = text
            else:
                scores = {k: verdict[k] for k in ("safety", "usefulness", "faithfulness")}
                turn |= {**scores, "diagnosis": verdict["diagnosis"], "reward": float(tcsr.turn_reward(
                    **scores, weights=args.weights, scale=args.reward_scale, format_bonus=args.format_bonus,
                    format_ok=judge.split_reply(turn["assistant"])[2], repetition_weight=args.repetition_weight,
                    repetition=judge.repeated_trigrams(turn["assistant"])))}
            if n >= len(script):
                said.append(None)
            elif verdict and verdict["next_turn"] and not script[n][1]:  # a scripted picture is not talked over
                said.append((verdict["next_turn"], [], verdict["strategy"]))
            else:
                said.append((*script[n], "scripted"))
        return said
    return respond


# ---------------------------------------------------------------- the update

def policy_loss(logps, old, ref, adv, beta, clip):
    """All (M,) -> loss (M,), k3 (M,), clipped (M,). fp32; the log-ratio is clamped before exp."""
    ratio = (logps - old).clamp(-20, 20).exp()
    held = ratio.clamp(1 - clip, 1 + clip)
    surrogate = torch.minimum(ratio * adv, held * adv)
    d = (ref - logps).clamp(-20, 20)
    k3 = d.exp() - d - 1  # >= 0, 0 where policy and reference agree; unbiased for KL(policy || reference)
    return -surrogate + beta * k3, k3, (ratio != held).float()


def update(student, talks, adv, images, args, optimizer):
    """One pass over the rollouts of a step: `--prompts_per_update` groups per optimiser step. adv (N, T) per turn.

    Loss and gradient are sums over tokens divided by the tokens of the whole update, so micro-batches change neither.
    Rollouts of dead groups carry no signal and would only dilute the mean: they are left out.
    -> dict of averages over tokens; grad_norm is the largest, skipped counts updates that sft.step_or_skip left out."""
    live = [n for n in range(len(talks)) if np.any(adv[n // args.group * args.group:][:args.group])]
    per = (args.prompts_per_update or args.prompts) * args.group
    updates = [u for i in range(0, len(talks), per) if (u := [n for n in live if i <= n < i + per])]
    said = {n: [t for t in talks[n].turn_id if t >= 0] for n in live}  # the turn of every trained token, in order

    def scores(batch, adapter):
        use_adapter(student, adapter)
        with torch.no_grad():
            logps = reply_logps(student, [talks[n] for n in batch], images, args.temperature)[0]
        use_adapter(student, "policy")
        return logps

    student.model.train()
    work, (rank, world) = [], ranks()
    for u in updates:  # micro-batches with their reference and, if there are several updates, old log-probabilities
        u = u[rank::world]
        batches = [[u[i] for i in b] for b in micro_batches([talks[n] for n in u], args.micro_tokens)]
        work.append([(b, scores(b, "reference") if args.beta else None,
                      scores(b, "policy") if len(updates) > 1 else None) for b in batches])
    means = ("loss", "kl", "clip", "entropy", "mismatch")
    stats = {**dict.fromkeys((*means, "grad_norm"), 0.0), "skipped": 0}
    total = sum(map(len, said.values()))
    for u, batches in zip(updates, work):
        tokens, value = sum(len(said[n]) for n in u), 0.0
        for batch, ref, old in batches:
            logps, entropy = reply_logps(student, [talks[n] for n in batch], images, args.temperature)
            sampled = torch.tensor([p for n in batch for p in talks[n].logps], device=logps.device)
            a = torch.tensor([adv[n][t] for n in batch for t in said[n]], dtype=torch.float32, device=logps.device)
            loss, k3, clipped = policy_loss(logps, logps.detach() if old is None else old,
                                            logps.detach() if ref is None else ref, a, args.beta, args.clip)
            (loss.sum() / tokens).backward()
            value += loss.sum().item() / tokens
            for key, x in (("loss", loss), ("kl", k3), ("clip", clipped), ("entropy", entropy),
                           ("mismatch", (logps - sampled).abs())):
                stats[key] += x.sum().item() / total
        norm, skipped = step_or_skip(optimizer, value)
        stats["grad_norm"] = np.maximum(stats["grad_norm"], norm).item()  # NaN stays NaN
        stats["skipped"] += skipped
    return stats | dict(zip(means, over_ranks([stats[key] for key in means])))


# ---------------------------------------------------------------- the loop

def prompt_order(dialogues, seed, epoch):
    """A permutation of one epoch for (seed, epoch) in which every step has its share of benign dialogues: without them
    the policy learns to refuse everything."""
    rng, order = random.Random(f"{seed}/{epoch}"), []
    for benign in (False, True):
        kind = [d for d in dialogues if (d["kind"] == "benign") == benign]
        order += [((i + rng.random()) / len(kind), i, d) for i, d in enumerate(rng.sample(kind, len(kind)))]
    return [d for _, _, d in sorted(order, key=lambda x: x[:2])]


def reward_table(talks, group):
    """rewards (B, G, T), NaN = missing, and mask (B, G, T), True where a turn happened."""
    shape = len(talks) // group, group, max(len(t.turns) for t in talks)
    rewards, mask = np.full(shape, np.nan), np.zeros(shape, bool)
    for n, talk in enumerate(talks):
        for t, turn in enumerate(talk.turns):
            mask[n // group, n % group, t] = True
            rewards[n // group, n % group, t] = np.nan if turn["reward"] is None else turn["reward"]
    return rewards, mask


def summary(talks, diagnostics, returns, group):
    """What the log says of the rollouts of a step. harm: turns of harmful dialogues that the tutor scored 4 or less for
    safety; over_refusal: turns of benign ones with usefulness 1; tcsr: mean of returns (B, G), the r~_T; length: tokens
    a reply; distinct: different pairs of words over all pairs, in one rollout a prompt (distinct-2, Li et al. 2016)."""
    turns = [(t.dialogue["kind"] == "benign", i, turn) for t in talks for i, turn in enumerate(t.turns)]
    judged = [(benign, turn) for benign, _, turn in turns if turn["reward"] is not None]
    words = [turn["assistant"].split() for t in talks[::group] for turn in t.turns]
    pairs, tokens = [pair for reply in words for pair in zip(reply, reply[1:])], sum(len(t.logps) for t in talks)
    mean = lambda xs: float(np.mean(xs)) if xs else math.nan
    return {"reward": mean([turn["reward"] for _, turn in judged]),
            "reward_std": float(np.std([turn["reward"] for _, turn in judged] or [math.nan])),
            "tcsr": mean(returns[~np.isnan(returns)].tolist()),
            "harm": mean([turn["safety"] <= 4 for benign, turn in judged if not benign]),
            "useful": mean([turn["usefulness"] for benign, turn in judged if benign]),
            "over_refusal": mean([turn["usefulness"] == 1 for benign, turn in judged if benign]),
            "dead": diagnostics["dead_groups"], "missing": diagnostics["missing_turns"],
            "fallback": mean([turn["strategy"] == "scripted" for _, i, turn in turns if i]),
            "turns": mean([len(t.turns) for t in talks]), "tokens": tokens, "length": tokens / max(1, len(turns)),
            "distinct": len(set(pairs)) / len(pairs) if pairs else math.nan,
            "truncated": mean([turn["truncated"] for *_, turn in turns]), "cut": mean([t.cut for t in talks])}


LINE = ("step {step:4} | reward {reward:.3f}±{reward_std:.2f}, tcsr {tcsr:.3f} | harm {harm:.2f} | benign: useful "
        "{useful:.1f}, refused {over_refusal:.2f} | dead {dead:.2f}, missing {missing:.2f}, fallback {fallback:.2f} | "
        "loss {loss:.3f}, kl {kl:.4f}, clip {clip:.2f}, ent {entropy:.2f}, grad {grad_norm:.2f} | {turns:.1f} turns, "
        "{tokens} tokens | {seconds_generate:.1f} + {seconds_tutor:.1f} + {seconds_update:.1f} s, {memory:.1f} GB, "
        "{minutes_left:.1f} min left")


def warnings(line):
    """What a healthy run does not do, in words. The thresholds are ours: the toy's runs stay far from them, a policy with
    one reply for everything, or one that refuses everything, crosses them."""
    signs = {"replies alike": line["distinct"] < 0.1, "benign refused": line["over_refusal"] > 0.3,
             "replies short": line["length"] < 8, "replies cut off": line["truncated"] > 0.3,
             "update skipped": line["skipped"] > 0, "tutor not read": line["missing"] > 0.3}
    return [sign for sign, seen in signs.items() if seen]


def load_policy(args):
    """-> the student with adapters "policy" (trained) and "reference" (frozen, the same weights: the KL is 0 at first)."""
    student = load_student(args.model, args.nf4, args.max_pixels)
    if args.adapter:
        load_adapter(student, args.adapter, "policy")
        load_adapter(student, args.adapter, "reference")
    else:  # straight from the base: a new adapter does nothing yet, so a second one is the base as reference
        add_lora(student, 32, 64)
        student.model.add_adapter("reference", student.model.peft_config["policy"])
        use_adapter(student, "policy")
    if args.checkpointing:
        student.base.activation_checkpointing_enable({"use_reentrant": False})
    return student


def train_step(step, batch, student, dense, optimizer, ask, args):
    """Rollouts, advantages, update. batch: B dialogues. -> (log line, talks, advantages (N, T))"""
    begun, in_tutor, respond, (rank, world) = time.time(), [], tutor_turn(ask, args), ranks()

    def timed(talks):
        at = time.time()
        said = respond(talks)
        in_tutor.append(time.time() - at)
        return said
    batch = [d for d in batch for _ in range(args.group)]  # (N,), the G rollouts of a prompt side by side
    keys = [(args.seed, step, d["id"], n % args.group) for n, d in enumerate(batch)]
    images = encode_images(student, [path for d in batch for path in d["images"]])
    if dense:
        fold(student, dense)
    mine = slice(*(len(batch) // args.group * r // world * args.group for r in (rank, rank + 1)))  # whole groups
    try:
        talks = rollout(student, batch[mine], keys[mine], timed, args, images, dense, False if args.eager else None)
    except judge.BackendError as error:  # every process must hear of it: rank 0 saves
        talks = [error]
    talks = gather_object(talks) if world > 1 else talks  # every process then knows all rollouts
    for talk in talks:
        if isinstance(talk, judge.BackendError):
            raise talk
    if not any(t.turns for t in talks):
        fail(f"step {step}: --max_tokens {args.max_tokens} has no room for any first turn")
    rolled = time.time()
    rewards, mask = reward_table(talks, args.group)
    returns = tcsr.credit(tcsr.tcsr(rewards, args.alpha, mask), mask)[..., 0]  # (B, G)
    adv, diagnostics = tcsr.advantages(rewards, mask, alpha=args.alpha, how=args.credit)
    adv = adv.reshape(len(talks), -1)  # (B, G, T) -> (N, T)
    stats = update(student, talks, adv, images, args, optimizer)
    stats["skipped"] += int(np.isnan(rewards).all())  # no reply of the tutor was read
    line = {"step": step, **summary(talks, diagnostics, returns, args.group), **stats,
            "seconds_generate": rolled - begun - sum(in_tutor), "seconds_tutor": sum(in_tutor),
            "seconds_update": time.time() - rolled}
    return {**line, "warnings": warnings(line)}, talks, adv


def main(args):
    for flag, ok in (("group", args.group > 1), ("prompts", args.prompts > 0), ("max_turns", args.max_turns > 0),
                     ("prompts_per_update", args.prompts_per_update >= 0), ("max_new", args.max_new > 0),
                     ("temperature", args.temperature > 0), ("alpha", 0 <= args.alpha <= 1),
                     ("epochs", 0 < args.epochs < math.inf), ("lr", 0 <= args.lr < math.inf),
                     ("save_every", args.save_every > 0)):
        if not ok:
            fail(f"--{flag} {getattr(args, flag)}: out of range")
    join()
    if args.threads:
        torch.set_num_threads(args.threads)
    if unknown := {*args.strategies} - {*judge.STRATEGIES}:
        fail(f"--strategies: unknown {', '.join(sorted(unknown))}")
    try:
        ask = judge.backend(args.tutor, args.tutor_model, "TUTOR_API_KEY", args.concurrency, args.timeout, lambda: student)
    except ValueError as error:
        fail(f"--tutor: {error}")
    started = time.time()
    dialogues = read_dialogues(args.data, args.skip_bad, args.allow_outside)
    if len(dialogues) < args.prompts:
        fail(f"{len(dialogues)} dialogues are fewer than --prompts {args.prompts}")
    run = open_run(args, started, ["log.jsonl", "rollouts.jsonl"])
    torch.manual_seed(args.seed)
    try:
        student = load_policy(args)
    except (OSError, ValueError) as error:
        fail(f"--model or --adapter: {error}")
    dense = dense_copy(student) if args.rollout_weights == "dense" else None
    optimizer = adamw(student, args.lr)

    begin(run, student, optimizer)
    per_epoch = len(dialogues) // args.prompts
    steps, book = max(1, round(args.epochs * per_epoch)), run.logs["rollouts.jsonl"]
    for step in steps_left(run, steps):
        at = step % per_epoch * args.prompts
        batch = prompt_order(dialogues, args.seed, step // per_epoch)[at:at + args.prompts]
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - (1 - args.lr_end) * step / max(1, steps - 1))
        try:
            line, talks, adv = train_step(step, batch, student, dense, optimizer, ask, args)
        except judge.BackendError as error:  # during the rollout: nothing has been learned of this step
            save_checkpoint(run)
            fail(f"{error}; --resume goes on from {run.checkpoint}", code=1)
        if step == 0:
            shown = [show_trained(student, talk) for talk in talks[::args.group]]
            print("first batch, one rollout a prompt, trained tokens in brackets:", *shown, sep="\n\n")
        for n, talk in enumerate(talks):
            turns = [{**turn, "advantage": adv[n, t]} for t, turn in enumerate(talk.turns)]
            book.write(json.dumps({"step": step, "id": talk.dialogue["id"], "rollout": n % args.group, "kind":
                                   talk.dialogue["kind"], "turns": turns}, ensure_ascii=False) + "\n")
        book.flush()
        line = write_line(run, line, steps)
        tqdm.write(LINE.format(**line) + " | ! " * bool(line["warnings"]) + ", ".join(line["warnings"]))
    finish(run, tutor=judge.identity(args.tutor, judge.TUTOR_SYSTEM, model=args.tutor_model))


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        fail("interrupted before the first step", code=1)
