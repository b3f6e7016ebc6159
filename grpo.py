"""
Stage III of SaFeR-Steer: multi-turn GRPO with a tutor in the loop, on one GPU.

G copies of the student play each dialogue side by side. After every turn the tutor scores each
reply and writes the next attack, so each copy is attacked according to what it has just said.
One step:

1. Roll out B dialogues x G copies                                      rollout(), ask_tutor()
2. Turn scores -> turn rewards -> TCSR -> group-normalized advantages   turn_reward(), tcsr.py
3. Policy gradient on the sampled tokens, with PPO's clipped ratio
   to the sampler, and a KL penalty against the SFT model               policy_loss(), update()

There is one optimizer step per batch of rollouts, so the ratio is close to 1 and the clip rarely
acts. They correct for the small difference between the sampler's and the learner's arithmetic.

Laptop, toy world:  make toy
One GPU, 3B or 7B:  python grpo.py --model Qwen/Qwen2.5-VL-3B-Instruct --adapter out/sft \\
                        --data data/synth/rl.jsonl --out out/grpo \\
                        --tutor http://localhost:8000/v1 --tutor_model NAME

OUT becomes an adapter with checkpoints, as in sft.py. log.jsonl has one line per step,
rollouts.jsonl every dialogue with its scores, rewards and advantages, and report.html shows both.

Shapes: B prompts, G rollouts each, N = B * G rows, T turns, L tokens, V vocabulary, H hidden size,
M sampled tokens.
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

import judge
import tcsr
from data.dialogues import (fingerprint, first_picture, read_dialogues, text_of, thumbnail,
                            user_turns)
from sft import (Row, adamw, add_lora, bracketed, check_finite, encode_images, hidden_states,
                 load_adapter, load_checkpoint, load_student, micro_batches, mrope_positions,
                 open_log, optimizer_step, policy_logits, reply_logps, save_adapter,
                 save_checkpoint, stop_signals, system_of, use_adapter, user_row, write_row)
from peft.utils.integrations import dequantize_module_weight    # after sft, which quiets peft

# -----------------------------------------------------------------------------
# command line

# What --like sets. docs/paper_vs_code.md compares them.
OURS = {"weights": (0.6, 0.3, 0.1), "scale": "unit", "format_bonus": None, "repetition_weight": 0.0,
        "alpha": 0.3, "credit": "trajectory", "divide_by_std": True, "beta": 0.1,
        "kl_loss": "corrected"}
METHODS = {
    "ours": OURS,
    "paper": {**OURS, "credit": "sum", "divide_by_std": False, "kl_loss": "k3"},
    "released": {**OURS, "weights": (0.4, 0.4, 0.2), "scale": "tenth", "format_bonus": 1.0,
                 "repetition_weight": 0.2, "beta": 0.001, "kl_loss": "k3"},
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Multi-turn GRPO with a tutor in the loop",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    number = judge.number
    add = parser.add_argument_group("input and output").add_argument
    add("--model", required=True, help="base model: Hugging Face name or folder")
    add("--adapter", help="adapter of sft.py: the start, and the reference of the KL penalty; "
                          "without it both are the base model")
    add("--data", required=True, nargs="+", help="JSONL files of dialogues or seeds")
    add("--out", required=True, help="output folder")
    add("--nf4", action=argparse.BooleanOptionalAction, default=True, help="4-bit base (QLoRA)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add = parser.add_argument_group("tutor").add_argument
    add("--tutor", required=True, help="address of a server, or a Python module with ask")
    add("--tutor_model", help="its model name; the key is in TUTOR_API_KEY")
    add("--tutor_extra", type=judge.json_object, default={},
        help="more fields of the request body, as JSON; null removes a field")
    add("--strategies", nargs="+", default=list(judge.STRATEGIES), choices=list(judge.STRATEGIES),
        metavar="NAME", help="attack strategies that the tutor may use")
    add("--dry_run", action="store_true", help="ask the tutor three times, estimate the run, stop")
    add = parser.add_argument_group("rollouts").add_argument
    add("--prompts", type=number(int, 1), default=8, help="dialogues per step (B; paper: 64)")
    add("--group", type=number(int, 2), default=5, help="rollouts per dialogue (G, paper)")
    add("--max_turns", type=number(int, 1), default=10, help="turns per dialogue (paper)")
    add("--max_new", type=number(int, 1), default=512, help="new tokens per turn")
    add("--max_tokens", type=number(int, 16, 10 ** 6), default=8192, help="tokens per dialogue")
    add("--temperature", type=number(float, 0.01, 10), default=1.0, help="of sampling and loss")
    add = parser.add_argument_group("reward and advantage").add_argument
    add("--like", choices=list(METHODS), default="ours",
        help="our defaults, the paper's algorithm or that of its released code")
    add("--alpha", type=number(float, 0, 1), help="weight of the minimum in TCSR; set by --like")
    add("--credit", choices=("trajectory", "turn", "sum"), help="see tcsr.py; set by --like")
    add("--unjudged_last", action="store_true",
        help="the last turn's reward is 0, as in the released code")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=number(float, 0, 10 ** 4), default=1.0,
        help="passes over the data (paper)")
    add("--lr", type=number(float, 0, 1), default=1e-4,
        help="ten times the paper's, for LoRA; decays linearly to 10%%")
    add("--beta", type=number(float, 0), help="weight of the KL penalty; set by --like")
    add("--clip", type=number(float, 0, 1), default=0.2, help="PPO's epsilon")
    add("--micro_tokens", type=number(int, 1), default=8192, help="padded tokens per forward pass")
    add("--save_every", type=number(int, 1), default=10, help="steps between two checkpoints")
    add("--seed", type=judge.seed, default=0, help="order of the data, sampling noise")
    args = parser.parse_args(argv)
    for name, value in METHODS[args.like].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


# -----------------------------------------------------------------------------
# sampler: a dense copy of the weights, a cache for the whole dialogue


def dense_copy(student):
    """
    A language model of plain linear layers to sample from: NF4 with an adapter is several times
    slower. It shares embeddings, norms and biases with the student; merge_adapter fills the rest.
    """
    lm = student.base.model.language_model
    with torch.device("meta"):
        dense = type(lm)._from_config(lm.config)
    dense.embed_tokens, dense.rotary_emb = lm.embed_tokens, lm.rotary_emb
    for name, module in dense.named_modules():
        source = lm.get_submodule(name)
        if isinstance(module, torch.nn.Linear):
            weight = lm.embed_tokens.weight.new_empty(module.weight.shape)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
            module.bias = getattr(source, "base_layer", source).bias
        elif name.endswith("norm"):
            module.weight = source.weight
    return dense.eval()


@torch.no_grad()
def merge_adapter(student, dense):
    """
    Weights of the dense copy <- dequantized base weights + the policy's LoRA update. This starts
    from the base every time, so rounding does not add up.
    """
    lm = student.base.model.language_model
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear):
            source = lm.get_submodule(name)
            weight = dequantize_module_weight(getattr(source, "base_layer", source)).float()
            if "policy" in getattr(source, "lora_A", {}):
                weight = weight + source.get_delta_weight("policy").float()
            module.weight.copy_(weight)


class KVCache:
    """
    Keys and values of N rollouts, allocated once for whole dialogues of up to S tokens.

    Token l of a row is always stored in column l of that row. So a token may look at exactly the
    columns up to its own, and what lies beyond is padding or the rest of an earlier batch.
    """

    def __init__(self, config, rows, columns, dtype, device):
        head = config.hidden_size // config.num_attention_heads
        shape = (rows, config.num_key_value_heads, columns, head)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.graph, self.graph_width = None, 0

    def place(self, columns, width):
        """
        Say where the next forward pass writes, columns (N, L), and that it reads the first `width`
        columns. -> its attention mask (N, 1, L, width)
        """
        columns = columns.clamp(max=self.keys[0].shape[2] - 1)      # padding may lie behind the end
        _, heads, _, head = self.keys[0].shape
        self.index = columns[:, None, :, None].expand(-1, heads, -1, head)  # (N, heads, L, head)
        self.width = width
        return (torch.arange(width, device=columns.device) <= columns[..., None])[:, None]

    def update(self, keys, values, layer, *args, **kwargs):
        """What the attention layers of transformers ask of a cache. keys: (N, heads, L, head)."""
        self.keys[layer].scatter_(2, self.index, keys)
        self.values[layer].scatter_(2, self.index, values)
        return self.keys[layer][:, :, :self.width], self.values[layer][:, :, :self.width]

    def keep(self, rows):
        """Drop the rows of dialogues that have ended."""
        if len(rows) < len(self.keys[0]):
            for layer in range(len(self.keys)):
                self.keys[layer] = self.keys[layer][rows]
                self.values[layer] = self.values[layer][rows]
            self.graph = None

    def recorded(self, step, width, inputs):
        """
        On a GPU: step(width)(*inputs) as a CUDA graph. The width is rounded up to 512 columns, so
        that a graph serves many steps; the columns behind a row's own are masked anyway.
        """
        width = min(math.ceil(width / 512) * 512, self.keys[0].shape[2])
        if self.graph is None or self.graph_width != width:
            self.graph, self.graph_width = Recorded(step(width), *inputs), width
        return self.graph(*inputs)


class Recorded:
    """
    A function whose GPU work is recorded once as a CUDA graph and then replayed. Launching the
    thousand kernels of a decode step one by one takes longer than the kernels themselves.
    """

    def __init__(self, function, *inputs):
        self.inputs = [x.clone() for x in inputs]
        function(*self.inputs)          # libraries set themselves up, which must not be recorded
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs):
        for buffer, value in zip(self.inputs, inputs):
            buffer.copy_(value)
        self.graph.replay()
        return [x.clone() for x in self.outputs]


# -----------------------------------------------------------------------------
# rollout


@dataclass
class Rollout(Row):
    """One copy of a dialogue: its token row, and what was said and scored in it."""
    dialogue: dict = None
    key: tuple = ()             # of the sampling noise: (seed, step, dialogue, copy)
    user: tuple = None          # the next user turn: (content, image paths, strategy)
    turns: list = field(default_factory=list)       # dicts: user, assistant, strategy, scores, ..
    logps: list = field(default_factory=list)       # of the sampled tokens, by the sampler
    cached: int = 0             # tokens whose keys and values are in the cache
    position: int = 0           # rotary position of the next token
    cut: bool = False           # ended early, because --max_tokens has no room for the next turn


def noise(key, turn, n):
    """
    n uniform numbers for one turn. They depend on the key only, so the samples of a rollout depend
    neither on timing nor on the other rollouts of the batch.
    """
    digest = hashlib.sha256(repr((*key, turn)).encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    return np.random.Generator(bits).random(n)


def sample(logits, uniform, temperature):
    """logits (N, V), uniform (N,) -> tokens (N,): inverse transform sampling, greedy at 0."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = logits.softmax(-1).double().cumsum(-1)                            # (N, V)
    token = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1)
    return token.clamp(max=logits.shape[-1] - 1)


def next_token(student, hidden, uniform, temperature):
    """hidden (N, H), uniform (N,) -> a token per row and its log-probability, (N,) each."""
    logits = policy_logits(student, hidden, temperature or 1.0)             # (N, V)
    token = sample(logits, uniform, temperature)
    return token, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]


def pack(student, active):
    """
    The tokens of each rollout that are not in the cache yet, padded on the right to W columns.
    -> ids (N, W), positions (3, N, W), cache columns (N, W), index of the last real token (N,)
    """
    device = student.allowed.device
    chunks = [r.ids[r.cached:] for r in active]
    width = max(len(chunk) for chunk in chunks)
    ids, positions, columns = [], [], []
    for r, chunk in zip(active, chunks):
        grids = r.grids[len(r.grids) - len(r.user[1]):]         # images of the newest user turn
        where, r.position = mrope_positions(student, chunk, grids, r.position)
        padding = width - len(chunk)
        ids.append(chunk + [student.end] * padding)
        positions.append(where + [(0, 0, 0)] * padding)
        columns.append(list(range(r.cached, r.cached + width)))
    positions = torch.tensor(positions, device=device).permute(2, 0, 1)     # (3, N, W)
    last = torch.tensor([len(chunk) - 1 for chunk in chunks], device=device)
    return (torch.tensor(ids, device=device), positions, torch.tensor(columns, device=device), last)


@torch.no_grad()
def generate(student, lm, cache, active, features, args):
    """
    Sample one reply for each active rollout: feed its new tokens, then one token per row and step
    until every row has said <|im_end|> or args.max_new is reached.
    -> lists of token ids and of their log-probabilities, one per rollout
    """
    uniform = np.stack([noise(r.key, len(r.turns), args.max_new) for r in active])
    uniform = torch.tensor(uniform, device=student.allowed.device)          # (N, max_new)
    ids, positions, columns, last = pack(student, active)
    used = int((columns[:, 0] + last).max()) + 1                            # columns of the cache

    # the new tokens in one pass; each row's first token is sampled from its last hidden state
    mask = cache.place(columns, used)
    hidden = hidden_states(student, ids, positions, features, mask, cache, lm)      # (N, W, H)
    rows = torch.arange(len(active), device=last.device)
    token, logp = next_token(student, hidden[rows, last], uniform[:, 0], args.temperature)

    # where each row's next token goes
    positions = torch.tensor([r.position for r in active], device=last.device)
    positions = positions.expand(3, 1, -1).transpose(1, 2)                  # (3, N, 1)
    columns = columns[rows, last][:, None] + 1                              # (N, 1)

    def step(width):
        """A function that feeds one token per row and samples the next, on `width` columns."""
        def decode(ids, positions, columns, uniform):
            mask = cache.place(columns, width)
            hidden = hidden_states(student, ids, positions, [], mask, cache, lm)
            return next_token(student, hidden[:, 0], uniform, args.temperature)
        return decode

    alive = torch.ones(len(active), dtype=torch.bool, device=last.device)
    tokens, logps = [], []
    for i in range(args.max_new):
        tokens.append(torch.where(alive, token, -1))                        # -1: the row has ended
        logps.append(logp)
        alive = alive & (token != student.end)
        if i + 1 == args.max_new or not alive.any():
            break
        inputs = (token[:, None], positions + i, columns + i, uniform[:, i + 1])
        if token.is_cuda:
            token, logp = cache.recorded(step, used + i + 1, inputs)
        else:
            token, logp = step(used + i + 1)(*inputs)

    replies, all_logps = [], []
    for ids, row in zip(torch.stack(tokens, 1).tolist(), torch.stack(logps, 1).tolist()):
        ids = [token for token in ids if token >= 0]
        replies.append(ids)
        all_logps.append(row[:len(ids)])
    return replies, all_logps


def open_turn(student, rollout, args):
    """Append the next user turn, or end the rollout if args.max_tokens has no room for it."""
    content, paths, _ = rollout.user
    row = user_row(student, content, paths, not rollout.ids, system_of(rollout.dialogue))
    rollout.cut = len(rollout.ids) + len(row.ids) + args.max_new > args.max_tokens
    if not rollout.cut:
        rollout.extend(row)


def close_turn(student, rollout, ids, logps):
    """Append a sampled reply, token by token as it was sampled."""
    content, _, strategy = rollout.user
    truncated = ids[-1] != student.end
    # the last sampled token was never fed to the model; it goes in with the next user turn
    rollout.cached = len(rollout.ids) + len(ids) - 1
    rollout.position += len(ids) - 1
    rollout.add(ids, turn=len(rollout.turns))
    rollout.logps += logps
    if truncated:
        rollout.add([student.end])          # closes the turn, and is not trained on
    text = student.tokenizer.decode(ids if truncated else ids[:-1])
    rollout.turns.append({"user": text_of(content), "strategy": strategy, "assistant": text,
                          "n_tokens": len(ids), "truncated": truncated})


def rollout(student, lm, dialogues, keys, tutor, images, args):
    """
    Play all dialogues side by side, one turn at a time. -> one Rollout per dialogue

    tutor(rollouts) is called once per turn with those that have just replied. It sets .user of each
    to its next user turn, or to None if the dialogue is over. images: {path: features}.
    """
    student.model.eval()        # in training mode the layers would ignore the cache
    rollouts = [Rollout(dialogue=d, key=key) for d, key in zip(dialogues, keys)]
    for r in rollouts:
        content, paths = user_turns(r.dialogue)[0]
        r.user = (content, paths, "scripted")
    cache = KVCache(lm.config, len(rollouts), args.max_tokens, lm.embed_tokens.weight.dtype,
                    student.allowed.device)
    active = rollouts
    while active:
        # user turns, as tokens
        for r in active:
            open_turn(student, r, args)
        active = keep_rows(cache, active, [not r.cut for r in active])
        if not active:
            break

        # replies
        features = [images[path] for r in active for path in r.user[1]]
        replies, logps = generate(student, lm, cache, active, features, args)
        for r, ids, row in zip(active, replies, logps):
            close_turn(student, r, ids, row)

        # scores and the next user turns
        tutor(active)
        active = keep_rows(cache, active, [r.user is not None for r in active])
    return rollouts


def keep_rows(cache, rollouts, going):
    """The rollouts that go on; the others also leave the cache."""
    cache.keep([i for i, goes in enumerate(going) if goes])
    return [r for r, goes in zip(rollouts, going) if goes]


# -----------------------------------------------------------------------------
# tutor


def rest_of_script(rollout, max_turns):
    """The user turns of the dialogue that have not been played yet, [(content, image paths)]."""
    return user_turns(rollout.dialogue)[len(rollout.turns):max_turns]


def tutor_requests(rollouts, strategies, max_turns):
    """One request per rollout: score its last turn, and write the next one (equation 17)."""
    requests = []
    for r in rollouts:
        image = first_picture(r.dialogue["images"])
        rest = rest_of_script(r, max_turns)
        candidate = text_of(rest[0][0]) if rest else None
        requests.append(judge.tutor_request(r.dialogue["kind"], r.turns, image,
                                            [*strategies, *judge.EVOLUTIONS], candidate))
    return requests


def next_user(rollout, verdict, max_turns):
    """
    The next user turn: the tutor's if there is one, else the script's. None at the end of the
    script. A scripted turn that shows a picture is never replaced.
    """
    rest = rest_of_script(rollout, max_turns)
    if not rest:
        return None
    content, paths = rest[0]
    if verdict and verdict["next_turn"] and not paths:
        return verdict["next_turn"], [], verdict["strategy"]
    return content, paths, "scripted"


def turn_reward(turn, verdict, args):
    """The reward of one turn, None if the tutor's scores are missing. Add your own terms here."""
    if verdict is None:
        return None
    return float(tcsr.turn_reward(
        verdict["safety"], verdict["usefulness"], verdict["faithfulness"],
        weights=args.weights, scale=args.scale, format_bonus=args.format_bonus,
        format_ok=judge.split_reply(turn["assistant"])[2],
        repetition=judge.repeated_trigrams(turn["assistant"]),
        repetition_weight=args.repetition_weight))


class Tutor:
    """
    tutor(rollouts), as rollout() calls it once per turn: scores the last turn of each and sets its
    next user turn. seconds: time spent here.
    """

    def __init__(self, ask, args):
        self.ask, self.args, self.seconds = ask, args, 0.0

    def __call__(self, rollouts):
        begin, args = time.time(), self.args
        requests = tutor_requests(rollouts, args.strategies, args.max_turns)
        verdicts, raw = judge.ask_and_read(self.ask, requests, judge.read_tutor)
        for r, verdict, text in zip(rollouts, verdicts, raw):
            turn = r.turns[-1]
            turn["reward"] = turn_reward(turn, verdict, args)
            turn["format_ok"] = judge.split_reply(turn["assistant"])[2]
            if verdict is None:
                turn["unread"] = text
            else:
                for name in ("safety", "usefulness", "faithfulness", "diagnosis"):
                    turn[name] = verdict[name]
            r.user = next_user(r, verdict, args.max_turns)
            if r.user is None and args.unjudged_last:
                turn["reward"] = 0.0
        self.seconds += time.time() - begin


def reward_table(rollouts, group):
    """
    rewards (B, G, T), NaN where a turn was not scored, and mask (B, G, T), True where it happened.
    A rollout that was cut did not meet its last turns, so it must not be compared: it has no turns.
    """
    shape = (len(rollouts), max(len(r.turns) for r in rollouts))            # (N, T)
    rewards, mask = np.full(shape, np.nan), np.zeros(shape, bool)
    for n, r in enumerate(rollouts):
        for t, turn in enumerate(r.turns):
            mask[n, t] = not r.cut
            rewards[n, t] = np.nan if turn["reward"] is None else turn["reward"]
    return rewards.reshape(-1, group, shape[1]), mask.reshape(-1, group, shape[1])


# -----------------------------------------------------------------------------
# update


def policy_loss(logps, old, ref, adv, clip, kl_loss):
    """
    All arguments (M,). -> policy gradient loss, KL loss, KL estimate and clipped or not, (M,) each.

    The KL estimate is k3 = exp(d) - d - 1 with d = log pi_ref - log pi, which estimates
    KL(policy || reference). As a loss ("k3", paper) it descends KL(reference || policy). Weighted
    with the ratio ("corrected", our default) it descends KL(policy || reference).
    """
    ratio = torch.exp((logps - old).clamp(-20, 20))
    clipped = ratio.clamp(1 - clip, 1 + clip)
    surrogate = torch.minimum(ratio * adv, clipped * adv)
    d = (ref - logps).clamp(-20, 20)
    k3 = torch.expm1(d) - d                         # expm1 is exact near 0
    kl = ratio * k3 if kl_loss == "corrected" else k3
    return -surrogate, kl, k3.detach(), (ratio != clipped).float()


def update(student, rollouts, adv, images, args, optimizer):
    """
    One optimizer step on all rollouts. adv (N, T): one advantage per turn. -> statistics

    Both losses are means over tokens. Groups without any advantage carry no signal, so their tokens
    do not count in the mean of the policy gradient. They do count in the mean of the KL loss.
    """
    student.model.train()
    live = adv.reshape(-1, args.group * adv.shape[1]).any(1).repeat(args.group)     # (N,)
    n_tokens = sum(len(r.logps) for r in rollouts)
    n_live = max(1, sum(len(r.logps) for r, alive in zip(rollouts, live) if alive))
    stats = {"loss": 0.0, "kl": 0.0, "clip": 0.0, "entropy": 0.0, "mismatch": 0.0}
    for batch in micro_batches(rollouts, args.micro_tokens):
        rows = [rollouts[n] for n in batch]
        if not any(row.ids for row in rows):        # not even their first turn had room
            continue
        with torch.no_grad():
            use_adapter(student, "reference")
            ref, _ = reply_logps(student, rows, images, args.temperature)           # (M,)
        use_adapter(student, "policy")
        logps, entropy = reply_logps(student, rows, images, args.temperature)       # (M,)

        # per-token values in the same order: row by row, the tokens that the student said
        old, token_adv = [], []
        for n in batch:
            old += rollouts[n].logps
            token_adv += [adv[n, t] for t in rollouts[n].turn_id if t >= 0]
        old = torch.tensor(old, device=logps.device)
        token_adv = torch.tensor(token_adv, dtype=torch.float32, device=logps.device)

        policy, kl, k3, clipped = policy_loss(logps, old, ref, token_adv, args.clip, args.kl_loss)
        loss = policy.sum() / n_live + args.beta * kl.sum() / n_tokens
        loss.backward()         # summing over the micro-batches gives the means over all tokens
        stats["loss"] += loss.item()
        stats["kl"] += k3.sum().item() / n_tokens
        stats["clip"] += clipped.sum().item() / n_tokens
        stats["entropy"] += entropy.sum().item() / n_tokens
        stats["mismatch"] += (logps - old).abs().sum().item() / n_tokens
    stats["grad_norm"], stats["healthy"] = optimizer_step(optimizer, stats["loss"])
    return stats


# -----------------------------------------------------------------------------
# training loop


def prompt_order(dialogues, seed, epoch):
    """
    A permutation of the dialogues that depends on seed and epoch only. Benign dialogues are spread
    evenly: without some of them in every step the policy learns to refuse everything.
    """
    rng, keyed = random.Random(f"{seed}/{epoch}"), []
    for benign in (False, True):
        group = [d for d in dialogues if (d["kind"] == "benign") == benign]
        rng.shuffle(group)
        for i, dialogue in enumerate(group):
            keyed.append(((i + rng.random()) / len(group), dialogue["id"], dialogue))
    keyed.sort(key=lambda item: item[:2])
    return [dialogue for _, _, dialogue in keyed]


def mean(values):
    return float(np.mean(values)) if len(values) else math.nan


def describe(rollouts, rewards, info):
    """What the log says about the rollouts of one step."""
    turns, later, harmful, benign = [], [], [], []
    for r in rollouts:
        turns += r.turns
        later += r.turns[1:]
        scored = [turn for turn in r.turns if "safety" in turn]
        (benign if r.dialogue["kind"] == "benign" else harmful).extend(scored)
    return {
        "reward": mean(rewards[~np.isnan(rewards)]),
        "return": mean(info["returns"][~np.isnan(info["returns"])]),    # what the groups compare
        "harm": mean([turn["safety"] <= 4 for turn in harmful]),
        "useful": mean([turn["usefulness"] for turn in benign]),        # 1..10
        "refused": mean([turn["usefulness"] == 1 for turn in benign]),
        "dead": info["dead_groups"],                # share of groups without any advantage
        "missing": info["missing_turns"],           # share of turns that could not be scored
        "scripted": mean([turn["strategy"] == "scripted" for turn in later]),
        "cut": mean([r.cut for r in rollouts]),     # share of rollouts
        "truncated": mean([turn["truncated"] for turn in turns]),
        "distinct": len({turn["assistant"] for turn in turns}) / len(turns),
        "tokens": sum(len(r.logps) for r in rollouts),
    }


def warnings(row):
    """Signs of a policy or a tutor that goes wrong. Runs of the toy stay far from all of them."""
    signs = {
        "no signal in any group": row["dead"] == 1,
        "benign refused": row["refused"] > 0.3,
        "replies all alike": row["distinct"] < 0.02,
        "replies truncated": row["truncated"] > 0.3,
        "dialogues cut": row["cut"] > 0.3,
        "tutor not read": row["missing"] > 0.3,
        "tutor wrote no turn": row["scripted"] > 0.3,
        "not finite, step skipped": not row["healthy"],
    }
    return [sign for sign, seen in signs.items() if seen]


def load_policy(args):
    """The student with two adapters of the same weights: "policy" is trained, "reference" stays."""
    student = load_student(args.model, args.nf4)
    if args.adapter:
        load_adapter(student, args.adapter, "policy")
        load_adapter(student, args.adapter, "reference")
    else:
        add_lora(student, 32, 64)
        student.model.add_adapter("reference", student.model.peft_config["policy"])
        use_adapter(student, "policy")
    if torch.cuda.is_available():       # recompute activations: less memory, a third more time
        student.base.activation_checkpointing_enable({"use_reentrant": False})
    return student


def tutor_preflight(ask, dialogues, steps, args):
    """Ask the tutor about three first turns, and estimate how many calls the run will need."""
    examples = []
    for dialogue in dialogues[:3]:
        user = text_of(user_turns(dialogue)[0][0])
        reply = "<thinking>I look at it.</thinking><answer>What would you like to know?</answer>"
        examples.append(Rollout(dialogue=dialogue, turns=[{"user": user, "assistant": reply}]))
    turns = mean([min(args.max_turns, len(user_turns(d))) for d in dialogues])
    calls = round(steps * args.prompts * args.group * turns)
    requests = tutor_requests(examples, args.strategies, args.max_turns)
    judge.preflight("tutor", ask, requests, judge.read_tutor, calls)


def check_rollouts(rollouts, step, args):
    """End the run if there is nothing to learn from: no turn fits, none was scored, or NaN."""
    turns = [turn for r in rollouts for turn in r.turns]
    if not turns:
        judge.bad_input(f"--max_tokens {args.max_tokens} has no room for any first turn")
    if not any("safety" in turn for turn in turns):
        raise SystemExit(f"step {step}: the tutor scored no turn; its first reply was: "
                         f"{judge.printable(turns[0]['unread'])}")
    if not all(math.isfinite(sum(r.logps)) for r in rollouts):
        raise SystemExit(f"step {step}: the policy's log-probabilities are not finite")


def check_progress(rows, steps):
    """End a run that is not finite for three steps in a row, or has no signal for ten."""
    check_finite(rows, steps)
    dead = [row["dead"] == 1 for row in rows[-10:]]
    if all(dead) and len(dead) == min(10, steps):
        raise SystemExit(f"{len(dead)} steps in a row without any signal: all rollouts of a group "
                         f"got the same reward, were cut, or were not scored")


def write_rollouts(log, step, rollouts, values, adv, group):
    """One line per rollout; each turn gets its TCSR value and its advantage."""
    for n, r in enumerate(rollouts):
        for t, turn in enumerate(r.turns):
            turn["tcsr"] = None if np.isnan(values[n, t]) else values[n, t]
            turn["advantage"] = adv[n, t]
        d = r.dialogue
        write_row(log, {"step": step, "id": d["id"], "rollout": n % group, "kind": d["kind"],
                        "images": d["images"], "turns": r.turns})


def write_report(out):
    """
    OUT/report.html: the curves of log.jsonl, and the rollouts of 30 evenly spaced steps. All steps
    of the prompts that came first are kept, so that one can follow a prompt over the epochs.
    """
    log = [json.loads(line) for line in open(f"{out}/log.jsonl", encoding="utf-8")]
    steps = [row["step"] for row in log]
    shown = {steps[round(i)] for i in np.linspace(0, len(steps) - 1, 30)}
    first, rollouts, images = set(), [], {}
    for line in open(f"{out}/rollouts.jsonl", encoding="utf-8"):
        row = json.loads(line)
        if row["step"] == steps[0]:
            first.add(row["id"])
        if row["step"] in shown or row["id"] in first:
            rollouts.append(row)
            images.update({path: thumbnail(path) for path in row["images"] if path not in images})
    judge.fill_report(f"{out}/report.html", {"title": f"nanoSteer: {out}", "log": log,
                                             "rollouts": rollouts, "images": images})


def print_row(row, steps):
    """One line per step that fits a terminal; log.jsonl has all numbers."""
    seconds = row["seconds_generate"] + row["seconds_tutor"] + row["seconds_update"]
    warned = "".join(f" | ! {warning}" for warning in row["warnings"])
    print(f"step {row['step']}/{steps} | reward {row['reward']:.3f} | return {row['return']:.3f} | "
          f"harm {row['harm']:.2f} | useful {row['useful']:.1f} | refused {row['refused']:.2f} | "
          f"dead {row['dead']:.2f} | kl {row['kl']:.3f} | {seconds:.1f} s{warned}", flush=True)


def main(argv=None):
    args = parse_args(argv)
    ask = judge.backend("tutor", args.tutor, args.tutor_model, args.tutor_extra)
    dialogues = read_dialogues(args.data)
    steps_per_epoch = len(dialogues) // args.prompts
    if steps_per_epoch == 0:
        judge.bad_input(f"{len(dialogues)} dialogues are fewer than --prompts {args.prompts}")
    steps = max(1, round(args.epochs * steps_per_epoch))
    if all(dialogue["kind"] != "benign" for dialogue in dialogues):
        print("! no benign dialogues: the policy will learn to refuse everything")
    tutor_preflight(ask, dialogues, steps, args)
    if args.dry_run:
        return
    args.data_hash = fingerprint(dialogues)
    lock = judge.open_run(args)
    stop = stop_signals()

    torch.manual_seed(args.seed)
    student = load_policy(args)
    dense = dense_copy(student)
    optimizer = adamw(student, args.lr)
    tutor = Tutor(ask, args)
    start = load_checkpoint(args.out, student, optimizer)
    rows, log = open_log(args.out, "log.jsonl", start)
    _, rollout_log = open_log(args.out, "rollouts.jsonl", start)
    for step in range(start, steps):
        begin, tutor.seconds = time.time(), 0.0
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - 0.9 * step / max(1, steps - 1))

        # the prompts of this step, each G times
        epoch, i = divmod(step, steps_per_epoch)
        prompts = prompt_order(dialogues, args.seed, epoch)[i * args.prompts:(i + 1) * args.prompts]
        batch = [dialogue for dialogue in prompts for _ in range(args.group)]
        keys = [(args.seed, step, d["id"], n % args.group) for n, d in enumerate(batch)]

        # 1. rollouts
        merge_adapter(student, dense)
        images = encode_images(student, [path for d in prompts for path in d["images"]])
        rollouts = rollout(student, dense, batch, keys, tutor, images, args)
        check_rollouts(rollouts, step, args)
        rolled_out = time.time()

        # 2. rewards and advantages
        rewards, mask = reward_table(rollouts, args.group)                      # (B, G, T)
        adv, info = tcsr.advantages(rewards, mask, alpha=args.alpha, how=args.credit,
                                    scale=args.divide_by_std)
        adv = adv.reshape(len(rollouts), -1)                                    # (N, T)

        # 3. policy gradient
        stats = update(student, rollouts, adv, images, args, optimizer)

        # logs
        row = {"step": step, **describe(rollouts, rewards, info), **stats,
               "seconds_generate": rolled_out - begin - tutor.seconds,
               "seconds_tutor": tutor.seconds, "seconds_update": time.time() - rolled_out}
        row.update(warnings=warnings(row), **getattr(ask, "used", {}))
        rows.append(row)
        write_row(log, row)
        values = tcsr.tcsr(rewards, args.alpha, mask).reshape(adv.shape)
        write_rollouts(rollout_log, step, rollouts, values, adv, args.group)
        if step == start:
            print(f"one rollout, trained tokens in brackets:\n{bracketed(student, rollouts[0])}")
        print_row(row, steps)

        # checkpoints
        check_progress(rows, steps)
        if (step + 1) % args.save_every == 0 or step + 1 == steps or stop:
            save_checkpoint(args.out, step + 1, student, optimizer, args)
            write_report(args.out)
        if stop:
            raise SystemExit("stopped by a signal; --resume goes on")
    save_adapter(student, args.out)
    write_report(args.out)
    judge.print_use(tutor=ask)
    lock.close()
    print(f"adapter in {args.out}")


if __name__ == "__main__":
    judge.run(main)
