"""sft.py: Stage II, QLoRA on the dialogues of synth.py; and everything the other scripts need to know of the student.

The paper's "synthetic bootstrapping": from static dialogues a base model learns to think, to answer and to refuse well.
The authors train all weights but the vision tower's (lr 1e-5, cosine, warm-up 0.1, 2 epochs [R]). Here the base is NF4
and only a LoRA on the language model learns, so that a 3B or 7B fits one GPU; vision tower, projector, embeddings and
lm_head keep their precision. Trained tokens are the assistant's with their <|im_end|>, nothing else.

    make toy                                                                                       # laptop, see there
    python sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data data/synth/sft.jsonl --out out/sft          # one GPU
    python sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --data data/synth/sft.jsonl --out out/sft --micro_tokens 4096

Writes OUT/adapter_model.safetensors and adapter_config.json (a PEFT folder), meta.json, log.jsonl, and every so many
steps OUT/step_NNNNNN/, from which --resume goes on, on a CPU to the same bits. Defaults called ours are
untested at 3B. To serve the result:
    python sft.py merge --model Qwen/Qwen2.5-VL-3B-Instruct --adapter out/grpo --out out/merged      # CPU, a minute
Shapes: N rows, L tokens, H hidden, V vocabulary, M trained tokens. A row is one dialogue as tokens.
"""

import argparse
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing here is compiled, but bitsandbytes would load the compiler
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it asks for a kernel package it does not need
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # a name that peft still uses

import bitsandbytes
import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import judge
from synth import (NO_REPLY, about, fail, file_hash, open_image, printable, read_dialogues, refuse_changes,
                   refuse_overwrite, text_of, write_meta)

# On Hopper torch prefers cuDNN's attention, which plans anew (half a second, others measured) for every new length:
# each micro-batch, each prompt, each step of --eager. What is left, flash and memory-efficient, plans nothing.
torch.backends.cuda.enable_cudnn_sdp(False)
# peft computes adapters in fp32: 3 % of the operations, which full precision does at a fifteenth of bf16's rate (H100).
torch.backends.cuda.matmul.allow_tf32 = True

# The language model's linears and none of the vision tower, whose MLPs have the same names.
LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["merge"]:
        p = argparse.ArgumentParser("sft.py merge", description=merge.__doc__, formatter_class=judge.Help)
        p.add_argument("--model", required=True, help="Hugging Face folder or name of the base that was trained on")
        p.add_argument("--adapter", required=True, help="adapter of sft.py or grpo.py")
        p.add_argument("--out", required=True, help="folder for the merged model")
        return p.parse_args(argv[1:])
    p = argparse.ArgumentParser(description=__doc__, formatter_class=judge.Help)
    add = p.add_argument
    add("--model", required=True, help="Hugging Face folder or name of a Qwen2.5-VL checkpoint")
    add("--data", required=True, nargs="+", help="JSONL files of dialogues, see synth.py")
    add("--out", required=True, help="folder for adapter, log and meta.json")
    add("--epochs", type=float, default=2, help="passes over the data [R]")
    add("--batch", type=int, default=4, help="dialogues per optimiser step (1 x accumulation 4 [R])")
    add("--micro_tokens", type=int, default=8192, help="padded tokens per forward; less memory, same gradient (ours)")
    add("--lr", type=float, default=1e-4, help="ours, for LoRA; 1e-5 [R] is for full fine-tuning")
    add("--warmup", type=float, default=0.1, help="share of steps with rising rate, cosine to 0 after [R]")
    add("--lora_r", type=int, default=32, help="rank (ours)")
    add("--lora_alpha", type=int, default=64, help="the update is scaled by alpha / r (ours)")
    add("--held_out", type=float, default=0.05, help="share of seeds kept for the held-out loss (ours)")
    add("--eval_every", type=int, default=50, help="steps between two held-out losses (ours)")
    add("--patience", type=int, default=0, help="stop when so many held-out losses in a row brought < 1 %% (0: never)")
    add("--max_tokens", type=int, default=8192, help="longer dialogues lose whole trailing turns, counted ([R]: 32768)")
    add("--max_pixels", type=int, default=512 * 512, help="image budget [R]")
    add("--nf4", action=argparse.BooleanOptionalAction, default=True, help="4-bit base (QLoRA)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True,
        help="recompute activations in the backward pass: less memory, a third more time")
    add("--save_every", type=int, default=50, help="steps between two checkpoints; the last two are kept (ours)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--allow_changes", action="store_true", help="resume although arguments or data are not those it began with")
    add("--skip_bad", action="store_true", help="go on without bad records instead of stopping")
    add("--allow_outside", action="store_true", help="pictures may lie outside the folder of their data file")
    add("--threads", type=int, default=0, help="CPU threads (0: torch's choice); use 1 beside other busy processes")
    add("--seed", type=int, default=0, help="initial LoRA weights, order of the data")
    return p.parse_args(argv)


# ---------------------------------------------------------------- the student: loading

@dataclass
class Student:
    """A Qwen2.5-VL checkpoint with what belongs to it. `seams`: the chat template's token ids between the texts of a
    dialogue; `allowed` (V,): False for ids the policy must never emit (control tokens but <|im_end|>, unused rows)."""
    model: torch.nn.Module
    tok: object
    image_processor: object
    seams: dict
    allowed: torch.Tensor
    end: int  # <|im_end|>
    pad: int  # <|image_pad|>, the placeholder of one image token

    @property
    def base(self):
        """The Qwen2_5_VLForConditionalGeneration under the adapters, if any."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model


def load_student(path, nf4=True, max_pixels=512 * 512):
    """Load a Qwen2.5-VL folder or hub name, frozen; bf16 on a GPU, fp32 on a CPU.

    nf4: 4-bit NormalFloat with double quantisation, for the language model's linears only. bitsandbytes matches the
    skip list with the start or the end of a name, so the tower is "model.visual"; and a list of one's own replaces the
    default one, which had kept lm_head.
    max_pixels: image budget, set at construction."""
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                               bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["model.visual", "lm_head"])
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        path, dtype=dtype, device_map={"": device}, quantization_config=quant if nf4 else None, use_safetensors=True)
    for module in model.modules():
        # On some CPUs bitsandbytes repacks the weights at the first forward without gradients, for a bf16 kernel that
        # has no backward: training after an evaluation would break. Keep one format, and fp32 arithmetic.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if device != "cpu":
        patches_by_product(model)
    tok = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # unset, it would ask on the terminal
    # PIL: a machine that has torchvision, as those with a GPU often do, would otherwise see slightly other pictures
    image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
    image_processor.size["longest_edge"] = min(image_processor.size["longest_edge"], max_pixels)
    return make_student(model, tok, image_processor)


def patches_by_product(model):
    """The tower takes an image apart by a convolution whose kernel is its stride: a matrix product. As a convolution in
    bf16 it costs cuDNN seconds a call (3.7 s on an H100, others measured)."""
    conv = model.model.visual.patch_embed.proj
    conv.forward = lambda x: torch.nn.functional.linear(x.flatten(1), conv.weight.flatten(1))


def make_student(model, tok, image_processor):
    """Freeze the weights by hand (peft's helper would turn embeddings and tower into fp32) and read the seams
    of the chat template off a rendered dialogue: what stands between marks is the template's, to the last newline."""
    model.requires_grad_(False).eval()
    marks = ["@@system@@", "@@user@@", "@@reply@@", "@@again@@"]
    chat = [{"role": r, "content": m} for r, m in zip(("system", "user", "assistant", "user"), marks)]
    ids = lambda text: tok(text, add_special_tokens=False).input_ids
    render = lambda chat: tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    seams, text = {}, render(chat)
    for name, mark in zip(("system", "system_user", "user_assistant", "assistant_user"), marks):
        piece, text = text.split(mark)
        seams[name] = ids(piece)
    seams["start_user"] = ids(render(chat[1:2]).split(marks[1])[0])  # a dialogue without a system message
    token = tok.convert_tokens_to_ids
    seams["image"] = [token("<|vision_start|>")], [token("<|vision_end|>")]
    end, pad = token("<|im_end|>"), token("<|image_pad|>")
    if seams["assistant_user"][0] != end:
        raise ValueError("the chat template does not close a reply with <|im_end|>: not a ChatML template")
    seams["assistant_user"] = seams["assistant_user"][1:]  # the terminator is the student's own token
    allowed = torch.arange(model.lm_head.weight.shape[0]) < len(tok)
    allowed[[i for i, t in tok.added_tokens_decoder.items() if t.special]] = False
    allowed[end] = True
    return Student(model, tok, image_processor, seams, allowed.to(model.device), end, pad)


def lora(r, alpha):
    """All linears of the language model. Dropout 0: the policy that is scored must be the one that was sampled."""
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")


def add_lora(student, r, alpha):
    """A new trainable adapter "policy"; B starts at 0, so the model is still the base."""
    student.model = get_peft_model(student.model, lora(r, alpha), adapter_name="policy")


def read_lora(folder):
    """The configuration of a PEFT folder. Raises ValueError unless it is one of `lora`: peft would load another kind, with
    other targets, dropout or a magnitude, and the loss, `grpo.fold` and `merge` would be wrong without a word."""
    try:
        config = PeftConfig.from_pretrained(folder)
        free = {"base_model_name_or_path", "inference_mode", "revision", "peft_version"}
        of_ours = lora(config.r, config.lora_alpha).to_dict()
        odd = [k for k, v in config.to_dict().items() if k not in free and v != of_ours.get(k)]
    except (TypeError, AttributeError) as error:
        odd = [error]
    if odd:
        raise ValueError(f"{folder}: not an adapter of sft.py: {', '.join(map(str, odd))}")
    config.inference_mode = False
    return config


def load_adapter(student, folder, name):
    """Load a PEFT folder as adapter `name`; only one called "policy" is trainable. Raises ValueError when a weight of
    the file finds no place or a place no weight: peft itself stays quiet."""
    config = read_lora(folder)
    if isinstance(student.model, PeftModel):
        student.model.add_adapter(name, config)
    else:
        student.model = get_peft_model(student.model, config, adapter_name=name)
    load_weights(student, folder, name)


def load_weights(student, folder, name):
    """The weights of a PEFT folder into adapter `name`, which is there. No other format is read: it may be a pickle."""
    try:
        weights = load_file(Path(folder) / "adapter_model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder}: {error}") from None
    result = set_peft_model_state_dict(student.model, weights, name)
    missing = [k for k in result.missing_keys if f".{name}." in k]
    if result.unexpected_keys or missing:
        raise ValueError(f"{folder}: the adapter does not fit the model: {(result.unexpected_keys + missing)[:3]}")
    use_adapter(student, "policy")


def use_adapter(student, name):
    """Switch adapters; afterwards only "policy" is trainable, whatever peft did."""
    student.model.base_model.set_adapter(name)
    for key, p in student.model.named_parameters():
        if "lora_" in key:
            p.requires_grad_(".policy." in key)


def save_adapter(student, folder):
    """Write "policy" as a plain PEFT folder (peft would make a subfolder of the name); the weights last and whole."""
    student.model.peft_config["policy"].save_pretrained(folder)
    part = Path(folder, "adapter_model.part")
    # "auto" would ask the hub at every checkpoint whether the vocabulary has grown
    state = get_peft_model_state_dict(student.model, adapter_name="policy", save_embedding_layers=False)
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, part)
    part.rename(part.with_suffix(".safetensors"))


def merge(args):
    """Fold an adapter into its base: a folder that transformers and vLLM load without peft. All files, names of weights
    and precision (bf16 on the hub) stay the base's; only the adapted weights change, each rounded once. NF4 is not
    involved: merging into it would round away most of what was learned."""
    started = time.time()
    # One name for a linear on both sides: the hub says model.layers.., transformers 5 model.language_model.layers..
    plain = lambda key: re.sub(r"^(base_model\.model\.)?(model\.)?(language_model\.)?", "", key).removesuffix(".weight")
    try:
        base = Path(args.model if Path(args.model).is_dir() else snapshot_download(args.model))
        index, files, places = base / "model.safetensors.index.json", {*base.glob("*.safetensors")}, {}
        if index.exists():
            files |= {base / name for name in json.loads(index.read_text())["weight_map"].values()}
        for file in files:
            with safe_open(file, "pt") as weights:
                slices = {plain(k): weights.get_slice(k) for k in weights.keys() if k.endswith(".weight")}
                places |= {k: [*w.get_shape()] for k, w in slices.items() if w.get_dtype() in ("BF16", "F16", "F32")}
        config, adapter = read_lora(args.adapter), load_file(Path(args.adapter) / "adapter_model.safetensors")
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        fail(f"--model {args.model} or --adapter {args.adapter}: {error}")
    a, b = ({plain(k.replace(f".lora_{x}", "")): w.float() for k, w in adapter.items() if f".lora_{x}" in k} for x in "AB")
    wanted = {k: shape for k, shape in places.items() if re.fullmatch(r"layers\..*_proj", k)}
    shapes = {k: [len(b[k]), a[k].shape[1]] for k in a} if a.keys() == b.keys() else None
    if not wanted or shapes != wanted or len(adapter) != 2 * len(wanted):
        fail(f"{args.adapter} does not fit the .safetensors of {base}, whose linears must be in bf16, fp16 or fp32")
    refuse_overwrite(args.out)
    for file in base.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin"):
            shutil.copy(file, args.out)
    for file in sorted(files):
        weights = load_file(file)
        for key in weights:
            if plain(key) in a:
                delta = config.lora_alpha / config.r * (b[plain(key)] @ a[plain(key)])
                weights[key] = (weights[key].float() + delta).to(weights[key].dtype)
        save_file(weights, Path(args.out, file.name), {"format": "pt"})
    write_meta(args, started)
    print(f"{len(a)} merged weights in {args.out}")


# ---------------------------------------------------------------- the student: dialogues as tokens

@dataclass
class Row:
    """One dialogue as tokens. `turn_id` is aligned with `ids`: the index of the assistant turn a token belongs to, -1
    for everything the student did not say. Born together, never inferred from ids."""
    ids: list = field(default_factory=list)
    turn_id: list = field(default_factory=list)
    images: list = field(default_factory=list)  # paths, in order of appearance
    grids: list = field(default_factory=list)  # (height, width) of each image in merged tokens

    def add(self, ids, turn=-1):
        self.ids += ids
        self.turn_id += [turn] * len(ids)


def encode(student, text):
    """Untrusted text -> ids. `<|im_end|>` in it becomes ordinary characters, never the control token."""
    return student.tok(text, add_special_tokens=False, split_special_tokens=True).input_ids


def add_user(student, row, content, images, system=None):
    """Append a user turn and the cue for the reply. content: a string, or parts {"type": "image"} / {"type": "text"};
    images: paths, one for every image part. An image becomes height x width placeholders."""
    seams = student.seams
    if row.ids:
        row.add(seams["assistant_user"])
    elif system is not None:
        row.add(seams["system"] + encode(student, text_of(system)) + seams["system_user"])
    else:
        row.add(seams["start_user"])
    images = iter(images)
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text":
            row.add(encode(student, part["text"]))
        else:
            path = next(images)
            height, width = image_grid(student, open_image(path))
            row.images.append(path)
            row.grids.append((height, width))
            row.add(seams["image"][0] + [student.pad] * (height * width) + seams["image"][1])
    row.add(seams["user_assistant"])


def render(student, dialogue, max_tokens=None):
    """A whole dialogue -> (Row, dropped turns). Whole turns go, from the end, when it is longer than max_tokens; an
    image is never cut. Raises ValueError when not even the first turn fits."""
    row, turn, images, kept = Row(), 0, iter(dialogue["images"]), None
    messages = dialogue["messages"]
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    for message in messages:
        if message["role"] == "user":
            parts = message["content"] if isinstance(message["content"], list) else []
            paths = [next(images) for part in parts if part["type"] == "image"]
            add_user(student, row, message["content"], paths, system)
        elif message["role"] == "assistant":
            if message["content"] == NO_REPLY:
                break
            row.add(encode(student, text_of(message["content"])) + [student.end], turn)
            turn += 1
            if max_tokens and len(row.ids) > max_tokens:
                break
            kept = len(row.ids), turn, len(row.images)
    if kept is None:
        raise ValueError(f"{dialogue['id']}: no reply, or not even the first turn fits {max_tokens} tokens")
    tokens, turn, n_images = kept
    dropped = sum(m["role"] == "assistant" for m in messages) - turn
    return Row(row.ids[:tokens], row.turn_id[:tokens], row.images[:n_images], row.grids[:n_images]), dropped


def image_grid(student, image):
    """(height, width) in tokens after merging, from the size alone: the pixels are not needed to count tokens."""
    ip = student.image_processor
    cell = ip.patch_size * ip.merge_size
    height, width = smart_resize(image.height, image.width, cell, ip.size["shortest_edge"], ip.size["longest_edge"])
    return height // cell, width // cell


@torch.no_grad()
def encode_images(student, paths):
    """{path: features (height * width, H)}: the frozen tower runs once per distinct image, all later passes share it.
    `pixel_values` is patch-flat, so features are split by each image's own grid. The held-out loss has a thousand images:
    some 8,192 tokens of them go through the tower at a time, and they wait on the CPU."""
    paths, ip, features = sorted(set(paths)), student.image_processor, []
    at_once = max(1, 8192 * (ip.patch_size * ip.merge_size) ** 2 // ip.size["longest_edge"])
    for i in range(0, len(paths), at_once):
        inputs = ip(images=[open_image(p) for p in paths[i:i + at_once]], return_tensors="pt").to(student.base.device)
        out = student.base.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        features += [f.cpu() for f in out]
    return dict(zip(paths, features))


def mrope_positions(student, ids, grids, start=0):
    """Qwen2.5-VL's three-axis positions (time, height, width) of consecutive tokens: text counts up on all three, the
    tokens of an image share the time and spread over the grid, what follows goes on after the larger side.
    -> ([(t, h, w), ..], next start); counted by hand because a cached forward would use stale offsets."""
    positions, grids, i = [], iter(grids), 0
    while i < len(ids):
        if ids[i] == student.pad:
            height, width = next(grids)
            positions += [(start, start + y, start + x) for y in range(height) for x in range(width)]
            start, i = start + max(height, width), i + height * width
        else:
            positions.append((start, start, start))
            start, i = start + 1, i + 1
    return positions, start


def collate(student, rows):
    """Rows -> ids (N, L), turn_id (N, L), positions (3, N, L), padded on the right. Under a causal mask no token sees
    what comes after it, so right padding needs no attention mask at all."""
    length, device = max(len(r.ids) for r in rows), student.base.device
    pad = lambda values, fill: values + [fill] * (length - len(values))
    ids = torch.tensor([pad(r.ids, student.end) for r in rows], device=device)
    turn_id = torch.tensor([pad(r.turn_id, -1) for r in rows], device=device)
    positions = [pad(mrope_positions(student, r.ids, r.grids)[0], (0, 0, 0)) for r in rows]
    return ids, turn_id, torch.tensor(positions, device=device).permute(2, 0, 1)  # (N, L, 3) -> (3, N, L)


# ---------------------------------------------------------------- the student: forward

def hidden_states(student, ids, positions, features, mask=None, cache=None, language_model=None):
    """ids (N, L), positions (3, N, L), features of the batch's images in order -> last hidden states (N, L, H).
    mask (N, 1, L, S) bool, True = may look; None = causal. cache: keys and values of earlier tokens, see grpo.py."""
    lm = language_model or student.base.model.language_model
    embeds = lm.embed_tokens(ids)  # (N, L, H)
    if features:
        # not in place: under checkpointing the embeddings are a leaf that requires a gradient
        embeds = embeds.masked_scatter((ids == student.pad)[..., None], torch.cat(features).to(embeds))
    if mask is not None:  # as what is added to the scores: sdpa would make that of it once a layer
        mask = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill_(~mask, -math.inf)
    return lm(inputs_embeds=embeds, position_ids=positions, attention_mask={"full_attention": mask},
              past_key_values=cache, use_cache=False).last_hidden_state


def policy_logits(student, hidden, temperature=1.0):
    """(M, H) -> (M, V) fp32 logits of the distribution that is sampled: divided by the temperature, -inf
    where the policy must not go. Sampler, loss and reference all come through here."""
    logits = student.base.lm_head(hidden).float() / temperature
    return logits.masked_fill_(~student.allowed, -math.inf)


class TokenLogps(torch.autograd.Function):
    """Log-probability and entropy of one token per hidden state. The gradient of a log-probability in its hidden state,
    (1[y] - softmax) @ W / temperature with W the frozen lm_head, needs nothing from above: it is taken while the logits
    are there, so they are made once, chunk by chunk, and neither kept nor recomputed."""

    @staticmethod
    def forward(ctx, hidden, targets, student, temperature, chunk):
        weight = student.base.lm_head.weight  # (V, H)
        # the results first: allocated between two chunks they would hold the freed memory of the first in pieces
        said, entropy = (torch.empty(len(hidden), device=hidden.device) for _ in range(2))
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (M, H)
        for i in range(0, len(hidden), chunk):
            at = slice(i, i + chunk)
            logps = policy_logits(student, hidden[at], temperature)  # (m, V)
            logps -= logps.logsumexp(-1, keepdim=True)
            said[at] = logps.gather(-1, targets[at, None])[:, 0]
            probs = logps.exp()
            entropy[at] = -torch.linalg.vecdot(probs, logps.masked_fill_(~student.allowed, 0.0))
            if slope is not None:
                probs.scatter_add_(-1, targets[at, None], probs.new_full((len(probs), 1), -1.0))  # softmax - 1[y]
                slope[at] = probs.to(weight.dtype) @ weight / -temperature
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy)
        return said, entropy

    @staticmethod
    def backward(ctx, grad, _):
        slope, = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None, None


def token_logps(student, hidden, targets, temperature=1.0, chunk=None):
    """hidden (M, H), targets (M,) -> log-probabilities (M,), entropies (M,). The (M, V) logits never exist at once, so
    memory does not grow with M. The lm_head must be frozen: it gets no gradient."""
    at_once = 2 ** 26 if hidden.is_cuda else 2 ** 20  # logits: enough to keep the card busy, few enough for a cache
    chunk = chunk or max(32, at_once // len(student.allowed))
    return TokenLogps.apply(hidden, targets, student, temperature, chunk)


def reply_logps(student, rows, images, temperature=1.0):
    """Log-probabilities and entropies (M,) of all tokens the student said in these rows, row by row in order; images:
    {path: features}. Hidden states are picked before lm_head, so context costs no logits."""
    ids, turn_id, positions = collate(student, rows)
    features = [images[path] for row in rows for path in row.images]
    hidden = hidden_states(student, ids, positions, features)
    said = turn_id[:, 1:] >= 0  # (N, L-1): position l predicts token l + 1
    return token_logps(student, hidden[:, :-1][said], ids[:, 1:][said], temperature)


def micro_batches(rows, budget):
    """Indices of rows, sorted by length and cut so that rows x longest <= budget padded tokens (one row at least)."""
    batches, batch, real = [], [], 0
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].ids)):
        n, cells = len(rows[i].ids), (len(batch) + 1) * len(rows[i].ids)
        if batch and (cells > budget or real + n < 0.95 * cells):
            batches.append(batch)
            batch, real = [], 0
        batch.append(i)
        real += n
    return [b for b in [*batches, batch] if b]


# ---------------------------------------------------------------- several processes: accelerate launch sft.py ..

def join():
    """Find the other processes of `accelerate launch`, if any. Rank 0 alone speaks, logs and saves. They may wait for
    each other longer than the default ten minutes: for a rank whose tutor is slow."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=1))
        if state.process_index > 0:
            sys.stdout = open(os.devnull, "w")


def ranks():
    """-> this process and the number of processes"""
    there = torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)


def over_ranks(numbers, params=()):
    """-> the sums of numbers over all processes; gradients of params are summed in place. Each process has divided its
    share by the tokens of all."""
    if ranks()[1] == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device=PartialState().device)
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for x in (sums, *(p.grad for p in params)):
        torch.distributed.all_reduce(x)
    return sums.tolist()


# ---------------------------------------------------------------- a run that may be killed at any instant

EXPLODED = 1000.0  # gradient norm before clipping to 1 from which on no step is taken (ours; the toy's stay below 1)


@dataclass
class Run:
    """Training in --out. `meta` is what its checkpoints OUT/step_NNNNNN/ remember besides adapter and optimiser: steps done,
    see synth.about, whatever a script adds. No random states: every draw is a function of seed and step."""
    args: object
    started: float
    meta: dict
    logs: dict  # name: where to go on in it, then the open file
    checkpoint: Path = None  # the newest
    bad: int = 0  # steps in a row of which an update was skipped
    student: Student = None
    optimizer: object = None


def open_run(args, started, names, **more):
    """Make --out, which must be empty; or, with --resume, find its newest whole checkpoint, passing over torn ones with a
    word. names: of the logs; more: for meta, as a run begins. -> Run"""
    run, out = Run(args, started, {**about(args), "step": 0, **more}, dict.fromkeys(names, 0)), Path(args.out)
    folders = sorted(out.glob("step_??????"), reverse=True) if args.resume else []
    for folder in folders:
        if is_whole(folder):
            run.checkpoint = folder
            break
        print(f"{folder} is torn: passed over", file=sys.stderr)
    begun = {"step_part", *names, *(folder.name for folder in folders)}  # all that a run without checkpoint leaves
    if not args.resume or not run.checkpoint and (not out.is_dir() or {path.name for path in out.iterdir()} - begun):
        if ranks()[0] == 0:
            refuse_overwrite(out)
    if run.checkpoint:
        saved = json.loads((run.checkpoint / "meta.json").read_text(encoding="utf-8"))
        refuse_changes(args, run.meta, saved, {"out", "resume", "allow_changes", "save_every", "concurrency", "timeout"})
        run.meta |= {key: saved[key] for key in ("step", *more)}
        run.logs, run.started = saved["logs"], started - saved["seconds"]
        print(f"going on from {run.checkpoint}")
    return run


def begin(run, student, optimizer):
    """Load the checkpoint, if any, and cut the logs back to it."""
    run.student, run.optimizer = student, optimizer
    if run.checkpoint:
        load_weights(student, run.checkpoint, "policy")
        # by way of the CPU: bitsandbytes' paged tensors have a mark that loading onto a GPU would keep, without pages
        optimizer.load_state_dict(torch.load(run.checkpoint / "optimizer.pt", weights_only=True, map_location="cpu"))
    for name, size in run.logs.items():
        run.logs[name] = open(os.devnull if ranks()[0] else Path(run.args.out, name), "a", encoding="utf-8")
        if ranks()[0] == 0:
            run.logs[name].truncate(size)


def is_whole(folder):
    """Are the files of a checkpoint what they were when it was saved, and the logs not shorter?"""
    try:
        saved = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return (all(file_hash(folder / name) == value for name, value in saved["files"].items())
                and all((folder.parent / name).stat().st_size >= size for name, size in saved["logs"].items()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def save_checkpoint(run):
    """Write OUT/step_NNNNNN/, there in full or not at all: adapter (a PEFT folder), optimiser, meta.json with the hashes of
    both and the lengths of the logs. The last two stay."""
    out = Path(run.args.out)
    part, run.checkpoint = out / "step_part", out / f"step_{run.meta['step']:06}"
    if ranks()[0]:
        return
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    save_adapter(run.student, part)
    torch.save(run.optimizer.state_dict(), part / "optimizer.pt")
    meta = {**run.meta, "seconds": time.time() - run.started, "files": {p.name: file_hash(p) for p in part.iterdir()},
            "logs": {name: os.fstat(log.fileno()).st_size for name, log in run.logs.items()}}
    (part / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    for path in (*(log.name for log in run.logs.values()), *part.iterdir(), part):  # on the disk before they have the name
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    shutil.rmtree(run.checkpoint, ignore_errors=True)
    part.rename(run.checkpoint)
    for old in sorted(f for f in out.glob("step_??????") if f.name <= run.checkpoint.name)[:-2]:  # later ones are torn
        shutil.rmtree(old)


def steps_left(run, steps):
    """Yield the steps that are left. After each one: stop if it was the third bad one in a row; save now and then, and on
    Ctrl-C, which is heard when the step is done. A second Ctrl-C stops at once."""
    pressed, word = [], b"\nCtrl-C: saving after this step; once more: stopping at once\n"
    signal.signal(signal.SIGINT, lambda *_: os._exit(130) if pressed else pressed.append(os.write(1, word)))
    left = range(run.meta["step"], steps)
    for step in tqdm(left, initial=left.start, total=steps, mininterval=1, disable=None):
        yield step
        run.meta["step"] = step + 1
        if run.bad == 3:
            fail(f"step {step}: the third in a row without a sound update: loss or gradient not finite, norm above "
                 f"{EXPLODED:g}, or tutor not read; last good checkpoint: {run.checkpoint or 'none yet'}", code=1)
        if not run.bad and (pressed or (step + 1) % run.args.save_every == 0 or step + 1 == steps):
            save_checkpoint(run)
        if pressed:
            fail(f"interrupted; --resume goes on from {run.checkpoint or 'the start'}", code=1)


def step_or_skip(optimizer, loss):
    """Clip the gradient to norm 1 and step; not if it or the loss is not finite, nor if it has exploded.
    -> (norm before clipping, 1 if skipped else 0)"""
    params = optimizer.param_groups[0]["params"]
    loss, = over_ranks([loss], params)  # one decision for all
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
    good = math.isfinite(loss) and norm < EXPLODED
    if good:
        optimizer.step()
    optimizer.zero_grad()
    return norm, int(not good)


def finish(run, **more):
    """The result of a whole run: adapter and meta.json."""
    if ranks()[0] == 0:
        save_adapter(run.student, run.args.out)
        write_meta(run.args, run.started, **run.meta, **more)
    print(f"adapter in {run.args.out}")


def write_line(run, line, steps):
    """Add memory (the peak in GB, of the GPU or else of the process) and the time that is left to a step's line and write
    it as strict JSON, null for what is not finite. -> the line"""
    run.bad = run.bad + 1 if line["skipped"] else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    pace = (time.time() - run.started) / (line["step"] + 1)
    line |= {"memory": torch.cuda.max_memory_allocated() / 2 ** 30 if torch.cuda.is_available() else peak,
             "minutes_left": pace * (steps - line["step"] - 1) / 60}
    strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    run.logs["log.jsonl"].write(json.dumps(strict, allow_nan=False) + "\n")
    run.logs["log.jsonl"].flush()
    return line


# ---------------------------------------------------------------- training

def epoch_order(n, batch, seed, epoch):
    """A permutation of one epoch that depends on (seed, epoch) alone, cut into batches. Not sorted by length, which
    goes with the kind of dialogue: a batch of one kind is a biased step. Micro-batches sort within the batch."""
    order = random.Random(f"{seed}/{epoch}").sample(range(n), n)
    return [order[i:i + batch] for i in range(0, n, batch)]


def loss_over(student, dialogues, args, backward=False):
    """Mean negative log-likelihood per trained token. The sum of all micro-batches of all processes is divided by the
    number of tokens of the whole step, so the split changes neither loss nor gradient."""
    rows, (rank, world) = [render(student, d, args.max_tokens)[0] for d in dialogues], ranks()
    tokens, total = sum(t >= 0 for row in rows for t in row.turn_id), 0.0
    rows = rows[rank::world]
    images = encode_images(student, [path for row in rows for path in row.images])
    for batch in micro_batches(rows, args.micro_tokens):
        with torch.set_grad_enabled(backward):
            logps, _ = reply_logps(student, [rows[i] for i in batch], images)
            loss = -logps.sum() / tokens
        if backward:
            loss.backward()
        total += loss.item()
    return over_ranks([total])[0], tokens


def show_trained(student, row):
    """A dialogue as the loss sees it: trained tokens in brackets, so that a mask can be seen."""
    spoken = [(i, turn >= 0) for i, turn in zip(row.ids, row.turn_id) if i != student.pad]
    parts = [(said, student.tok.decode([i for i, _ in part])) for said, part in itertools.groupby(spoken, lambda x: x[1])]
    return printable("".join(f"[{text}]" if said else text for said, text in parts), keep="\n")


def rate(step, steps, warmup):
    """Linear warm-up over a share of the steps, then a cosine to 0 ([R]); a factor on lr."""
    rise = max(1, int(warmup * steps))
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def adamw(student, lr):
    """The optimiser of everything trainable, without weight decay. On a GPU bitsandbytes' paged 8-bit one: 2 bytes of
    state a weight instead of 8, and it moves to the CPU when memory is short; on a CPU torch's."""
    params = [p for p in student.model.parameters() if p.requires_grad]
    kind = bitsandbytes.optim.PagedAdamW8bit if params[0].is_cuda else torch.optim.AdamW
    return kind(params, lr=lr, weight_decay=0.0)


def train_and_held_out(student, dialogues, args):
    """Dialogues that can be trained on -> (train, held out). Divided by seed, so that no sibling of a training dialogue
    is held out; those without a reply, or too long for even one turn, are named first and stop the run."""
    rows = {}
    for d in dialogues:
        try:
            rows[d["id"]] = render(student, d, args.max_tokens)
        except ValueError as error:
            print(printable(str(error)), file=sys.stderr)
    if not rows or len(rows) < len(dialogues) and not args.skip_bad:
        fail(f"{len(dialogues) - len(rows)} of {len(dialogues)} dialogues cannot be trained on")
    dialogues = [d for d in dialogues if d["id"] in rows]
    seeds = sorted({d["seed_id"] for d in dialogues})
    held = set(random.Random(f"{args.seed}/held").sample(seeds, int(args.held_out * len(seeds))))
    train, test = [d for d in dialogues if d["seed_id"] not in held], [d for d in dialogues if d["seed_id"] in held]
    print(f"{len(train)} dialogues, {sum(len(rows[d['id']][0].ids) for d in train)} tokens; {len(test)} held out; "
          f"{sum(dropped for _, dropped in rows.values())} turns dropped beyond {args.max_tokens} tokens")
    return train, test


LINE = ("step {step:4} | loss {loss:.4f} | grad {grad_norm:.3f} | {tokens} tokens | {seconds:.1f} s, {memory:.1f} GB, "
        "{minutes_left:.1f} min left")


def main(args):
    if min(args.batch, args.eval_every, args.save_every, args.lora_r) < 1 or not 0 <= args.held_out < 1 or not (
            0 < args.epochs < math.inf and 0 <= args.lr < math.inf):
        fail("--batch, --eval_every, --save_every and --lora_r must be 1 or more, --held_out a share below 1, "
             "--epochs above 0, --lr a number")
    join()
    if args.threads:
        torch.set_num_threads(args.threads)
    started = time.time()
    dialogues = read_dialogues(args.data, args.skip_bad, args.allow_outside)
    run = open_run(args, started, ["log.jsonl"], best=sys.float_info.max, waited=0)
    try:
        student = load_student(args.model, args.nf4, args.max_pixels)
    except (OSError, ValueError) as error:
        fail(f"--model: {error}")
    torch.manual_seed(args.seed)
    add_lora(student, args.lora_r, args.lora_alpha)
    if args.checkpointing:
        student.base.activation_checkpointing_enable({"use_reentrant": False})
    train, test = train_and_held_out(student, dialogues, args)
    optimizer = adamw(student, args.lr)
    begin(run, student, optimizer)
    per_epoch = math.ceil(len(train) / args.batch)
    steps = max(1, round(args.epochs * per_epoch))
    for step in steps_left(run, steps):
        if args.patience and run.meta["waited"] >= args.patience:
            tqdm.write(f"held-out loss is flat: {args.patience} times in a row less than 1 % better; done")
            break
        batch = [train[i] for i in epoch_order(len(train), args.batch, args.seed, step // per_epoch)[step % per_epoch]]
        if step == 0:
            shown = [show_trained(student, render(student, d, args.max_tokens)[0]) for d in batch]
            print("first batch, trained tokens in brackets:", *shown, sep="\n\n")
        begun = time.time()
        student.model.train()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(step, steps, args.warmup)
        loss, tokens = loss_over(student, batch, args, backward=True)
        norm, skipped = step_or_skip(optimizer, loss)
        line = {"step": step, "loss": loss, "grad_norm": norm, "skipped": skipped, "tokens": tokens,
                "seconds": time.time() - begun}
        if test and (step + 1 == steps or (step + 1) % args.eval_every == 0):
            student.model.eval()
            line["held_out"], _ = loss_over(student, test, args)
            better = line["held_out"] < 0.99 * run.meta["best"]
            run.meta |= {"waited": 0 if better else run.meta["waited"] + 1, "best": min(run.meta["best"], line["held_out"])}
        line = write_line(run, line, steps)
        held = f" | held-out loss {line['held_out']:.4f}" if "held_out" in line else ""
        tqdm.write(LINE.format(**line) + held + " | ! update skipped" * skipped)
    finish(run)


if __name__ == "__main__":
    try:
        (merge if sys.argv[1:2] == ["merge"] else main)(parse_args())
    except KeyboardInterrupt:
        fail("interrupted before the first step", code=1)
