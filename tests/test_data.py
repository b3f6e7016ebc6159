"""synth.py: the data format and its pictures, the splits, Stage I and Stage II."""
import contextlib
import importlib
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import judge
import sft
import synth

ROOT = Path(synth.__file__).resolve().parent
HI = [{"type": "image"}, {"type": "text", "text": "hi"}]


def say(*contents):
    """Messages in turn from the user and the assistant."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def record(**change):
    return {"id": "a", "seed_id": "s", "kind": "red_team", "strategy": "", "category": "",
            "split": "sft", "images": ["x.png"], "messages": say(HI, "no"), **change}


def talk(*messages):
    return record(images=[], messages=list(messages))


def seed(**change):
    return {"id": "a", "seed_id": "s", "image": "x.png", "question": "q?", "kind": "harmful",
            "category": "c", **change}


@pytest.fixture
def folder(tmp_path):
    """A data folder with one picture and a link that leads to itself."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "data/x.png")
    (tmp_path / "data/loop.png").symlink_to("loop.png")
    return tmp_path / "data"


def write(folder, *rows, name="d.jsonl"):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return str(folder / name)


def refused(capsys, *paths):
    """The lines that say why files of seeds or dialogues were refused, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        synth.read_dialogues(paths)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()


# ----------------------------------------------------------------------------- reading files

# How a message begins, the field, and records in which this field is bad.
BAD = {
    "": [b"{", b"null", b"[1]", b"\xff\xfe{}", bytes(9), b"[" * 100000, b"9" * 5000,
         record(id="half a character \ud83d"), seed(image="x\0.png"), seed(image="x" * 5000)],
    "id": [{}, record(id=None), record(id=7), record(id=""), record(id=["a"])],
    "seed_id": [record(seed_id=3), seed(seed_id="")],
    "kind": [record(kind="evil"), record(kind=["benign"])],
    "split": [seed(split="train"), record(split=["sft"])],
    "image": [record(images="x.png"), record(images=[1]), record(images=[]), seed(image=["x.png"]),
              record(images=["x.png"] * 2), seed(image="gone.png"), record(images=["."])],
    "messages": [
        record(messages=None), record(messages=[]), record(messages=["hi"]), talk(*say("")),
        talk(*say("hi", " ")), talk(*say(3)), talk(*say([])), talk(*say(["hi"])),
        talk(*say([{"type": "video"}])), talk(*say([{"type": "text"}])), talk({"role": "user"}),
        talk({"role": "tool", "content": "hi"}), talk(*say("a", "b")[1:]), record(messages=say(HI, HI)),
        talk(*say("a", "b", "c"), *say("d")), seed(question=None), seed(turns=["one", ""])],
    "turns": [seed(turns=7), seed(turns="one"), seed(turns={"a": 1})],
    "messages: roles": [talk({"role": ["user"], "content": "hi"})],
    "images: loop": [seed(image="loop.png")],
}
TYPES = pytest.mark.xfail(strict=True, reason="a value of an unexpected type ends in a traceback")


@pytest.mark.parametrize("field", [*list(BAD)[:-3], *(pytest.param(f, marks=TYPES) for f in list(BAD)[-3:])])
def test_a_bad_record_is_named_by_file_line_and_field(folder, capsys, field):
    for bad in BAD[field]:
        path = write(folder, record(id="ok"), bad, record(id="ok too"))
        lines = refused(capsys, path)
        assert len(lines) == 2 and lines[0].startswith(f"{path}:2: {field.split(':')[0]}"), lines


def test_the_first_twenty_bad_records_are_named_and_all_are_counted(folder, capsys):
    path = write(folder, record(id="ok"), *[record(id=f"b{i}", kind="?") for i in range(33)])
    lines = refused(capsys, path)
    assert len(lines) == 21 and lines[19].startswith(f"{path}:21: kind") and "33" in lines[20]


def test_files_that_are_missing_empty_pipes_or_repeat_an_id_are_refused(folder, capsys):
    for path in (str(folder), str(folder / "gone.jsonl"), write(folder, name="empty.jsonl")):
        assert len(refused(capsys, path)) == 1
    one, two = write(folder, record(), name="one.jsonl"), write(folder, record(), name="two.jsonl")
    assert refused(capsys, one, two)[0].startswith(f"{two}:1: id: a")

    # nobody writes into this pipe, so whoever reads it waits without end
    os.mkfifo(folder / "pipe.jsonl")
    command = f"{sys.executable} synth.py --generator toy --out {folder}/out --seeds {folder}/pipe.jsonl"
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


WORDS = ["user", "system", "image", "text", "x.png", "../x.png", "benign", "\0", "\ud83d"]
KEYS = st.sampled_from(["type", "text", "role", "content", "id"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.sampled_from(WORDS),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS, part, max_size=3), max_leaves=6)


@settings(max_examples=200, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JUNK, st.sampled_from([*record(), "question", "turns", "image", "role", "content"]))
def test_no_junk_in_a_field_brings_a_traceback(folder, junk, field):
    """The record is refused, or it can be used."""
    if field in ("role", "content"):
        bad = talk({**say("hi")[0], field: junk})
    else:
        bad = {**(record() if field in record() else seed()), field: junk}
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        dialogue, = synth.read_dialogues([write(folder, bad)])
        assert synth.user_turns(dialogue) and json.dumps(dialogue, ensure_ascii=False).encode()
