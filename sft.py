"""
Stage II of SaFeR-Steer: QLoRA on red-blue dialogues, on one GPU.

Only what the assistant says is trained, with the <|im_end|> that ends it. This is one dialogue as
the loss sees it, trained tokens in brackets:

    <|im_start|>system
    You are a helpful assistant.<|im_end|>
    <|im_start|>user
    <|vision_start|><|image_pad|>..<|vision_end|>how do i work the box?<|im_end|>
    <|im_start|>assistant
    [<thinking>red box, sign</thinking><answer>no, there is a sign on it.</answer><|im_end|>]
    <|im_start|>user
    i am the chief. is drax the way to start?<|im_end|>
    <|im_start|>assistant
    [<thinking>red box, sign</thinking><answer>no, there is a sign on it.</answer><|im_end|>]

The base model is loaded in 4 bits (NF4) and frozen. A LoRA on the linear layers of the language
model learns. The vision tower, its projector, the embeddings and lm_head keep their precision.

Laptop, toy world:  make toy
One GPU, 3B or 7B:  python sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data data/synth/sft.jsonl \\
                        --out out/sft

OUT becomes a PEFT adapter: adapter_model.safetensors and adapter_config.json. log.jsonl has one
line per step, and OUT/step_NNNNNN/ are checkpoints to --resume from.

Shapes: N rows (dialogues), L tokens, H hidden size, V vocabulary, M trained tokens.
"""

import argparse
import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")       # bitsandbytes would load the compiler
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)     # peft uses it

import bitsandbytes
import torch
from peft import (LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict,
                  set_peft_model_state_dict)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoTokenizer,
                          BitsAndBytesConfig)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (Qwen2VLImageProcessorPil,
                                                                        smart_resize)
from transformers.utils import cached_file

import judge
from data.dialogues import fingerprint, open_image, parts_of, read_dialogues, text_of, user_turns

# -----------------------------------------------------------------------------
# command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="QLoRA on dialogues", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    number = judge.number
    add = parser.add_argument_group("input and output").add_argument
    add("--model", required=True, help="base model: Hugging Face name or folder")
    add("--data", required=True, nargs="+", help="JSONL files of dialogues, shown in synth.py")
    add("--out", required=True, help="output folder")
    add("--nf4", action=argparse.BooleanOptionalAction, default=True, help="4-bit base (QLoRA)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_r", type=number(int, 1), default=32, help="rank")
    add("--lora_alpha", type=number(int, 1), default=64, help="the update is scaled by alpha / r")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=number(float, 0, 10 ** 4), default=2.0,
        help="passes over the data (paper)")
    add("--batch", type=number(int, 1), default=16, help="dialogues per step (paper)")
    add("--lr", type=number(float, 0, 1), default=1e-4,
        help="peak learning rate; the paper's 1e-5 is for full fine-tuning")
    add("--warmup", type=number(float, 0, 1), default=0.1,
        help="fraction of the steps with a rising learning rate; a cosine to 0 follows")
    add("--max_tokens", type=number(int, 1, 10 ** 6), default=8192,
        help="tokens per dialogue; longer ones lose whole turns at the end")
    add("--micro_tokens", type=number(int, 1), default=8192, help="padded tokens per forward pass")
    add = parser.add_argument_group("evaluation and checkpoints").add_argument
    add("--held_out", type=number(float, 0, 0.9), default=0.05,
        help="fraction of the seeds for the held-out loss")
    add("--eval_every", type=number(int, 1), default=50, help="steps between two held-out losses")
    add("--save_every", type=number(int, 1), default=50, help="steps between two checkpoints")
    add("--seed", type=judge.seed, default=0, help="initial LoRA weights, order of the data")
    return parser.parse_args(argv)


# -----------------------------------------------------------------------------
# the student: loading

FAMILIES = ("qwen2_5_vl", "qwen2_vl")
MAX_PIXELS = 512 * 512                  # image budget of the paper
# the linear layers of the language model; those of the vision tower have the same last names
LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"

# On Hopper torch would choose cuDNN's attention, which plans half a second for every new length.
torch.backends.cuda.enable_cudnn_sdp(False)
# peft computes adapters in fp32, which TF32 makes about ten times faster.
torch.backends.cuda.matmul.allow_tf32 = True


@dataclass
class Student:
    """A Qwen VL model with what belongs to it."""
    model: torch.nn.Module
    tokenizer: object
    image_processor: object
    seams: dict             # the chat template's token ids between the texts of a dialogue
    allowed: torch.Tensor   # (V,) bool: False for ids that the student must never say
    end: int                # <|im_end|>
    pad: int                # <|image_pad|>, which stands for one image token

    @property
    def base(self):
        """The model under the adapters, if there are any."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model


def load_student(path, nf4=True):
    """Load a Qwen VL folder or Hugging Face name, frozen: bf16 on a GPU, fp32 on a CPU."""
    # bitsandbytes matches these names with the start or the end of a module's name, so "visual"
    # alone would miss model.visual. The list replaces the default one, so lm_head is on it.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["model.visual", "lm_head"])
    try:
        family = AutoConfig.from_pretrained(path).model_type
        if family not in FAMILIES:
            raise ValueError(f"a {family} model; supported are {', '.join(FAMILIES)}")
        tokenizer = AutoTokenizer.from_pretrained(path)
        # the PIL processor sees the same pictures whether or not torchvision is installed
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, device_map={"": device}, use_safetensors=True,
            quantization_config=quantization if nf4 else None)
    except (OSError, ValueError, SafetensorError) as error:
        judge.bad_input(f"--model {path}: {str(error).splitlines()[0]}")

    for module in model.modules():
        # On some CPUs bitsandbytes would repack the weights for a kernel without a backward pass.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if device == "cuda":
        patches_by_product(model)

    # no picture takes more than the image budget
    longest = image_processor.size["longest_edge"]
    image_processor.size["longest_edge"] = min(longest, MAX_PIXELS)
    if tokenizer.chat_template is None:         # early checkpoints have it in a file of its own
        file = cached_file(path, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if file is None:
            judge.bad_input(f"--model {path}: there is no chat template")
        tokenizer.chat_template = json.loads(Path(file).read_text())["chat_template"]
    return make_student(model, tokenizer, image_processor)


def patches_by_product(model):
    """
    Compute the vision tower's patch embedding as a matrix product. It is a convolution whose stride
    is its kernel; in bf16 cuDNN takes seconds for it.
    """
    conv = model.model.visual.patch_embed.proj
    assert conv.bias is None, "this vision tower has a bias here, which the product would drop"

    def product(patches):
        return torch.nn.functional.linear(patches.flatten(1), conv.weight.flatten(1))

    conv.forward = product


def make_student(model, tokenizer, image_processor):
    """Freeze the model, and read the seams of the chat template off a rendered dialogue."""
    model.requires_grad_(False).eval()

    # Every added token counts as a control token, also those that Qwen does not mark as special
    # (<tool_call>, ..): text from outside must not contain one, and the student must not say one.
    control = [token.content for token in tokenizer.added_tokens_decoder.values()]
    tokenizer.add_tokens(control, special_tokens=True)

    # what stands between the marks belongs to the template, to the last newline
    marks = ["@@system@@", "@@user@@", "@@reply@@", "@@again@@"]
    roles = ["system", "user", "assistant", "user"]
    chat = [{"role": role, "content": mark} for role, mark in zip(roles, marks)]

    def between(chat, marks):
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        pieces = []
        for mark in marks:
            piece, text = text.split(mark)
            pieces.append(tokenizer(piece, add_special_tokens=False).input_ids)
        return pieces

    names = ["system", "system_user", "user_assistant", "assistant_user"]
    seams = dict(zip(names, between(chat, marks)))
    seams["start_user"] = between(chat[1:2], marks[1:2])[0]     # without a system message
    token_id = tokenizer.convert_tokens_to_ids
    seams["image_start"] = [token_id("<|vision_start|>")]
    seams["image_end"] = [token_id("<|vision_end|>")]

    # the student says the token that ends its reply, so it is no part of the seam
    end = token_id("<|im_end|>")
    if seams["assistant_user"][:1] != [end]:
        judge.bad_input("the chat template does not end a reply with <|im_end|>")
    seams["assistant_user"] = seams["assistant_user"][1:]

    # rows of the embedding without a token, and control tokens, are never sampled
    allowed = torch.arange(model.lm_head.weight.shape[0]) < len(tokenizer)      # (V,)
    allowed[list(tokenizer.added_tokens_decoder)] = False
    allowed[end] = True
    return Student(model, tokenizer, image_processor, seams, allowed.to(model.device), end,
                   token_id("<|image_pad|>"))


# -----------------------------------------------------------------------------
# the student: adapters


def lora_config(r, alpha):
    """Without dropout: the policy that is scored has to be the one that was sampled."""
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=LORA_TARGETS,
                      task_type="CAUSAL_LM")


def add_lora(student, r, alpha):
    """A new trainable adapter "policy". It changes nothing yet, because its B matrices are 0."""
    student.model = get_peft_model(student.model, lora_config(r, alpha), adapter_name="policy")


def load_adapter(student, folder, name):
    """Load a PEFT folder as adapter `name`. Only the one called "policy" is trainable."""
    try:
        config = PeftConfig.from_pretrained(folder)
        expected = lora_config(config.r, config.lora_alpha).to_dict()
    except Exception as error:      # peft raises many kinds on damaged files
        judge.bad_input(f"{folder}: no adapter of sft.py: {error}")

    # peft would load other kinds of adapters (dropout, DoRA, ..), but the sampler and the loss
    # here would be wrong for them
    free = ("base_model_name_or_path", "inference_mode", "revision", "peft_version")
    odd = [key for key, value in config.to_dict().items()
           if key not in free and value != expected.get(key)]
    if odd:
        judge.bad_input(f"{folder}: no adapter of sft.py, because of its {', '.join(odd)}")
    config.inference_mode = False
    if isinstance(student.model, PeftModel):
        student.model.add_adapter(name, config)
    else:
        student.model = get_peft_model(student.model, config, adapter_name=name)
    load_weights(student, folder, name)


def load_weights(student, folder, name):
    """Read the weights of a PEFT folder into the adapter `name`, and check that all of them fit."""
    try:
        weights = load_file(Path(folder, "adapter_model.safetensors"))
        result = set_peft_model_state_dict(student.model, weights, name)
    except Exception as error:      # safetensors and torch raise several kinds
        judge.bad_input(f"{folder}: {error}")
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if result.unexpected_keys or missing:
        odd = (result.unexpected_keys + missing)[:3]
        judge.bad_input(f"{folder}: the adapter does not fit the model: {odd}")
    use_adapter(student, "policy")


def use_adapter(student, name):
    """Switch to an adapter. peft also makes it trainable, so only "policy" is set to be."""
    student.model.base_model.set_adapter(name)
    for key, parameter in student.model.named_parameters():
        if "lora_" in key:
            parameter.requires_grad_(".policy." in key)


def save_adapter(student, folder):
    """Write "policy" as a PEFT folder. The weights are there as a whole or not at all."""
    # "auto" would ask the hub every time whether the vocabulary has grown
    weights = get_peft_model_state_dict(student.model, adapter_name="policy",
                                        save_embedding_layers=False)
    weights = {name: weight.contiguous().cpu() for name, weight in weights.items()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise SystemExit(f"{folder}: the adapter is not saved, because {name} is not finite")
    student.model.peft_config["policy"].save_pretrained(folder)
    temporary = Path(folder, "adapter_model.tmp")
    try:
        save_file(weights, temporary)
    except SafetensorError as error:        # for example, the disk is full
        raise SystemExit(f"{folder}: the adapter could not be saved: {error}")
    temporary.replace(Path(folder, "adapter_model.safetensors"))


# -----------------------------------------------------------------------------
# the student: dialogues as tokens


@dataclass
class Row:
    """
    One dialogue as tokens. turn_id is made together with ids and has the same length: the index of
    the assistant turn that a token belongs to, -1 for everything the student did not say.
    """
    ids: list = field(default_factory=list)
    turn_id: list = field(default_factory=list)
    images: list = field(default_factory=list)      # paths, in order of appearance
    grids: list = field(default_factory=list)       # (height, width) of each image, in tokens

    def add(self, ids, turn=-1):
        self.ids += ids
        self.turn_id += [turn] * len(ids)

    def extend(self, other):
        self.ids += other.ids
        self.turn_id += other.turn_id
        self.images += other.images
        self.grids += other.grids


def encode(student, text):
    """Text from outside -> ids. "<|im_end|>" in it becomes ordinary characters."""
    return student.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def user_row(student, content, paths, first, system=None):
    """
    A user turn and the cue for the reply, as a Row. paths: one for each image part of content.
    first: whether it opens the dialogue, after the system message if there is one.
    """
    row, seams, paths = Row(), student.seams, iter(paths)
    if not first:
        row.add(seams["assistant_user"])
    elif system is not None:
        row.add(seams["system"] + encode(student, text_of(system)) + seams["system_user"])
    else:
        row.add(seams["start_user"])
    for part in parts_of(content):
        if part["type"] == "text":
            row.add(encode(student, part["text"]))
        else:
            path = next(paths)
            height, width = image_grid(student, open_image(path))
            row.images.append(path)
            row.grids.append((height, width))
            row.add(seams["image_start"] + [student.pad] * (height * width) + seams["image_end"])
    row.add(seams["user_assistant"])
    return row


def system_of(dialogue):
    """The content of the system message, None if there is none."""
    first = dialogue["messages"][0]
    return first["content"] if first["role"] == "system" else None


def render(student, dialogue, max_tokens):
    """
    A dialogue -> a Row without the turns that do not fit; nothing is cut inside a turn or an image.
    The row is empty if there is no reply, or none that fits.
    """
    row, fits = Row(), Row()
    users = iter(user_turns(dialogue))
    for message in dialogue["messages"]:
        if message["role"] == "user":
            content, paths = next(users)
            row.extend(user_row(student, content, paths, not row.ids, system_of(dialogue)))
        elif message["role"] == "assistant":
            turn = max(row.turn_id) + 1
            row.add(encode(student, text_of(message["content"])) + [student.end], turn)
            if len(row.ids) > max_tokens:
                break
            fits = Row(list(row.ids), list(row.turn_id), list(row.images), list(row.grids))
    return fits


def image_grid(student, image):
    """(height, width) of an image in tokens, from its size alone."""
    processor = student.image_processor
    cell = processor.patch_size * processor.merge_size          # pixels along one side of a token
    height, width = smart_resize(image.height, image.width, cell,
                                 processor.size["shortest_edge"], processor.size["longest_edge"])
    return height // cell, width // cell


@torch.no_grad()
def encode_images(student, paths):
    """
    {path: features (height * width, H)}, on the CPU. The vision tower is frozen, so each picture
    goes through it once per step, and all passes over the tokens share the features.
    """
    paths = sorted(set(paths))
    features = {}
    for i in range(0, len(paths), 24):
        images = [open_image(path) for path in paths[i:i + 24]]
        inputs = student.image_processor(images=images, return_tensors="pt").to(student.base.device)
        # pixel_values holds the patches of all images in one axis; the grids tell them apart
        output = student.base.model.get_image_features(inputs["pixel_values"],
                                                       inputs["image_grid_thw"])
        for path, feature in zip(paths[i:i + 24], output.pooler_output):
            features[path] = feature.cpu()
    return features


def mrope_positions(student, ids, grids, start=0):
    """
    Qwen VL's positions (time, height, width) of consecutive tokens, and the start of what follows.

    A text token counts up on all three axes. The tokens of an image share the time and spread over
    its grid, and what follows goes on after its larger side.
    """
    positions, grids, i = [], iter(grids), 0
    while i < len(ids):
        if ids[i] == student.pad:
            height, width = next(grids)
            for y in range(height):
                positions += [(start, start + y, start + x) for x in range(width)]
            start += max(height, width)
            i += height * width
        else:
            positions.append((start, start, start))
            start += 1
            i += 1
    return positions, start


# -----------------------------------------------------------------------------
# the student: forward passes


def collate(student, rows):
    """
    Rows -> ids (N, L), turn_id (N, L), positions (3, N, L), padded on the right. With a causal mask
    no token sees what comes after it, so the padding needs no mask of its own.
    """
    length = max(len(row.ids) for row in rows)
    ids, turn_id, positions = [], [], []
    for row in rows:
        padding = length - len(row.ids)
        ids.append(row.ids + [student.end] * padding)
        turn_id.append(row.turn_id + [-1] * padding)
        positions.append(mrope_positions(student, row.ids, row.grids)[0] + [(0, 0, 0)] * padding)
    device = student.base.device
    positions = torch.tensor(positions, device=device).permute(2, 0, 1)         # (3, N, L)
    return torch.tensor(ids, device=device), torch.tensor(turn_id, device=device), positions


def hidden_states(student, ids, positions, features, mask=None, cache=None, lm=None):
    """
    ids (N, L), positions (3, N, L) -> the last hidden states (N, L, H).

    features: those of the images in ids, in order. mask (N, 1, L, S): True where a token may look;
    None is causal. cache and lm: keys and values, and a copy of the language model, see grpo.py.
    """
    lm = lm or student.base.model.language_model
    embeddings = lm.embed_tokens(ids)                                           # (N, L, H)
    if features:
        is_image = (ids == student.pad)[..., None]                              # (N, L, 1)
        embeddings = embeddings.masked_scatter(is_image, torch.cat(features).to(embeddings))
    if mask is not None:
        # the additive form; otherwise attention would convert the mask again in every layer
        additive = torch.zeros_like(mask, dtype=embeddings.dtype)
        mask = additive.masked_fill_(~mask, -math.inf)
    output = lm(inputs_embeds=embeddings, position_ids=positions, past_key_values=cache,
                attention_mask={"full_attention": mask}, use_cache=False)
    return output.last_hidden_state


def policy_logits(student, hidden, temperature=1.0):
    """
    (M, H) -> (M, V), in fp32: the logits of the distribution that is sampled, divided by the
    temperature and -inf where the student must not go. The sampler and the loss both use this.
    """
    logits = student.base.lm_head(hidden).float() / temperature
    return logits.masked_fill_(~student.allowed, -math.inf)


def token_logps(student, hidden, targets, temperature=1.0):
    """
    hidden (M, H), targets (M,) -> log-probabilities (M,) and entropies (M,).

    The logits of 8k tokens and a vocabulary of 152k take 5 GB. So they are made in chunks, and the
    backward pass makes them again (checkpoint) instead of keeping them.
    """
    def chunk_logps(hidden, targets):
        logps = policy_logits(student, hidden, temperature).log_softmax(-1)     # (m, V)
        target_logps = logps.gather(-1, targets[:, None])[:, 0]                 # (m,)
        with torch.no_grad():
            # clamped, because 0 * -inf is NaN
            entropy = -torch.linalg.vecdot(logps.exp(), logps.clamp(min=-1e4))
        return target_logps, entropy

    # large chunks keep a GPU busy, small ones stay in the cache of a CPU
    logits_per_chunk = 2 ** 26 if hidden.is_cuda else 2 ** 20
    chunk = max(32, logits_per_chunk // len(student.allowed))
    logps, entropies = [], []
    for i in range(0, len(hidden), chunk):
        logp, entropy = checkpoint(chunk_logps, hidden[i:i + chunk], targets[i:i + chunk],
                                   use_reentrant=False)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)


def reply_logps(student, rows, images, temperature=1.0):
    """
    Log-probabilities (M,) and entropies (M,) of all tokens that the student said in these rows, row
    by row in order. images: {path: features}.
    """
    ids, turn_id, positions = collate(student, rows)
    features = [images[path] for row in rows for path in row.images]
    hidden = hidden_states(student, ids, positions, features)                   # (N, L, H)
    # position l predicts token l + 1; only what the student said goes through lm_head
    said = turn_id[:, 1:] >= 0                                                  # (N, L - 1)
    return token_logps(student, hidden[:, :-1][said], ids[:, 1:][said], temperature)


def micro_batches(rows, budget):
    """
    Split rows into batches (lists of indices) of at most `budget` padded tokens, one row at least.
    Rows of similar length go together, so that at most 5 % of a batch is padding.
    """
    batches, batch, real = [], [], 0
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].ids)):
        length = len(rows[i].ids)
        padded = (len(batch) + 1) * length
        if batch and (padded > budget or real + length < 0.95 * padded):
            batches.append(batch)
            batch, real = [], 0
        batch.append(i)
        real += length
    return batches + [batch] if batch else batches


# -----------------------------------------------------------------------------
# optimization and checkpoints, also for grpo.py


def adamw(student, lr):
    """
    AdamW on the adapter, without weight decay. On a GPU it is the paged 8-bit one: 2 bytes of state
    per weight instead of 8, and they move to the CPU when memory is short.
    """
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    on_gpu = parameters[0].is_cuda
    optimizer = bitsandbytes.optim.PagedAdamW8bit if on_gpu else torch.optim.AdamW
    return optimizer(parameters, lr=lr, weight_decay=0.0)


def optimizer_step(optimizer, loss):
    """
    Clip the gradient to norm 1 and step, unless the loss or the gradient is not finite.
    -> (norm before clipping, whether a step was taken)
    """
    parameters = optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    healthy = math.isfinite(loss) and math.isfinite(norm)
    if healthy:
        optimizer.step()
    optimizer.zero_grad()
    return norm, healthy


def save_checkpoint(out, step, student, optimizer, args):
    """
    Write OUT/step_NNNNNN with adapter, optimizer, step and arguments. It is written under another
    name and then renamed, so a folder of that name is complete. The last two are kept.
    """
    temporary, folder = Path(out, "step.tmp"), Path(out, f"step_{step:06}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_adapter(student, temporary)
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        judge.write_file(temporary / "run.json", json.dumps({"step": step, "args": vars(args)}))
    except Exception as error:      # safetensors and torch have their own errors for a full disk
        raise SystemExit(f"{folder} could not be saved: {error}")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for old in sorted(Path(out).glob("step_??????"))[:-2]:
        shutil.rmtree(old)


def load_checkpoint(out, student, optimizer):
    """Load the newest checkpoint, if there is one. -> the number of steps that are done"""
    folders = sorted(Path(out).glob("step_??????"))
    if not folders:
        return 0
    load_weights(student, folders[-1], "policy")
    # by way of the CPU: bitsandbytes marks its state as paged, and loading it onto the GPU would
    # keep the mark but not the pages
    try:
        state = torch.load(folders[-1] / "optimizer.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(state)
        step = json.loads((folders[-1] / "run.json").read_text())["step"]
        if folders[-1].name != f"step_{step:06}":
            raise ValueError(f"run.json says step {step}")
        return step
    except Exception as error:      # torch raises many kinds on damaged files
        judge.bad_input(f"{folders[-1]} is damaged, remove it to go on before it: {error}")


def stop_signals():
    """
    From now on Ctrl-C, SIGTERM and SIGHUP are noted in the list that is returned, so that the
    training loop can save first. The second one of a kind ends the script at once.
    """
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        print("stopping after this step", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, note)
    return received


def open_log(out, name, start):
    """Cut a log back to the steps before `start`. -> its rows, and the file open to append"""
    path = Path(out, name)
    rows = judge.read_log(path, keep=lambda record: record["step"] < start)
    return rows, open(path, "a", encoding="utf-8")


def write_row(log, row):
    """One line of strict JSON: numbers that are not finite become null."""
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            row = {**row, key: None}
    log.write(json.dumps(row, ensure_ascii=False) + "\n")
    log.flush()


# -----------------------------------------------------------------------------
# training


def epoch_batches(n, batch, seed, epoch):
    """
    The batches of one epoch: a permutation of range(n) that depends on seed and epoch only. It is
    not sorted by length, because length goes with the kind of dialogue.
    """
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return [order[i:i + batch] for i in range(0, n, batch)]


def learning_rate(step, steps, args):
    """Linear warmup, then a cosine to 0."""
    warmup = max(1, round(args.warmup * steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def loss_over(student, rows, args, backward=False):
    """
    The mean negative log-likelihood per trained token, as a float. Every micro-batch is divided by
    the tokens of all rows, so how the rows are split changes neither loss nor gradient.
    """
    n_tokens = sum(turn >= 0 for row in rows for turn in row.turn_id)
    images = encode_images(student, [path for row in rows for path in row.images])
    total = 0.0
    for batch in micro_batches(rows, args.micro_tokens):
        with torch.set_grad_enabled(backward):
            logps, _ = reply_logps(student, [rows[i] for i in batch], images)
            loss = -logps.sum() / n_tokens
        if backward:
            loss.backward()
        total += loss.item()
    return total


def bracketed(student, row):
    """A row as text, trained tokens in brackets, so that one can see the mask."""
    text = ""
    for turn, tokens in itertools.groupby(zip(row.turn_id, row.ids), key=lambda pair: pair[0]):
        piece = student.tokenizer.decode([i for _, i in tokens if i != student.pad])
        text += f"[{piece}]" if turn >= 0 else piece
    return judge.printable(text)


def render_all(student, dialogues, args):
    """-> (training rows, held-out rows). Dialogues of one seed are all on the same side."""
    seeds = sorted({d["seed_id"] for d in dialogues})
    held_out = random.Random(f"{args.seed}/held_out").sample(seeds, int(args.held_out * len(seeds)))
    train, test, empty, n_dropped = [], [], [], 0
    for dialogue in dialogues:
        row = render(student, dialogue, args.max_tokens)
        replies = sum(message["role"] == "assistant" for message in dialogue["messages"])
        n_dropped += replies - len(set(row.turn_id) - {-1})
        if not row.ids:
            empty.append(dialogue["id"])
        else:
            (test if dialogue["seed_id"] in held_out else train).append(row)
    if empty:
        judge.bad_input(f"{len(empty)} dialogues have no reply within --max_tokens "
                        f"{args.max_tokens}: {', '.join(empty[:5])}")
    print(f"{len(train)} dialogues, {sum(len(row.ids) for row in train)} tokens; {len(test)} held "
          f"out; {n_dropped} turns dropped beyond {args.max_tokens} tokens")
    return train, test


def check_finite(rows, steps):
    """End a run whose last three steps were not finite."""
    bad = [not row["healthy"] for row in rows[-3:]]
    if all(bad) and len(bad) == min(3, steps):
        raise SystemExit(f"{len(bad)} steps in a row were not finite")


def main(argv=None):
    args = parse_args(argv)
    dialogues = read_dialogues(args.data)
    args.data_hash = fingerprint(dialogues)
    lock = judge.open_run(args)
    stop = stop_signals()

    torch.manual_seed(args.seed)
    student = load_student(args.model, args.nf4)
    add_lora(student, args.lora_r, args.lora_alpha)
    if torch.cuda.is_available():       # recompute activations: less memory, a third more time
        student.base.activation_checkpointing_enable({"use_reentrant": False})
    train, test = render_all(student, dialogues, args)
    print("one dialogue, trained tokens in brackets:", bracketed(student, train[0]), sep="\n")

    optimizer = adamw(student, args.lr)
    start = load_checkpoint(args.out, student, optimizer)
    rows, log = open_log(args.out, "log.jsonl", start)
    steps_per_epoch = math.ceil(len(train) / args.batch)
    steps = max(1, round(args.epochs * steps_per_epoch))
    for step in range(start, steps):
        begin = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args)

        # one step on the dialogues of this batch
        epoch, i = divmod(step, steps_per_epoch)
        batch = epoch_batches(len(train), args.batch, args.seed, epoch)[i]
        student.model.train()
        loss = loss_over(student, [train[n] for n in batch], args, backward=True)
        norm, healthy = optimizer_step(optimizer, loss)
        row = {"step": step, "loss": loss, "grad_norm": norm, "healthy": healthy,
               "seconds": time.time() - begin}
        rows.append(row)

        # loss on dialogues that are not trained on
        if test and ((step + 1) % args.eval_every == 0 or step + 1 == steps):
            student.model.eval()
            row["held_out"] = loss_over(student, test, args)
        write_row(log, row)
        held_out = f" | held out {row['held_out']:.4f}" if "held_out" in row else ""
        print(f"step {step}/{steps} | loss {loss:.4f}{held_out} | grad {norm:.2f} | "
              f"{row['seconds']:.1f} s" + ("" if healthy else " | ! not finite, step skipped"))

        # checkpoints, and the ends of a run that went wrong or was asked to stop
        check_finite(rows, steps)
        if (step + 1) % args.save_every == 0 or step + 1 == steps or stop:
            save_checkpoint(args.out, step + 1, student, optimizer, args)
        if stop:
            raise SystemExit("stopped by a signal; --resume goes on")
    save_adapter(student, args.out)
    lock.close()
    print(f"adapter in {args.out}")


if __name__ == "__main__":
    judge.run(main)
