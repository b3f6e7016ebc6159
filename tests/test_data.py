"""synth.py: the data format and its pictures, the splits, Stage I and Stage II."""
import importlib
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import judge
import sft
import synth
from conftest import HOSTILE

ROOT = Path(synth.__file__).resolve().parent
KINDS = synth.KINDS
HI = [{"type": "image"}, {"type": "text", "text": "hi"}]


def say(*contents):
    """Messages in turn from the user and the assistant."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def record(**change):
    return {"id": "a", "seed_id": "s", "kind": "red_team", "strategy": "", "category": "",
            "split": "sft", "images": ["x.png"], "messages": say(HI, "no"), **change}


def text_record(messages):
    return record(images=[], messages=messages)


def seed(**change):
    return {"id": "a", "seed_id": "s", "image": "x.png", "question": "q?", "kind": "harmful",
            "category": "c", **change}


@pytest.fixture
def folder(tmp_path):
    """A data folder with one picture, x.png."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "data/x.png")
    return tmp_path / "data"


def write(folder, *rows, name="d.jsonl"):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return str(folder / name)


def refused(capsys, path, prepare=synth.prepare_dialogue):
    """The lines that say why a file was refused, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        synth.read_records([path], prepare)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()


# ----------------------------------------------------------------------------- bad records

# The field that a message begins with, and records in which this field is bad.
BAD = {
    "": [b"{", b"null", b"[1]", b'"x"', b"\xff\xfe{}", bytes(9), b"[" * 100000, b"9" * 5000,
         record(id="\ud83d"), record(images=["x\0.png"]), record(images=["x" * 5000])],
    "id": [{}, record(id=None), record(id=7), record(id=""), record(id=["a"])],
    "seed_id": [record(seed_id=3), record(seed_id="")],
    "kind": [record(kind="evil"), record(kind=None), record(kind=["benign"])],
    "category": [record(category=None), seed(category=3)],
    "image": [record(images="x.png"), record(images=[1]), record(images=[]), seed(image=7),
              record(images=["x.png"] * 2), record(images=["gone.png"]), record(images=["."]),
              record(images=["d.jsonl"]), seed(image="../data"), seed(image=["x.png"])],
    "messages": [
        record(messages=None), record(messages=[]), record(messages=["hi"]),
        text_record(say("")), text_record(say(" \n")), text_record(say("hi", "")),
        text_record(say(3)), text_record(say([])), text_record(say(["hi"])),
        text_record(say([{"type": "video"}])), text_record(say([{"type": "text"}])),
        text_record(say("hi", [{"type": "image"}])), text_record([{"role": "user"}]),
        text_record([{"content": "hi"}]), text_record([{"role": "tool", "content": "hi"}]),
        text_record(say("a", "b", "c")[1:]), text_record([*say("a", "b"), *say("c", "d")[1:]]),
        seed(question=None), seed(question=["q"]), seed(turns=["one", ""])],
}


@pytest.mark.parametrize("field", BAD)
def test_a_bad_record_is_named_by_file_line_and_field(folder, capsys, field):
    for bad in BAD[field]:
        path = write(folder, record(id="ok"), bad, record(id="ok too"))
        lines = refused(capsys, path)
        assert len(lines) == 2 and lines[0].startswith(f"{path}:2: {field}"), (bad, lines)


@pytest.mark.parametrize("bad", [
    seed(turns=7), seed(turns="not a list"), seed(turns={"a": 1}),
    text_record([{"role": ["user"], "content": "hi"}]), record(images=["loop.png"])])
def test_a_field_of_the_wrong_type_is_a_bad_record_too(folder, capsys, bad):
    (folder / "loop.png").symlink_to("loop.png")
    path = write(folder, bad)
    assert refused(capsys, path)[0].startswith(f"{path}:1: ")


def test_the_first_twenty_bad_records_are_named_and_all_are_counted(folder, capsys):
    path = write(folder, record(id="ok"), *[record(id=f"b{i}", kind="?") for i in range(33)])
    lines = refused(capsys, path)
    assert len(lines) == 21 and lines[19].startswith(f"{path}:21: kind") and "33" in lines[20]


def test_ids_are_unique_and_a_seeds_split_is_one_of_three(folder, capsys):
    assert ":2: id: a appears twice" in refused(capsys, write(folder, record(), record()))[0]
    path = write(folder, seed(split="train"))
    assert refused(capsys, path, synth.prepare_seed)[0].startswith(f"{path}:1: split")


def test_what_is_no_file_of_records_is_one_line(folder, capsys):
    """A pipe is not waited for."""
    os.mkfifo(folder / "pipe.jsonl")
    command = [sys.executable, "synth.py", "--seeds", str(folder / "pipe.jsonl"), "--generator",
               "toy", "--out", str(folder / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    for path in (str(folder), str(folder / "gone.jsonl"), write(folder, name="empty.jsonl")):
        assert len(refused(capsys, path)) == 1


def paths_of(value, at=()):
    """Where the parts of a JSON value are."""
    yield at
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in pairs if isinstance(value, (dict, list)) else ():
        yield from paths_of(part, (*at, key))


def put(value, at, new):
    if not at:
        return new
    value = value.copy()
    value[at[0]] = put(value[at[0]], at[1:], new)
    return value


WORDS = ["user", "system", "image", "text", "x.png", "../x.png", "benign", HOSTILE, "\0", "\ud83d"]
KEYS = st.sampled_from(["type", "text", "role", "content", "id"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.sampled_from(WORDS),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS, part, max_size=3), max_leaves=5)
GOOD = [record(messages=[{"role": "system", "content": "be"}, *say(HI, "no", "more")]), seed(),
        seed(turns=["one", "two"], split="rl")]


@settings(max_examples=150, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_change_of_a_record_brings_a_traceback(folder, data):
    """Whatever is changed in a record, it is refused, or it can be used."""
    good = data.draw(st.sampled_from(GOOD))
    at = data.draw(st.sampled_from(list(paths_of(good))))
    path = write(folder, put(good, at, data.draw(JUNK)))
    try:
        dialogue, = synth.read_records([path], synth.prepare_seed)
    except SystemExit as stop:
        assert stop.code == 2
        return
    assert synth.user_turns(dialogue) and json.dumps(dialogue, ensure_ascii=False).encode()


# ----------------------------------------------------------------------------- good records


def test_bom_crlf_and_a_last_line_without_newline(folder):
    rows = [{**text_record(say("hi")), "id": f"ü{i}"} for i in range(3)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    (folder / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    ids = [d["id"] for d in synth.read_dialogues([folder / "d.jsonl"])]
    assert ids == ["ü0", "ü1", "ü2"]


def test_dialogues_and_seeds_become_user_turns(folder):
    picture = str(folder / "x.png")
    cases = [
        (record(), [(HI, [picture])]),
        (record(messages=say(HI, "no", "open")), [(HI, [picture]), ("open", [])]),
        (record(messages=[{"role": "system", "content": "be"}, *say(HI)]), [(HI, [picture])]),
        # without replies: two user turns in a row, and no pictures
        (text_record([*say("one"), *say("two")]), [("one", []), ("two", [])]),
        (seed(question="hi"), [(HI, [picture])]),
        (seed(turns=["hi", "two"]), [(HI, [picture]), ("two", [])]),
        (seed(image=None), [("q?", [])]),
    ]
    rows = [{**row, "id": str(i)} for i, (row, _) in enumerate(cases)]
    found = [synth.user_turns(d) for d in synth.read_dialogues([write(folder, *rows)])]
    assert found == [turns for _, turns in cases]


# ----------------------------------------------------------------------------- pictures


def test_a_picture_is_opened_as_a_person_sees_it(tmp_path):
    def pixels(image, name, **more):
        image.save(tmp_path / name, **more)
        return np.asarray(synth.open_image(tmp_path / name))

    # Pillow alone makes a 16-bit ramp white and a float ramp black
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    for image, name in ((Image.fromarray((65535 * ramp).astype(np.uint16)), "grey.png"),
                        (Image.fromarray(ramp.astype(np.float32)), "float.tif")):
        grey = pixels(image, name)[..., 0]
        assert np.abs(grey - 255 * ramp).max() <= 1

    # a black figure on nothing is black on white
    clear = Image.new("LA", (9, 9), (0, 0))
    clear.putpixel((4, 4), (0, 255))
    for mode, name in (("LA", "a.png"), ("RGBA", "b.png"), ("RGBA", "c.webp")):
        seen = pixels(clear.convert(mode), name, **({"lossless": True} if "webp" in name else {}))
        assert seen[4, 4].max() == 0 and seen[0, 0].min() == 255

    # a camera that was turned: the left of the file is the top of the picture
    red_left = Image.new("RGB", (40, 20))
    red_left.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = pixels(red_left, "turned.jpg", exif=exif)
    assert seen.shape == (40, 20, 3) and seen[5, :, 0].min() > 200 > 50 > seen[35, :, 0].max()


def png_header(width, height):
    """A PNG that claims to be large, in 60 bytes."""
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for chunk in (b"IHDR" + header, b"IDAT", b"IEND"):
        data += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data


def test_six_formats_open_and_everything_else_is_named(tmp_path):
    noise = Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3600))
    files = {"text.png": b"<svg/>", "empty.png": b"", "bomb.png": png_header(20000, 20000),
             "large.png": png_header(10000, 9000), "huge.png": png_header(2 ** 31 - 1, 2 ** 31 - 1)}
    for format in ("PPM", "ICO", "TGA", "PCX", "EPS"):
        noise.save(tmp_path / f"refused.{format}", format)
        files[f"refused.{format}"] = (tmp_path / f"refused.{format}").read_bytes()
    Image.new("RGB", (1, 4000)).save(tmp_path / "thin.png")
    files["thin.png"] = (tmp_path / "thin.png").read_bytes()
    for format in synth.FORMATS:
        noise.save(tmp_path / "any_name", format)
        assert synth.open_image(tmp_path / "any_name").mode == "RGB"
        whole = (tmp_path / "any_name").read_bytes()
        files[f"cut.{format}"] = whole[:60]
        for _ in range(20):                     # with one byte changed, it opens or is named
            at = random.Random(len(files)).randrange(len(whole))
            files[f"{len(files)}.damaged"] = whole[:at] + b"\xff" + whole[at + 1:]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        try:
            synth.open_image(tmp_path / name)
            assert "damaged" in name, name
        except ValueError as error:
            assert name in str(error)


def test_no_path_leads_out_of_the_folder(folder):
    Image.new("RGB", (9, 9)).save(folder.parent / "secret.png")
    (folder / "sub").mkdir()
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    for path in ("../secret.png", "sub/../../secret.png", str(folder.parent / "secret.png"),
                 "link.png"):
        with pytest.raises(ValueError, match="^images: .* outside"):
            synth.check_dialogue(record(images=[path]), folder)
    synth.check_dialogue(record(images=["sub/../x.png"]), folder)


def test_the_picture_of_a_request_is_a_png_of_at_most_512_pixels(folder):
    Image.new("CMYK", (1500, 700)).save(folder / "big.jpg")
    image = Image.open(io.BytesIO(synth.image_png(str(folder / "big.jpg"))))
    assert (image.format, image.mode) == ("PNG", "RGB") and max(image.size) == 512


# ----------------------------------------------------------------------------- splits


def split(folder, links, shares=(1, 1, 1), number=0, fixed=()):
    """The splits of seeds that are given as (seed_id, picture); a picture is a number."""
    rows = []
    for i, (seed_id, picture) in enumerate(links):
        (folder / str(picture)).write_text(str(picture))
        rows.append({"id": str(i), "seed_id": f"s{seed_id}", "images": [str(folder / str(picture))],
                     "split": dict(fixed).get(i, "")})
    synth.split_seeds(rows, shares, number)
    return [row["split"] for row in rows]


def test_seeds_that_share_a_seed_id_or_a_picture_are_in_one_split(tmp_path):
    rng = random.Random(0)
    for number in range(20):
        links = [(rng.randint(0, 25), rng.randint(0, 25)) for _ in range(22)]
        found = split(tmp_path, links, number=number)
        for (s, p), mine in zip(links, found):
            for (t, q), other in zip(links, found):
                assert mine == other or (s != t and p != q)
        # the order of the file does not matter
        assert split(tmp_path, links[::-1], number=number) == found[::-1]


def test_splits_have_their_shares_and_a_fixed_split_is_kept(tmp_path, capsys):
    links = [(i, i) for i in range(400)]
    found = split(tmp_path, links, (0.75, 0.10, 0.15))
    for name, share in zip(synth.SPLITS, (0.75, 0.10, 0.15)):
        assert found.count(name) / 400 == pytest.approx(share, abs=0.06)
    assert found != split(tmp_path, links, (0.75, 0.10, 0.15), number=1)

    # 0, 1 and 2 hang together by a seed_id and a picture, so all follow the fixed split of 2
    chain = [(1, 1), (1, 2), (3, 2), (4, 4)]
    assert split(tmp_path, chain, (0, 0, 1), fixed={2: "rl"}) == ["rl", "rl", "rl", "bench"]
    with pytest.raises(SystemExit) as stop:
        split(tmp_path, chain, fixed={0: "rl", 2: "sft"})
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("2: split sft")
