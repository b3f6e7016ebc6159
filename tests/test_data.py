"""synth.py: the data format, what becomes of bad records, the splits, and that others can read the files."""
import csv
import json
import math
import random
import re
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import judge
import sft
import synth
import toy
from conftest import HOSTILE
from readme import ROOT


def record(**change):
    return {"id": "a", "seed_id": "s", "kind": "red_team", "strategy": "", "category": "", "split": "sft", "images": ["x.png"],
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]},
                         {"role": "assistant", "content": "no"}], **change}


def said(*messages):
    return [{"role": r, "content": c} for r, c in messages]


TEXT = {"images": [], "messages": said(("user", "hi"), ("assistant", "no"))}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "data/x.png")
    return tmp_path / "data"


def write(folder, *records, name="d.jsonl"):
    path = folder / name
    path.write_bytes(b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in records))
    return str(path)


def refused(capsys, path, code=2):
    """-> the lines that say why"""
    with pytest.raises(SystemExit) as stopped:
        synth.read_dialogues([path])
    assert stopped.value.code == code
    return capsys.readouterr().err.splitlines()


# ---------------------------------------------------------------- records

BAD = {  # what stands before the next colon of the message: the field
    "record": [b"{\n", b"\n", bytes(40) + b"\n", b'{"id": "\0"}\n', b"null\n", b"[1]\n", b'"x"\n', b"\xff\xfe{}\n", b"[" * 100000 + b"\n",
               json.dumps(record()).encode()[:60] + b"\n"],
    "id": [record(id=None), record(id=7), record(id=""), record(id=["a"]), {}],
    "seed_id": [record(seed_id=3), record(seed_id="")],
    "kind": [record(kind="evil"), record(kind=None), record(kind=["benign"])],
    "images": [record(images=None), record(images="x.png"), record(images=[1]), record(images=[]), record(images=["x.png"] * 2),
               record(images=["gone.png"]), record(images=["../secret.png"]), record(images=["/etc/hostname"]), record(images=["."]),
               record(images=["d.jsonl"]), record(images=["x\0.png"]), record(images=["x" * 5000 + ".png"])],
    "messages": [record(messages=m) for m in (
        None, [], {}, ["hi"], [None], said(("user", None)), said(("user", 3)), said(("assistant", "no")), said(("system", "be")),
        said(("user", "a"), ("user", "b")), said(("user", "a"), ("assistant", "b"), ("system", "c")), said(("tool", "a")),
        said(("user", "")), said(("user", " \n")), said(("user", "hi"), ("assistant", "")),
        said(("user", ["hi"])), said(("user", [{"type": "video"}])), said(("user", [{"type": "text"}])), said(("user", [{}])),
        said(("user", [{"type": "text", "text": None}])), said(("user", "hi"), ("assistant", [{"type": "image"}])),
        [{"role": "user"}], [{"content": "hi"}], [{"role": ["user"], "content": "hi"}])] + [
        record(images=[], messages=m) for m in (said(("user", []), ("assistant", "no")), said(("user", "hi"), ("assistant", [])))],
}


@pytest.mark.parametrize("field, bad", [(f, b) for f, rows in BAD.items() for b in rows])
def test_a_bad_record_is_named_by_file_line_and_field(folder, capsys, field, bad):
    path = write(folder, record(id="ok"), bad, record(id="ok2"))
    lines = refused(capsys, path)
    assert lines[0].startswith(f"{path}:2: {field}: "), lines[0]
    assert lines[1] == "1 bad records" and len(lines) == 3
    assert [d["id"] for d in synth.read_dialogues([path], skip_bad=True)] == ["ok", "ok2"]


def test_the_first_twenty_are_named_and_all_counted(folder, capsys):
    path = write(folder, record(id="ok"), *[record(id=f"b{i}", kind="?") for i in range(33)])
    lines = refused(capsys, path)
    assert len(lines) == 22 and lines[19].startswith(f"{path}:21: kind") and lines[20] == "33 bad records"


def test_ids_are_unique_over_files_and_files_must_be_there(folder, capsys):
    path, more = write(folder, record(), record()), write(folder, record(), name="e.jsonl")
    assert refused(capsys, path)[0] == f"{path}:2: id: a appears twice"
    with pytest.raises(SystemExit):
        synth.read_dialogues([more, path])
    err = capsys.readouterr().err
    assert f"{path}:1: id: a appears twice" in err and f"{path}:2: id: a appears twice" in err
    assert len(synth.read_dialogues([more, path], skip_bad=True)) == 1
    assert "no such file" in refused(capsys, str(folder / "gone.jsonl"))[-1]
    assert "no usable record" in refused(capsys, write(folder, name="empty.jsonl"))[-1]
    with pytest.raises(SystemExit) as stopped:
        synth.read_dialogues([write(folder, record(kind=1), name="bad.jsonl")], skip_bad=True)
    assert stopped.value.code == 2


def test_bom_crlf_and_a_last_line_without_newline(folder):
    lines = [json.dumps(record(id=f"ü{i}", **TEXT), ensure_ascii=False).encode() for i in range(3)]
    (folder / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    assert [d["id"] for d in synth.read_dialogues([str(folder / "d.jsonl")])] == ["ü0", "ü1", "ü2"]


def test_what_a_good_record_becomes(folder):
    few = {k: v for k, v in record(id="b").items() if k in ("id", "seed_id", "kind", "images", "messages")}
    system = said(("system", [{"type": "text", "text": "be kind"}])) + record()["messages"] + said(("user", "left open"))
    assert synth.check_dialogue(record(messages=system), folder) is None
    nothing = {k: v for k, v in {**few, "id": "c", "messages": TEXT["messages"]}.items() if k != "images"}
    a, b, c = synth.read_dialogues([write(folder, record(), few, nothing)])
    assert a["images"] == [str(folder / "x.png")] and (b["category"], b["strategy"], b["split"]) == ("", "", "")
    assert synth.user_turns(a) == [(a["messages"][0]["content"], a["images"])] and synth.user_turns(c) == [("hi", [])]


def test_half_a_character_is_a_bad_record(folder, capsys, student):
    """An emoji cut in half by somebody's tool: valid JSON, but no tokenizer and no file takes it."""
    path = write(folder, record(**{**TEXT, "messages": said(("user", "hi \ud83d"), ("assistant", "no"))}))
    lines = refused(capsys, path)
    assert lines[0].startswith(f"{path}:1: ")


def paths_of(value, at=()):
    yield at
    for k, v in (value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()):
        yield from paths_of(v, (*at, k))


def put(value, at, new):
    if not at:
        return new
    value = value.copy()
    value[at[0]] = put(value[at[0]], at[1:], new)
    return value


JUNK = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4) | st.sampled_from(
    ["user", "system", "image", "text", "x.png", "../x.png", "benign", HOSTILE, "\0", "\ud83d", "x" * 300]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "role", "content", "id", "x"]), x, max_size=3),
    max_leaves=5)


@settings(max_examples=300, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_no_mutation_of_a_record_brings_a_traceback(folder, student, data):
    """Whatever is changed in a record: it is named and refused, or it can be rendered and rolled out."""
    good = record(messages=said(("system", "be"), *((m["role"], m["content"]) for m in record()["messages"]), ("user", "more")))
    assert synth.check_dialogue(good, folder) is None  # else the fuzz would look at nothing
    at = data.draw(st.sampled_from(list(paths_of(good))))
    bad = put(good, at, data.draw(JUNK))
    line = json.dumps(bad).encode()
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(line)))
        line = line[:cut] + data.draw(st.binary(max_size=3)) + line[data.draw(st.integers(cut, len(line))):]
    path = write(folder, line.replace(b"\n", b" ") + b"\n", record(id="the good one"))
    try:
        dialogues = synth.read_dialogues([path], skip_bad=True)
    except SystemExit as stopped:
        assert stopped.code == 2
        return
    assert len(dialogues) in (1, 2) and dialogues[-1]["id"] == "the good one"
    for d in dialogues:
        if any(m["role"] == "assistant" for m in d["messages"]):
            row, _ = sft.render(student, d)
            assert row.ids.count(student.pad) == sum(h * w for h, w in row.grids)
        assert synth.user_turns(d)
        json.dumps(d, ensure_ascii=False).encode()


# ---------------------------------------------------------------- pictures

def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width, height):
    """A picture that says it is huge, in 60 bytes."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_odd_pictures_open_and_broken_ones_are_named(folder, capsys):
    noise = Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3600))
    frames = [Image.new("P", (20, 20), i) for i in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    noise.quantize(16).save(folder / "palette.png", transparency=0)
    noise.convert("LA").save(folder / "grey.png")
    Image.new("RGB", (20, 4000)).save(folder / "edge.png")
    noise.save(folder / "misnamed.txt", "PNG")
    good = ["moving.gif", "cmyk.jpg", "palette.png", "grey.png", "edge.png", "misnamed.txt"]
    for name in good:
        assert synth.open_image(folder / name).mode == "RGB"
    noise.save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:300])
    noise.save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:len(whole) // 2])
    (folder / "flipped.png").write_bytes(whole[:60] + bytes([whole[60] ^ 255]) + whole[61:])
    Image.new("RGB", (1, 4000)).save(folder / "sliver.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"<svg/>")
    for name, size in (("large", (9000, 9000)), ("bomb", (20000, 20000)), ("huge", (2 ** 31 - 1, 2 ** 31 - 1))):
        (folder / f"{name}.png").write_bytes(png_header(*size))
    broken = ["cut.jpg", "cut.png", "flipped.png", "sliver.png", "empty.png", "text.png", "large.png", "bomb.png", "huge.png"]
    for name in broken:
        with pytest.raises(ValueError, match=name):
            synth.open_image(folder / name)
    path = write(folder, *[record(id=n, images=[n]) for n in good + broken])
    lines = refused(capsys, path)
    assert len(lines) == len(broken) + 2
    assert all(l.startswith(f"{path}:{i}: images: ") and name in l for l, i, name in zip(lines, range(7, 99), broken))
    assert len(synth.read_dialogues([path], skip_bad=True)) == len(good)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]), st.integers(0, 2000), st.binary(min_size=1, max_size=6))
def test_no_damage_to_a_picture_brings_a_traceback(folder, kind, at, junk):
    path = folder / "p"
    Image.new("RGB", (24, 24), (9, 99, 200)).save(path, kind)
    data = path.read_bytes()
    at %= len(data)
    path.write_bytes(data[:at] + junk + data[at + len(junk):])
    try:
        assert synth.open_image(path).mode == "RGB"
    except ValueError as error:
        assert str(path) in str(error)


def test_no_link_and_no_detour_leads_out_of_the_folder(folder):
    Image.new("RGB", (9, 9)).save(folder.parent / "secret.png")
    (folder / "sub").mkdir()
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    for path in ("../secret.png", "sub/../../secret.png", str(folder.parent / "secret.png"), "link.png"):
        assert "outside" in synth.check_dialogue(record(images=[path]), folder)
    assert synth.check_dialogue(record(images=["sub/../x.png"]), folder) is None


def test_the_picture_for_a_back_end_is_a_png_of_512_pixels_at_most(folder):
    import io
    Image.new("CMYK", (1500, 700)).save(folder / "big.jpg")
    image = Image.open(io.BytesIO(synth.image_png(str(folder / "big.jpg"))))
    assert (image.format, image.mode) == ("PNG", "RGB") and max(image.size) == 512 and image.size[1] in (238, 239)


# ---------------------------------------------------------------- splits

def seeds_in(folder, links, fixed=()):
    """links: (seed_id, picture) of each seed"""
    for _, picture in links:
        if not (folder / f"{picture}.png").exists():
            Image.new("RGB", (4, 4), (picture % 256, picture // 256, 7)).save(folder / f"{picture}.png")
    return [{"id": str(i), "seed_id": f"s{s}", "image": f"{p}.png", "folder": str(folder), **({"split": fixed[i]} if i in fixed else {})}
            for i, (s, p) in enumerate(links)]


def test_what_shares_a_seed_or_a_picture_is_in_one_split(folder):
    rng = random.Random(0)
    for trial in range(30):
        links = [(rng.randint(0, 25), rng.randint(0, 25)) for _ in range(22)]
        out = synth.split_seeds(seeds_in(folder, links), (1, 1, 1), trial)
        for (s, p), a in zip(links, out):
            assert {b["split"] for (t, q), b in zip(links, out) if s == t or p == q} == {a["split"]}
        mixed = list(range(22))
        rng.shuffle(mixed)
        again = synth.split_seeds(seeds_in(folder, [links[i] for i in mixed]), (1, 1, 1), trial)
        assert [out[i]["split"] for i in mixed] == [a["split"] for a in again]  # the order of the file does not matter


def test_splits_have_their_shares_and_keep_what_is_fixed(folder):
    links = [(i, i) for i in range(600)]
    count = lambda out: [sum(s["split"] == k for s in out) / len(out) for k in ("sft", "rl", "bench")]
    out = synth.split_seeds(seeds_in(folder, links), (0.75, 0.10, 0.15), 0)
    assert count(out) == pytest.approx([.75, .10, .15], abs=.05)
    assert count(synth.split_seeds(seeds_in(folder, links), (0, 0, 2), 0)) == [0, 0, 1]
    assert [s["split"] for s in out] != [s["split"] for s in synth.split_seeds(seeds_in(folder, links), (0.75, 0.10, 0.15), 1)]
    chain = synth.split_seeds(seeds_in(folder, [(1, 1), (1, 2), (3, 2), (4, 4)], {2: "rl"}), (0, 0, 1), 0)
    assert [s["split"] for s in chain] == ["rl", "rl", "rl", "bench"]
    with pytest.raises(SystemExit) as stopped:  # one group cannot be in two splits
        synth.split_seeds(seeds_in(folder, [(1, 1), (1, 2)], {0: "rl", 1: "bench"}), (1, 1, 1), 0)
    assert stopped.value.code == 2


# ---------------------------------------------------------------- Stage I

def synth_run(folder, seeds, *more):
    (folder / "seeds.jsonl").write_text("".join(json.dumps(s) + "\n" for s in seeds))
    synth.main(synth.parse_args(["--seeds", str(folder / "seeds.jsonl"), "--generator", "toy", "--out", str(folder / "out"), *more]))


def seed(**change):
    return {"id": "a", "seed_id": "s", "image": "x.png", "question": "q", "kind": "benign", "category": "", **change}


@pytest.mark.parametrize("field, bad", [
    ("id", {"id": None}), ("seed_id", {"seed_id": 1}), ("image", {"image": None}), ("image", {"image": "gone.png"}),
    ("image", {"image": "x\0.png"}), ("question", {"question": ""}), ("kind", {"kind": "odd"}), ("split", {"split": "train"}),
    ("split", {"split": ["sft"]}), ("twin_of", {"twin_of": ["a"]}),
])
def test_bad_seeds_are_named_before_any_work(folder, capsys, field, bad):
    with pytest.raises(SystemExit) as stopped:
        synth_run(folder, [seed(**bad)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"seeds.jsonl:1: {field}" in error and not (folder / "out").exists()


def test_dialogues_of_every_kind_have_their_lengths(world):
    for split in ("sft", "rl", "bench"):
        dialogues = synth.read_dialogues([str(world / f"{split}.jsonl")])
        assert dialogues and len({d["id"] for d in dialogues}) == len(dialogues)
        for d in dialogues:
            low, high = (2, 10) if split == "bench" else synth.TURNS[d["kind"]]
            assert low <= len(d["messages"]) // 2 <= high and d["split"] == split
            assert all(judge.split_reply(sft.text_of(m["content"]))[2] for m in d["messages"] if m["role"] == "assistant")
    twins = {d["id"]: d for d in dialogues}
    pairs = [(d, twins[d["id"] + "-twin"]) for d in dialogues if d["id"] + "-twin" in twins]
    assert len(pairs) == len(dialogues) // 2
    for harmful, benign in pairs:  # the same words about another picture
        words = lambda d: [sft.text_of(m["content"]) for m in d["messages"] if m["role"] == "user"]
        assert words(harmful) == words(benign) and harmful["images"] != benign["images"] and benign["kind"] == "benign"
        assert harmful["seed_id"] == benign["seed_id"]


def test_a_generator_that_answers_anyhow_costs_dialogues_not_the_run(folder, monkeypatch, capsys):
    """Plans and replies of a served model: what cannot be used is counted as failed, nothing raises."""
    turns = [{"user": "one?", "strategy": "yes_ladder"}, {"user": "two?", "strategy": ["deepen"]}, {"user": "three?"}]
    plans = {"good": turns, "list": "x", "none": None, "empty": [], "long": turns * 9, "odd": [{"user": 3}], "half": turns,
             "one": turns[:1]}
    for i, name in enumerate(plans):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{name}.png")

    def ask(requests):
        replies = []
        for r in requests:
            document = json.loads(r["text"].split(judge.REPAIR)[0])
            if "question" in document:
                replies.append(json.dumps({"turns": plans[document["question"]]}))
            else:
                last = document["dialogue"][-1]["user"]
                fine = json.dumps({"reply": f"<thinking>t</thinking><answer>to {last}</answer>"})
                replies.append(None if last == "two?" and r["image"] == half else fine)
        return replies
    half = synth.image_png(str(folder / "half.png"))
    monkeypatch.setattr(judge, "backend", lambda *_: ask)
    with pytest.raises(SystemExit) as stop:
        synth_run(folder, [seed(id=n, seed_id=n, image=f"{n}.png", question=n) for n in plans], "--splits", "1", "0", "0")
    assert stop.value.code == 1  # incomplete, and what there is was written
    done = synth.read_dialogues([str(folder / "out/sft.jsonl")])
    done = [d for d in done if d["id"] != "long"]  # 27 turns: may be cut or fail
    assert [d["id"] for d in done] == ["good"] and re.search("failed [67]", capsys.readouterr().out)
    assert sft.text_of(done[0]["messages"][5]["content"]) == "<thinking>t</thinking><answer>to three?</answer>"


def test_the_same_seed_writes_the_same_files(world, tmp_path):
    for name in ("a", "b"):
        synth.main(synth.parse_args(["--seeds", str(world.parent / "seeds/seeds.jsonl"), "--generator", "toy", "--out", str(tmp_path / name)]))
    for name in ("sft", "rl", "bench"):
        assert (tmp_path / f"a/{name}.jsonl").read_bytes() == (tmp_path / f"b/{name}.jsonl").read_bytes() == (world / f"{name}.jsonl").read_bytes()


def run_on(folder, *more, out="out", seeds="seeds.jsonl"):
    synth.main(synth.parse_args(["--seeds", str(folder / seeds), "--generator", "toy", "--out", str(folder / out), *more]))
    return {p.relative_to(folder / out): p.read_bytes() for p in (folder / out).rglob("*") if p.is_file() and p.name != "meta.json"}


@pytest.fixture
def toy_seeds(tmp_path):
    toy.write_seeds(SimpleNamespace(out=tmp_path, n_sft=12, n_rl=4, n_bench=8), random.Random(3))
    return tmp_path


def test_what_was_done_before_a_stop_is_not_done_again(toy_seeds, monkeypatch, capsys):
    """A back end that dies in the middle, a torn last line, a reply that was missing: --resume makes of it the files of
    an undisturbed run, and asks for nothing twice."""
    whole, asked = run_on(toy_seeds, out="whole"), []

    def dying(requests):
        asked.extend(requests)
        if len(asked) > 60:
            raise judge.BackendError("gone")
        return toy.ask(requests)
    monkeypatch.setattr(judge, "backend", lambda *_: dying)
    with pytest.raises(judge.BackendError):
        run_on(toy_seeds, "--concurrency", "4")
    journal = toy_seeds / "out/journal.jsonl"
    made = journal.read_bytes().splitlines()
    assert 0 < len(made) < 24 and not (toy_seeds / "out/sft.jsonl").exists()
    journal.write_bytes(b"\n".join(made[:-1]) + b"\n" + made[-1][:50])
    monkeypatch.setattr(judge, "backend", lambda *_: lambda requests: asked.extend(requests) or toy.ask(requests))
    asked.clear()
    assert run_on(toy_seeds, "--resume", "--concurrency", "3") == whole
    plans = [json.loads(r["text"]) for r in asked if "question" in r["text"]]
    assert len(plans) <= 20 - len(made) + 1  # 20 plans in all, 4 dialogues are of twins
    asked.clear()
    assert run_on(toy_seeds, "--resume") == whole and not asked  # complete: nothing to do
    monkeypatch.setattr(judge, "backend", lambda *_: lambda requests: [None] * len(requests))
    with pytest.raises(SystemExit) as stopped:
        run_on(toy_seeds, out="mute")
    assert stopped.value.code == 1 and "failed 24" in capsys.readouterr().out
    monkeypatch.undo()
    assert run_on(toy_seeds, "--resume", out="mute") == whole


def test_a_twin_without_its_seed_is_dropped_and_counted(folder, capsys):
    toy.draw("cone", "red", False, random.Random(0)).save(folder / "x.png")
    seeds = [seed(id="t", twin_of="gone"), seed(id="a", twin_of="")]  # the second is no twin
    synth_run(folder, seeds)
    assert "benign: asked 2, written 1, 1 dropped: its seed is missing" in capsys.readouterr().out
    synth_run(folder, seeds, "--resume")
    assert "dropped 1, failed 0" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--splits", "nan", "0", "0"], ["--splits", "0", "0", "0"], ["--splits", "-1", "2", "0"],
                                   ["--obfuscated", "nan"], ["--obfuscated", "7"], ["--out", "/proc/no"], ["--out", __file__]])
def test_numbers_and_folders_that_cannot_be_are_one_line(toy_seeds, capsys, words):
    with pytest.raises(SystemExit) as stopped:
        run_on(toy_seeds, *words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words[0] in error and error.count("\n") == 1


def test_a_stop_before_meta_is_written_leaves_nothing_in_the_way(toy_seeds, monkeypatch):
    monkeypatch.setattr(synth, "write_meta", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_on(toy_seeds)
    monkeypatch.undo()
    assert run_on(toy_seeds, "--resume") == run_on(toy_seeds, out="whole")


def test_a_folder_of_something_else_is_not_gone_on_with(toy_seeds):
    (toy_seeds / "out").mkdir()
    (toy_seeds / "out/sft.jsonl").write_text("dear")
    with pytest.raises(SystemExit) as stopped:
        run_on(toy_seeds, "--resume")
    assert stopped.value.code == 2 and (toy_seeds / "out/sft.jsonl").read_text() == "dear"


def test_two_files_of_one_name_are_two_files(folder, capsys):
    for name in ("a", "b"):
        (folder / name).mkdir()
        toy.draw("cone", "red", False, random.Random(name)).save(folder / name / "x.png")
        write(folder / name, seed(id=name, seed_id=name), name="seeds.jsonl")
    run_on(folder.parent, seeds="data")
    run_on(folder.parent, "--resume", seeds="data")
    write(folder / "a", seed(id="a", seed_id="a", question="another"), name="seeds.jsonl")
    with pytest.raises(SystemExit):
        run_on(folder.parent, "--resume", seeds="data")
    assert "another --seeds;" in capsys.readouterr().err


@pytest.mark.parametrize("words, named", [
    (["--seed", "1"], "--seed"), (["--rl_strategies", "yes_ladder", "--obfuscated", "0"], "--obfuscated, --rl_strategies"), ([], "--seeds")])
def test_a_run_is_not_gone_on_with_as_another(toy_seeds, capsys, words, named):
    run_on(toy_seeds)
    if not words:
        with open(toy_seeds / "seeds.jsonl", "a") as f:
            f.write(json.dumps(json.loads((toy_seeds / "seeds.jsonl").read_text().splitlines()[0]) | {"id": "new"}) + "\n")
    for more, reason in (([], "not empty"), (["--resume"], f"another {named};")):
        with pytest.raises(SystemExit) as stopped:
            run_on(toy_seeds, *words, *more)
        assert stopped.value.code == 2 and reason in capsys.readouterr().err


def test_a_damaged_journal_or_meta_is_named_and_changes_can_be_allowed(toy_seeds, capsys):
    whole = run_on(toy_seeds)
    assert run_on(toy_seeds, "--resume", "--allow_changes", "--concurrency", "3", "--obfuscated", "0.1") == whole
    for name, said in (("journal.jsonl", "journal.jsonl:1: damaged"), ("meta.json", "meta.json: damaged")):
        path = toy_seeds / "out" / name
        path.write_text("{\n" + path.read_text())
        with pytest.raises(SystemExit) as stopped:
            run_on(toy_seeds, "--resume", "--obfuscated", "0.1")
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and said in error and error.count("\n") == 1


def killed_and_resumed(folder, kills, seed):
    """Kill synth.py with SIGKILL at random times until it has been killed often enough, then let it end."""
    rng, command = random.Random(seed), [
        sys.executable, "-c", "import synth, time, toy; ask = toy.ask; toy.ask = lambda rs: time.sleep(.06) or ask(rs); "
        "synth.main(synth.parse_args())", "--seeds", str(folder / "seeds.jsonl"), "--generator", "toy", "--out",
        str(folder / f"killed{seed}"), "--concurrency", "2"]
    for _ in range(kills):
        process = subprocess.Popen([*command, "--resume"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.0))
        process.kill()
        process.wait()
    done = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {p.relative_to(folder / f"killed{seed}"): p.read_bytes() for p in (folder / f"killed{seed}").rglob("*")
            if p.is_file() and p.name != "meta.json"}


def test_two_kills_change_nothing(toy_seeds):
    assert killed_and_resumed(toy_seeds, 2, 0) == run_on(toy_seeds)


@pytest.mark.torture
def test_twenty_kills_change_nothing(toy_seeds):
    whole = run_on(toy_seeds)
    for seed in range(1, 11):
        assert killed_and_resumed(toy_seeds, 2, seed) == whole


def test_an_attack_that_does_not_get_through_is_dropped(toy_seeds, capsys):
    whole = run_on(toy_seeds)
    capsys.readouterr()
    few = run_on(toy_seeds, "--target", "toy", out="few")
    out = capsys.readouterr().out
    rows = lambda files: {r["id"]: r for n in ("sft", "rl", "bench") for r in map(json.loads, files[Path(f"{n}.jsonl")].decode().splitlines())}
    before, after = rows(whole), rows(few)
    lost = [before[i] for i in before if i not in after]
    assert all(after[i] == before[i] for i in after) and lost and {d["kind"] for d in lost} <= {"red_team", "benign"}
    twins = [d["id"] for d in lost if d["kind"] == "benign"]
    assert all(i.endswith("-twin") and i.removesuffix("-twin") not in after for i in twins)
    red = [d["id"] for d in lost if d["kind"] == "red_team"]
    assert f"red_team: asked {sum(d['kind'] == 'red_team' for d in before.values())}, written" in out and f", {len(red)} dropped: attack failed" in out
    journal = [json.loads(line) for line in few[Path("journal.jsonl")].decode().splitlines()]
    assert len(journal) == 24 and {r["why"] for r in journal if "why" in r} == {"attack failed"}
    assert rows(run_on(toy_seeds, "--target", "toy", "--min_success", "1", out="all")) == before


def test_repeats_are_dropped_but_not_the_same_words_about_another_picture(folder, monkeypatch, capsys):
    Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / "y.png")
    words = "one two three four five six seven eight nine ten eleven twelve thirteen".split()
    said = {"a": words, "b": words, "c": words[:-1], "d": words[:9], "e": words}  # d shares 7 of 11 trigrams with a

    def ask(requests):
        documents = [json.loads(r["text"]) for r in requests]
        turns = lambda words: [{"user": " ".join(words[:4])}, {"user": " ".join(words[4:])}]
        return [json.dumps({"turns": turns(said[d["question"]])} if "question" in d else
                           {"reply": "<thinking>t</thinking><answer>a</answer>"}) for d in documents]
    monkeypatch.setattr(judge, "backend", lambda *_: ask)
    synth_run(folder, [seed(id=n, image="y.png" if n == "e" else "x.png", question=n) for n in said], "--splits", "1", "0", "0")
    out = capsys.readouterr().out
    assert [d["id"] for d in synth.read_dialogues([str(folder / "out/sft.jsonl")])] == ["a", "d", "e"]
    assert "benign: asked 5, written 3, 1 dropped: exact duplicate, 1 dropped: near duplicate" in out
    assert "asked 5, written 3, dropped 2, failed 0" in out


# ---------------------------------------------------------------- the shapes of other people's files

def shapes(folder):
    """One harmless file of each shape. -> {file or folder: [(id, kind, category, turns, picture) of its records]}"""
    names = ["x.png", "imgs/s/SD/0.jpg", "imgs/s/SD_TYPO/0.jpg", "imgs/s/TYPO/0.jpg", "train/ads/a.png", "train/ads/b.png"]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 7, 7)).save(folder / name)
    say = lambda text, role="user": {"role": role, "content": [{"type": "text", "text": text}]}
    write(folder, {"question": "how blim?", "image": "x.png", "category": "fosk", "image_severity": 1, "response": "r", "is_response_safe": "no"},
          name="beaver.jsonl")
    write(folder, {"question": "how drax?", "image": "x.png", "chosen": "c", "rejected": "r", "class1": "hesp"}, name="spa.jsonl")
    write(folder, {"instruction_id": 7, "instruction": "plim it", "image_path": "x.png", "category": "q", "sub_category": "s", "source": "z",
                   "image_description": "d", "safety_reason": "w"}, name="vls.jsonl")
    (folder / "train.json").write_text(json.dumps([
        {"id": "g1", "image": "ads/a.png", "safe": False, "harmful_category": "h", "harmful_subcategory": "s", "instr-resp": [{"instruction": "blim?", "response": "r"}]},
        {"id": "g2", "image": "ads/b.png", "safe": True, "instr-resp": [{"safe_instruction": "what?", "response": "r"}, {"unsafe_instruction": "drax?", "response": "r"}]}]))
    (folder / "questions").mkdir()
    (folder / "questions/s.json").write_text(json.dumps({"0": {
        "Question": "q", "Changed Question": "c", "Key Phrase": "k", "Phrase Type": "p", "Rephrased Question": "about the words", "Rephrased Question(SD)": "about this"}}))
    write(folder, {"question_id": "rl-1", "question": [say("one")], "images": ["x.png"], "label": "l", "metadata": {
        "question_id": "rl-1", "image": "x.png", "rest_messages": [say("two"), say("three")]}}, name="rl.jsonl")
    write(folder, {"question_id": "b-1", "messages_fixed": [{"role": "system", "content": "be kind"}, say("one"), say("a1", "assistant"), say("two"),
                                                           {"role": "user", "content": "three"}],
                   "category": "cat", "source_category": "c2", "image": "x.png", "risk_trajectory": [1, 2, 5]},
          {"question_id": "b-2", "messages_fixed": [say("one"), say("two")], "category": "cat", "image": "", "risk_trajectory": []}, name="steer.jsonl")
    with open(folder / "mhj.csv", "w", newline="", encoding="utf-8-sig") as f:
        rows = csv.DictWriter(f, ["Source", "tactic", "submission_message"] + [f"message_{i}" for i in range(101)])
        rows.writeheader()
        for n in (3, 2):
            said = [{"role": "system", "body": "s"}] + [{"role": "user", "body": f"say, \n\"{i}\""} for i in range(n)]
            rows.writerow({"Source": "x", "tactic": "t", "submission_message": "goal", **{f"message_{i}": json.dumps(m) for i, m in enumerate(said)}})
    return {
        "beaver.jsonl": [("beaver-1", "red_team", "fosk", ["how blim?"], "x.png")], "spa.jsonl": [("spa-1", "red_team", "hesp", ["how drax?"], "x.png")],
        "vls.jsonl": [("vls-7", "red_team", "q", ["plim it"], "x.png")],
        "train.json": [("train-g1-0", "red_team", "h", ["blim?"], "train/ads/a.png"), ("train-g2-0", "benign", "", ["what?"], "train/ads/b.png"),
                       ("train-g2-1", "red_team", "", ["drax?"], "train/ads/b.png")],
        "rl.jsonl": [("rl-1", "red_team", "", ["one", "two", "three"], "x.png")],
        "steer.jsonl": [("b-1", "red_team", "cat", ["one", "two", "three"], "x.png"), ("b-2", "red_team", "cat", ["one", "two"], None)],
        "mhj.csv": [("mhj-1", "red_team", "t", [f'say, \n"{i}"' for i in range(3)], None), ("mhj-2", "red_team", "t", [f'say, \n"{i}"' for i in range(2)], None)],
        "questions": [], ".": [("s-0-SD", "red_team", "s", ["about this"], "imgs/s/SD/0.jpg"), ("s-0-SD_TYPO", "red_team", "s", ["about the words"], "imgs/s/SD_TYPO/0.jpg"),
                               ("s-0-TYPO", "red_team", "s", ["about the words"], "imgs/s/TYPO/0.jpg")]}


def test_public_sets_and_the_authors_files_are_read_as_they_come(folder, student, capsys):
    wanted = shapes(folder)
    everything = [row for rows in wanted.values() for row in rows]
    for name, rows in wanted.items():
        if name == "questions":  # its pictures are elsewhere: named, with the id
            assert all(f"questions/s.json:1: images: s-0-{way}: " in line for way, line in zip(("SD", "SD_TYPO", "TYPO"), refused(capsys, str(folder / name))))
            continue
        got = synth.read_dialogues([str(folder / name)])
        seen = [(d["id"], d["kind"], d["category"], [sft.text_of(c) for c, _ in synth.user_turns(d)],
                 next((str(Path(i).relative_to(folder)) for i in d["images"]), None)) for d in got]
        assert sorted(seen) == sorted(everything if name == "." else rows)
        for d in got:
            assert synth.user_turns(d)[0][1] == d["images"] and d["source"] and synth.check_dialogue({**d, "images": []}, folder) == (
                f"images: 0 paths for {len(d['images'])} image parts" if d["images"] else None)
    by_id = {d["id"]: d for d in got}
    assert by_id["b-1"]["messages"][0] == {"role": "system", "content": "be kind"} and by_id["b-1"]["messages"][2]["content"] == "a1"
    assert by_id["mhj-1"]["seed_id"] == by_id["mhj-2"]["seed_id"] and by_id["train-g2-0"]["seed_id"] == by_id["train-g2-1"]["seed_id"]
    assert by_id["s-0-SD"]["seed_id"] == by_id["s-0-TYPO"]["seed_id"] != by_id["beaver-1"]["seed_id"] == by_id["spa-1"]["seed_id"]
    for d in got:  # nobody trains on a reply that is not there
        if d["id"] != "b-1":
            with pytest.raises(ValueError, match=f"{d['id']}: no reply"):
                sft.render(student, d)
    row, _ = sft.render(student, by_id["b-1"])
    assert max(row.turn_id) == 0  # its one reply is kept


def test_dialogues_are_made_of_public_seeds(folder, capsys):
    for name in shapes(folder):
        if name in ("mhj.csv", "steer.jsonl"):
            (folder / name).unlink()  # some have no picture
    for name in ("x.png", "train/ads/a.png", "train/ads/b.png", *(f"imgs/s/{way}/0.jpg" for way in ("SD", "SD_TYPO", "TYPO"))):
        toy.draw("cone", "red", True, random.Random(name)).save(folder / name, "PNG")
    run_on(folder.parent, "--obfuscated", "0.5", seeds="data")
    assert "asked 10, written 10" in capsys.readouterr().out
    made = {d["id"]: d for n in ("sft", "rl", "bench") if (folder.parent / f"out/{n}.jsonl").stat().st_size
            for d in synth.read_dialogues([str(folder.parent / f"out/{n}.jsonl")])}
    assert len(made) == 10 and {d["kind"] for d in made.values()} == {"red_team", "obfuscated", "benign"}
    assert len({made[i]["split"] for i in ("beaver-1", "spa-1", "vls-7", "rl-1")}) == 1  # one picture


@pytest.mark.parametrize("record", [
    {"question": "q", "image": {"bytes": "abc", "path": None}}, {"question_id": "b", "messages_fixed": None}, {"question_id": "b", "messages_fixed": []},
    {"messages_fixed": [{"role": "user", "content": "hi"}]}, {"question_id": "b", "messages_fixed": [{"role": "user"}]},
    {"question_id": "b", "messages_fixed": [{"role": "user", "content": [{"type": "text"}]}]}, {"question": "q", "metadata": 3},
    {"instr-resp": [{"response": "r"}], "image": "x.png"}, {"instr-resp": [{"instruction": 3}], "image": "x.png"}, {"message_0": "no json"},
    {"message_0": '{"role": "system", "body": "b"}'}, {"instruction_id": 3}, {"Rephrased Question": "q"}, {"question": ["q"], "image": "x.png"},
    {"question": "q", "image": "gone.png"}, {"question": "q", "image": "../secret.png"}, {"question": "", "image": "x.png"},
])
def test_what_only_looks_like_one_of_them_is_named(folder, capsys, record):
    Image.new("RGB", (9, 9)).save(folder.parent / "secret.png")
    path = write(folder, {"question": "fine", "image": "x.png"}, record)
    assert refused(capsys, path)[0].startswith(f"{path}:2: ") and len(synth.read_dialogues([path], skip_bad=True)) == 1
    with pytest.raises(SystemExit):
        synth.read_records([path], synth.check_seed, False)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_no_mutation_of_theirs_brings_a_traceback(folder, data):
    if not (folder / "train.json").exists():
        shapes(folder)
    names = ["beaver.jsonl", "spa.jsonl", "vls.jsonl", "rl.jsonl", "steer.jsonl"]
    good = [json.loads(line) for name in names for line in (folder / name).read_text().splitlines()]
    good += [*json.loads((folder / "train.json").read_text()), {"message_0": '{"role": "user", "body": "b"}', "tactic": "t"},
             {"id": "0", "Rephrased Question": "q", "Rephrased Question(SD)": "r"}]
    one = data.draw(st.sampled_from(good))
    bad = put(one, data.draw(st.sampled_from(list(paths_of(one)))), data.draw(JUNK))
    path = write(folder, bad, record(id="the good one"), name="mutant.jsonl")
    for d in synth.read_dialogues([path], skip_bad=True):
        assert synth.user_turns(d) and json.dumps(d, ensure_ascii=False).encode()
    try:
        synth.read_records([path], synth.check_seed, True)
    except SystemExit as stopped:  # the good one is no seed
        assert stopped.code == 2


def test_they_can_be_evaluated(folder, base, tmp_path):
    import eval as E
    shapes(folder)
    with pytest.raises(SystemExit) as stopped:
        E.main(f"--model {base} --data {folder}/steer.jsonl {folder}/mhj.csv {folder}/train.json --judge toy --no-nf4 --max_new 2 "
               f"--max_tokens 400 --out {tmp_path}/out --name x".split())
    samples = {s["id"]: [t["user"] for t in s["turns"]] for s in E.load_run(tmp_path / "out")[0]}
    assert stopped.value.code == 1 and len(samples) == 7 and samples["b-1"] == ["one", "two", "three"] and len(samples["mhj-1"]) == 3


def test_what_cannot_be_read_is_said(folder, capsys):
    (folder / "a.parquet").write_bytes(b"PAR1")
    (folder / "empty").mkdir()
    for name in ("a.parquet", "empty"):
        assert "Parquet" in refused(capsys, str(folder / name))[0]
    (folder / "half.json").write_text('[{"question": "q", "image": "x.png"},')
    assert "half.json:1: record" in refused(capsys, str(folder / "half.json"))[0]
    (folder / "lines.json").write_text('{"question": "q", "image": "x.png"}\n{"question": "r", "image": "x.png"}\n')
    assert len(synth.read_dialogues([str(folder / "lines.json")])) == 2


# ---------------------------------------------------------------- audit

def run_audit(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        synth.main(synth.parse_args(["audit", str(folder)]))
    return stopped.value.code, capsys.readouterr().out


def test_an_audit_of_what_synth_writes_finds_no_leak(world, capsys):
    code, out = run_audit(world, capsys)
    assert code == 0 and out.count("0 seeds and 0 pictures in both") == 3
    count = {name: [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()] for name in ("sft", "rl", "bench")}
    for name, rows in count.items():
        lengths = [len(d["messages"]) // 2 for d in rows]
        assert f"{name}: {len(rows)} dialogues" in out and "turns: " + ", ".join(f"{n} {lengths.count(n)}" for n in sorted({*lengths})) in out


def test_an_audit_finds_a_seed_or_a_picture_in_two_splits_and_counts_likeness(folder, capsys):
    for i in range(6):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i}.png")
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    words = "a b c d e f g h i j k l m n o p".split()
    one = lambda i, seed, image, n, **more: record(id=i, seed_id=seed, images=[image], **more, messages=[
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " ".join(words[:n])}]}, {"role": "assistant", "content": "no"}])
    write(folder, one("1", "s1", "0.png", 16, strategy="yes_ladder"), one("2", "s2", "1.png", 5), name="sft.jsonl")
    write(folder, one("3", "s3", "2.png", 16), one("4", "s4", "3.png", 15), one("5", "s5", "4.png", 8), name="bench.jsonl")
    code, out = run_audit(folder, capsys)
    assert code == 0 and "of 3 dialogues in bench, 1 say what one in sft says, 2 nearly" in out
    assert f"Jaccard {(1 + 13 / 14 + 3 / 6) / 3:.2f} on average, 1.00 at most" in out and "strategies: none 1, yes_ladder 1" in out
    assert f"sft: 2 dialogues, distinct-1 {16 / 21:.3f}, distinct-2 {15 / 19:.3f}, distinct-3 {14 / 17:.3f}" in out
    write(folder, one("6", "s2", "5.png", 4), name="rl.jsonl")  # a seed of sft
    code, out = run_audit(folder, capsys)
    assert code == 1 and "sft and rl: 1 seeds and 0 pictures in both ['s2']" in out
    write(folder, one("6", "s6", "copy.png", 4), name="rl.jsonl")  # a picture of sft, under another name
    code, out = run_audit(folder, capsys)
    assert code == 1 and "sft and rl: 0 seeds and 1 pictures in both" in out
    with pytest.raises(SystemExit) as stopped:
        synth.audit(folder / "nowhere")
    assert stopped.value.code == 2


def naive_bleu(text, others):
    """BLEU-4 without brevity penalty, written from its definition."""
    precisions = []
    for n in range(1, 5):
        count = lambda words: Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))
        mine, theirs = count(text), [count(o) for o in others]
        precisions.append(sum(min(k, max(t[g] for t in theirs)) for g, k in mine.items()) / max(1, mine.total()))
    return math.prod(precisions) ** 0.25


def test_self_bleu_and_nearest_neighbours_against_their_definitions():
    rng = random.Random(0)
    for _ in range(20):
        texts = [[rng.choice("abcd") for _ in range(rng.randint(3, 30))] for _ in range(rng.randint(2, 8))]
        naive = [naive_bleu(t, texts[:i] + texts[i + 1:]) for i, t in enumerate(texts)]
        assert synth.self_bleu(texts) == pytest.approx(sum(naive) / len(naive))
        a, b = ([{*synth.ngrams(t, 3)} for t in part] for part in (texts[1:], texts[:1] * 2))
        assert synth.nearest(a, b) == pytest.approx([max(len(x & y) / max(1, len(x | y)) for x in a) for y in b])
    assert synth.self_bleu([["a"]]) == 0 and synth.self_bleu([list("abcde")] * 2) == 1


# ---------------------------------------------------------------- other people's tools

def test_the_files_load_in_datasets_and_train_in_trl_from_their_folder(world, base, monkeypatch, tmp_path):
    """Two steps of TRL's SFTTrainer; the processor is Qwen2.5-VL's without its video half, which needs torchvision."""
    import datasets
    import transformers
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from transformers.processing_utils import ProcessorMixin
    from trl import SFTConfig, SFTTrainer

    class ImageOnlyQwen2_5_VLProcessor(Qwen2_5_VLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    monkeypatch.chdir(world)  # image paths are relative to the file
    ours = synth.read_dialogues(["sft.jsonl"])
    data = datasets.load_dataset("json", data_files="sft.jsonl", split="train", cache_dir=str(tmp_path / "cache"))
    assert data["id"] == [d["id"] for d in ours] and set(ours[0]) - {"folder"} <= set(data.column_names)
    data = data.select_columns(["images", "messages"]).cast_column("images", datasets.List(datasets.Image()))
    student = sft.load_student(base, False)
    processor = ImageOnlyQwen2_5_VLProcessor(student.image_processor, student.tok, chat_template=student.tok.chat_template)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base)
    seen = []

    class Watched(SFTTrainer):
        def training_step(self, model, inputs, *rest, **more):
            seen.append((inputs["input_ids"], inputs["image_grid_thw"]))
            return super().training_step(model, inputs, *rest, **more)
    trainer = Watched(model=model, train_dataset=data, processing_class=processor, args=SFTConfig(
        output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=2, max_length=None, use_cpu=True, bf16=False,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-3,
        dataloader_pin_memory=False))
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    rendered = {tuple(sft.render(student, d)[0].ids) for d in ours}
    for ids, grid in seen:  # TRL reads the same tokens as we do, to the newline behind the last turn
        assert grid.tolist() == [[1, 8, 8]] * 2
        for row in ids.tolist():
            row = [i for i in row if i != student.tok.pad_token_id]
            assert tuple(row[:len(row) - row[::-1].index(student.end)]) in rendered
