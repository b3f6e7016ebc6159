"""
The data format of all scripts: JSONL, one seed or dialogue per line. synth.py shows one of each.

read_dialogues(paths)       checks the records of files; a seed becomes a dialogue of user turns
user_turns(dialogue)        what the user says, with the pictures that are shown
open_image(path)            a picture as RGB, for the student
image_png(path)             a picture as PNG bytes, for requests to the tutor and other back ends
fingerprint(dialogues)      a hash by which a run notices other data
"""

import base64
import hashlib
import io
import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import judge

KINDS = ("benign", "obfuscated", "red_team")
SPLITS = ("sft", "rl", "bench")

# -----------------------------------------------------------------------------
# messages and pictures

# Pillow could read many more, but some of them start other programs
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def parts_of(content):
    """The parts of a message's content; a string is one text."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(content):
    """The text of a message's content, without its pictures."""
    return "".join(part["text"] for part in parts_of(content) if part["type"] == "text")


def user_turns(dialogue):
    """[(content, [image paths])] of the user turns as they were written."""
    turns, images = [], iter(dialogue["images"])        # one path for each image part, in order
    for message in dialogue["messages"]:
        if message["role"] == "user":
            parts = parts_of(message["content"])
            paths = [next(images) for part in parts if part["type"] == "image"]
            turns.append((message["content"], paths))
    return turns


def open_image(path):
    """A picture as RGB, the way a person would see it. Raises ValueError that names the path."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError("too many pixels")
            if max(image.size) > 200 * min(image.size):         # Qwen's processor refuses these
                raise ValueError("too long and thin")
            # a photo may say how it has to be turned
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                # Greys of 16 bits or floats: Pillow would clip them. White is 1, 255, 65535, or
                # the largest value.
                grey = np.nan_to_num(np.asarray(image, float), posinf=0, neginf=0)
                largest = grey.max()
                white = next((w for w in (1, 255, 65535) if largest <= w), largest)
                image = Image.fromarray((255 * grey / white).clip(0, 255).astype(np.uint8))
            # what is transparent lies on white paper
            if image.has_transparency_data:
                paper = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(paper, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:      # Pillow raises many kinds of exceptions on damaged files
        raise ValueError(f"image {path}: {str(error)[:200]}") from None


@lru_cache(1024)
def image_png(path):
    """A picture as PNG bytes of at most 512 x 512 pixels (paper), for requests."""
    # a request carries no more pixels than the student sees
    image = open_image(path)
    image.thumbnail((512, 512))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def first_picture(images):
    """The first of these pictures for a request, None if there is none."""
    return image_png(images[0]) if images else None


def thumbnail(path):
    """A picture as a data URL, small enough for thousands in one page."""
    image, buffer = Image.open(io.BytesIO(image_png(path))), io.BytesIO()
    image.thumbnail((256, 256))
    image.save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# -----------------------------------------------------------------------------
# reading files


def seed_to_dialogue(seed):
    """A seed as a dialogue of user turns: its question, or its list "turns" (multi-turn sets)."""
    # a single-turn set has a question, a multi-turn set a list of turns
    turns = seed.get("turns") or [seed.get("question")]
    if not isinstance(turns, list):
        raise ValueError("turns: no list")
    images = [seed["image"]] if seed.get("image") else []
    messages = [{"role": "user", "content": turn} for turn in turns]
    if images:
        messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": turns[0]}]
    kind = seed.get("kind", "harmful")
    kind = "red_team" if kind == "harmful" else kind
    return {**seed, "kind": kind, "images": images, "messages": messages}


def check_dialogue(record, folder):
    """Raise ValueError("field: what is wrong") unless the record is a sound dialogue."""
    def need(condition, complaint):
        if not condition:
            raise ValueError(complaint)

    # names
    for name in ("id", "seed_id"):
        need(isinstance(record.get(name), str) and record[name], f"{name}: missing or no string")
    need(record.get("kind") in KINDS, f"kind: must be harmful or one of {', '.join(KINDS)}")
    split = record.get("split") or SPLITS[0]
    need(split in SPLITS, f"split: must be one of {', '.join(SPLITS)}")

    # user and assistant alternate if there are replies; static dialogues have user turns only
    messages = record.get("messages")
    need(isinstance(messages, list) and messages, "messages: missing or no list")
    need(all(isinstance(m, dict) for m in messages), "messages: must be JSON objects")
    roles = [m.get("role") for m in messages]
    if roles[0] == "system":
        roles = roles[1:]
    alternating = [("user", "assistant")[i % 2] for i in range(len(roles))]
    need(roles and (roles == alternating or roles == ["user"] * len(roles)),
         "messages: roles must be [system,] user, assistant, user, .. or user turns only")

    # each message is a text or a list of parts
    n_image_parts = 0
    for message in messages:
        parts = parts_of(message.get("content"))
        need(isinstance(parts, list) and parts, "messages: content is no string or list of parts")
        for part in parts:
            need(isinstance(part, dict), "messages: content is no string or list of parts")
            if part.get("type") == "image":
                need(message["role"] == "user", "messages: only the user can show an image")
                n_image_parts += 1
            else:
                need(part.get("type") == "text", "messages: parts must be of type text or image")
                need(judge.read_text(part.get("text")), "messages: a text is missing or empty")

    # one path for each image part, inside the folder of the data
    images = record.get("images", [])
    need(isinstance(images, list) and len(images) == n_image_parts,
         f"images: must be a list of {n_image_parts} paths, one for each image part")
    for path in images:
        need(isinstance(path, str), "images: must be paths")
        file = Path(os.path.realpath(Path(folder, path)))
        need(file.is_relative_to(Path(folder).resolve()), f"images: {path} is outside {folder}")
        need(file.is_file(), f"images: there is no file {path}")
        open_image(file)


def prepare_dialogue(record, folder):
    """Check a record, and make its image paths absolute. A seed becomes a dialogue."""
    if not isinstance(record, dict):
        raise ValueError("record: no JSON object")
    json.dumps(record, ensure_ascii=False).encode()     # raises UnicodeError for half a character
    if "messages" not in record:
        record = seed_to_dialogue(record)
    check_dialogue(record, folder)
    images = [str(Path(folder, path).resolve()) for path in record.get("images", [])]
    names = ("category", "strategy", "split", "source")
    return {**record, **{name: str(record.get(name) or "") for name in names}, "images": images}


def read_dialogues(paths):
    """
    The dialogues of JSONL files; seeds become dialogues of user turns. If any record is bad, the
    first twenty are named by file, line and field, and the script ends with exit code 2.
    """
    dialogues, bad = {}, []
    for path in map(Path, paths):
        if not path.is_file():              # a pipe would be waited for without end
            judge.bad_input(f"{path}: no such file")
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                dialogue = prepare_dialogue(json.loads(line.decode("utf-8-sig")), path.parent)
                if dialogue["id"] in dialogues:
                    raise ValueError(f"id: {dialogue['id']} appears twice")
                dialogues[dialogue["id"]] = dialogue
            except (ValueError, OSError, RecursionError) as error:
                bad.append(f"{path}:{number}: {error}")
    # nothing is done with half of the data
    if bad:
        judge.bad_input("\n".join(bad[:20] + [f"{len(bad)} bad records; nothing was done"]))
    if not dialogues:
        judge.bad_input(f"{', '.join(map(str, paths))}: no records")
    return list(dialogues.values())


def fingerprint(dialogues):
    """A hash of what dialogues say and show, so that a run notices other data on --resume."""
    rows = []
    for d in dialogues:
        pictures = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in d["images"]]
        rows.append([d["id"], d["seed_id"], d["kind"], d["messages"], pictures])
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16]
