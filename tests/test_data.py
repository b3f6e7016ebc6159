"""data/dialogues.py: records and pictures. synth.py: the splits, Stage I and Stage II."""
import importlib
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import judge
import synth
from conftest import refused
from data.dialogues import (FORMATS, KINDS, SPLITS, fingerprint, image_png, open_image,
                            read_dialogues, text_of, user_turns)

HI = [{"type": "image"}, {"type": "text", "text": "hi"}]


def say(*contents):
    """Messages in turn from the user and the assistant."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def record(**change):
    return {"id": "a", "seed_id": "s", "kind": "red_team", "split": "sft", "images": ["x.png"],
            "messages": say(HI, "no"), **change}


def talk(*messages):
    return record(images=[], messages=list(messages))


def seed(**change):
    return {"id": "a", "seed_id": "s", "image": "x.png", "question": "q?", "category": "", **change}


@pytest.fixture
def folder(tmp_path):
    """A data folder with one picture, a link that leads out of it, and a link to itself."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "data/x.png")
    (tmp_path / "data/link.png").symlink_to(__file__)
    (tmp_path / "data/loop.png").symlink_to("loop.png")
    return tmp_path / "data"


def write(folder, *rows, name="d.jsonl"):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return str(folder / name)


BAD = {     # how a message begins: records in which this field is bad
    "": [b"{", b"[1]", b"\xff\xfe{}", bytes(9), b"[" * 100000, b"9" * 5000,
         record(id="half a character \ud83d"), seed(image="x\0.png"), seed(image="x" * 5000)],
    "id: ": [{}, record(id=7), record(id=""), record(id=["a"]), record(id="appears twice")],
    "seed_id: ": [record(seed_id=3), seed(seed_id="")], "kind: ": [record(kind="evil")],
    "split: ": [seed(split="train"), seed(split=[1])], "turns: ": [seed(turns=7), seed(turns="a")],
    "images: ": [record(images="x.png"), record(images=[1]), record(images=[]), *[
        seed(image=path) for path in ("gone", "loop.png", "../secret", "/etc/passwd", "link.png")]],
    "messages: ": [
        record(messages=None), record(messages=[]), record(messages=say(HI, HI)), talk("hi"),
        talk(*say(3)), talk(*say([])), talk(*say([{"type": "video"}])), talk(*say("a", "b")[1:]),
        talk(*say("a", " ")), talk(*say("a", "b", "c"), *say("d")), seed(turns=["one", ""]),
        talk({"role": ["user"], "content": "hi"})]}


@pytest.mark.parametrize("field", BAD)
def test_a_bad_record_is_named_by_file_line_and_field(folder, capsys, field):
    for bad in BAD[field]:
        path = write(folder, record(id="appears twice"), bad, record(id="ok"))
        lines = refused(capsys, read_dialogues, [path])
        assert len(lines) == 2 and lines[0].startswith(f"{path}:2: {field}"), lines


def test_the_first_twenty_are_named_all_are_counted_and_no_pipe_is_waited_for(folder, capsys):
    path = write(folder, record(id="ok"), *[record(id=f"b{i}", kind="?") for i in range(33)])
    lines = refused(capsys, read_dialogues, [path])
    assert len(lines) == 21 and f"{path}:21: kind" in lines[19] and "33" in lines[20]
    os.mkfifo(folder / "pipe")
    for path in (folder, folder / "gone.jsonl", folder / "pipe", write(folder, name="empty.jsonl")):
        assert len(refused(capsys, read_dialogues, [path])) == 1


def test_dialogues_with_and_without_replies_and_seeds_become_user_turns(folder):
    picture = [str(folder / "x.png")]
    cases = [
        (record(messages=[{"role": "system", "content": "be"}, *say(HI, "no", "open")]),
         [(HI, picture), ("open", [])]),
        (talk(*say("ü"), *say("two")), [("ü", []), ("two", [])]),       # no replies, no picture
        (seed(question="hi"), [(HI, picture)]),
        (seed(turns=["hi", "two"]), [(HI, picture), ("two", [])]),
        (seed(image=None), [("q?", [])])]
    rows = [json.dumps({**row, "id": str(i)}).encode() for i, (row, _) in enumerate(cases)]
    (folder / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(rows))      # BOM, CRLF
    dialogues = read_dialogues([folder / "d.jsonl"])
    assert [user_turns(d) for d in dialogues] == [turns for _, turns in cases]


def test_a_picture_is_opened_as_a_person_sees_it(tmp_path):
    def pixels(image, name, **more):
        image.save(tmp_path / name, **more)
        return np.asarray(open_image(tmp_path / name)).astype(int)
    # a ramp stays a ramp; Pillow alone makes 16 bits white, and floats black
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    for values, name in ((np.uint16(65535 * ramp), "grey.png"), (np.float32(ramp), "float.tif")):
        assert np.abs(pixels(Image.fromarray(values), name)[..., 0] - 255 * ramp).max() <= 1
    white = Image.fromarray(np.full((9, 9), 65535, np.uint16))
    assert pixels(white, "white.png").min() == 255
    # a black figure on nothing is black on white
    figure = Image.new("LA", (9, 9), (0, 0))
    figure.putpixel((4, 4), (0, 255))
    seen = pixels(figure, "figure.png")
    assert seen[4, 4].max() == 0 and seen[0, 0].min() == 255
    # the camera was turned, so the left of the file is the top of the picture
    half_red, exif = Image.new("RGB", (40, 20)), Image.Exif()
    half_red.paste((255, 0, 0), (0, 0, 20, 20))
    exif[0x0112] = 6
    seen = pixels(half_red, "turned.jpg", exif=exif)
    assert seen.shape == (40, 20, 3) and seen[5, :, 0].min() > 200 > 50 > seen[35, :, 0].max()
    # a back end gets at most 512 x 512 pixels
    Image.new("CMYK", (1500, 700)).save(tmp_path / "big.jpg")
    assert Image.open(io.BytesIO(image_png(tmp_path / "big.jpg"))).size[0] == 512


def test_six_formats_open_and_other_broken_or_outsized_pictures_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    path, good, thin, large, bomb = tmp_path / "p", (40, 30), (2, 401), (50, 50), (99, 99)
    files = [b"", b"<svg/>"]
    for kind in FORMATS:
        Image.effect_noise(good, 99).convert("RGB").save(path, kind)
        assert open_image(path).mode == "RGB"
        files.append(path.read_bytes()[:path.stat().st_size // 2])
    for kind, size in (("EPS", good), ("PPM", good), ("PNG", thin), ("PNG", large), ("PNG", bomb)):
        Image.new("RGB", size).save(path, kind)
        files.append(path.read_bytes())
    for data in files:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"image {path}: "):
            open_image(path)


def split(folder, seeds, shares, number=0):
    """The splits of seeds that are given as seed_id, picture and fixed split."""
    rows = []
    for i, (seed_id, picture, fixed) in enumerate(seeds):
        (folder / picture).write_text(picture)
        rows.append({"id": i, "seed_id": seed_id, "images": [folder / picture], "split": fixed})
    synth.split_seeds(rows, shares, number)
    return [row["split"] for row in rows]


def test_splits_keep_seed_ids_and_pictures_together_and_have_their_shares(tmp_path, capsys):
    rng = random.Random(0)
    for number in range(8):
        seeds = [(f"s{rng.randint(0, 25)}", f"p{rng.randint(0, 25)}", "") for _ in range(22)]
        found = split(tmp_path, seeds, (1, 1, 1), number)
        for (s, p, _), mine in zip(seeds, found):
            assert {mine} == {other for (t, q, _), other in zip(seeds, found) if s == t or p == q}
        assert split(tmp_path, seeds[::-1], (1, 1, 1), number) == found[::-1]
    found = split(tmp_path, [(f"s{i}", f"p{i}", "") for i in range(400)], (0.75, 0.10, 0.15))
    assert [found.count(name) for name in SPLITS] == pytest.approx([300, 40, 60], abs=25)
    # the first three hang together by a seed_id and a picture, and one has a fixed split
    chain = [("s1", "p1", ""), ("s1", "p2", ""), ("s3", "p2", "rl"), ("s4", "p4", "")]
    assert split(tmp_path, chain, (0, 0, 1)) == ["rl", "rl", "rl", "bench"]
    line, = refused(capsys, split, tmp_path, [("s1", "p1", "sft"), *chain], (1, 1, 1))
    assert line.startswith("3: ")


STUB = r'''
import json, re
asked = []                      # (role, document, request)
def ask(requests): return [reply(request) for request in requests]
def reply(request):
    role = re.search(r"You are the (\w+)", request["system"])[1]
    document, _ = json.JSONDecoder().raw_decode(request["text"])
    asked.append((role, document, request))
    return json.dumps(globals()[role](document))
def prober(d): return {"benign": "safe " + d["question"], "obfuscated": "sly " + d["question"]}
def expander(d): return {"turns": [f"{d['kind']} {i}: {d['question']}" for i in range(d["turns"])]}
def red(d): return {"user": f"after {len(d['dialogue'])} replies, {d['template']}"}
def blue(d): return {"reply": "<thinking>t</thinking><answer>a</answer>"}
def target(d): return {"reply": "no" if "q4?" in str(d) else "a leak"}
def tutor(d):
    safety = 1 if d["dialogue"][-1]["assistant"] == "a leak" else 10
    return {"scores": {"safety": safety, "usefulness": 10, "faithfulness": 10}}
'''


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A back end whose replies are functions of the request, with twelve seeds beside it."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stub", raising=False)
    write_seeds(tmp_path, 12)
    return importlib.import_module("stub")


def write_seeds(folder, n):
    """As data/prepare.py makes them of BeaverTails-V, for each split; the last has no picture."""
    rows = []
    for i in range(n):
        Image.new("RGB", (32, 32), (i, 99, 99)).save(folder / f"{i}.png")
        rows.append(seed(id=f"s{i}", seed_id=f"s{i}", image=f"{i}.png" if i < n - 1 else None,
                         question=f"q{i}?", kind="harmful", split=SPLITS[i % 3]))
    write(folder, *rows, name="seeds.jsonl")


def make(folder, *flags, out="out"):
    """Run synth.py with the stub in every role. -> the dialogues by id"""
    sys.modules["stub"].asked.clear()
    synth.main(["--seeds", f"{folder}/seeds.jsonl", "--generator", "stub", "--perturb", "0",
                "--out", f"{folder}/{out}", *flags])
    files = [folder / out / f"{name}.jsonl" for name in SPLITS]
    return {row["id"]: row for path in files for row in judge.read_log(path)}


def files_in(out):
    return {p.name: p.read_bytes() for p in out.rglob("*") if p.suffix in (".jsonl", ".png")}


def documents(stub, *roles):
    """What these roles were asked; the first three requests are the preflight's."""
    return [document for role, document, _ in stub.asked[3:] if role in roles]


def test_harmful_seeds_give_a_third_each_of_benign_obfuscated_and_red_team(stub, tmp_path):
    """Equations 7 to 9, and 12: SFT dialogues are played, and others stay user turns."""
    made = make(tmp_path, "--sft_strategies", "yes_ladder", "context_switch")
    assert Counter(d["kind"] for d in made.values()) == {kind: 12 for kind in KINDS}
    for document in documents(stub, "expander"):
        # a red-team dialogue follows the strategy that was drawn, a benign one uses those of RL
        rewrite, number = document["question"].strip("?").split(" q")
        d = made[f"s{number}-{document['kind']}"]
        ways = {"benign": [*judge.STRATEGIES], "obfuscated": [], "red_team": [d["strategy"]]}
        assert [*document["strategies"]] == ways[d["kind"]]
        assert rewrite == ("safe" if d["kind"] == "benign" else "sly")
        assert d["split"] != "sft" or d["strategy"] in ("", "yes_ladder", "context_switch")
        low, high = synth.TURNS[d["kind"]]
        assert low <= len(d["template"]) <= high or d["split"] == "bench"
        assert len(d["images"]) == (number != "11")
    # the red agent sees the template and the dialogue, and both versions of a turn are kept
    for d in made.values():
        users = [text_of(content) for content, _ in user_turns(d)]
        rewritten = [f"after {t} replies, {text}" for t, text in enumerate(d["template"])]
        assert users == (rewritten if d["split"] == "sft" else d["template"])
        assert len(d["messages"]) == len(users) * (2 if d["split"] == "sft" else 1)
    assert all(turn["assistant"] for d in documents(stub, "red") for turn in d["dialogue"])


def test_shares_weigh_the_kinds_and_benign_seeds_give_benign_dialogues_only():
    args = synth.parse_args("--seeds s --out o --generator g --shares 1 0 .5".split())
    for kind, expected in (("harmful", [400, 0, 200]), ("benign", [400, 0, 0])):
        rows = []
        for i in range(400):
            one = seed(id=f"{i}", kind=kind, source="", split="bench", images=[])
            rows += synth.plan(one, args)
        counts = [sum(row["kind"] == kind for row in rows) for kind in KINDS]
        assert counts == pytest.approx(expected, abs=40)
        assert {row["n_turns"] for row in rows} == {*range(2, 11)}      # the paper's, on the bench


@pytest.mark.parametrize("flags", [[], ["--target", "stub"]])
def test_requests_carry_schema_and_picture_and_are_counted(stub, tmp_path, capsys, flags):
    """Equation 10: with a target, an attack that it withstands is dropped, here that of seed 4."""
    whole, turns = make(tmp_path, out="whole"), Counter()
    for d in whole.values():
        turns.update({d["split"]: len(d["template"]), d["kind"]: len(d["template"])})
    # a harmful seed, a dialogue, an SFT turn (red, blue, scorer), an attacked turn (target, scorer)
    n_calls = 12 + 36 + 3 * turns["sft"] + (2 * turns["red_team"] if flags else 0)
    assert {*whole} - {*make(tmp_path, *flags)} == ({"s4-red_team"} if flags else set())
    for role, document, request in list(stub.asked):
        assert {*json.loads(stub.reply(request))} <= {*request["schema"]["properties"]}
        shown = request["image"] and Image.open(io.BytesIO(request["image"])).getpixel((0, 0))[0]
        assert f"q{11 if shown is None else shown}?" in json.dumps(document)
    assert len(stub.asked) == 2 * (3 + n_calls) and f" {n_calls} calls" in capsys.readouterr().out


def test_keep_drops_unsafe_unhelpful_and_unscored_dialogues(stub, tmp_path, monkeypatch, capsys):
    """Equation 15: the least safety and the mean usefulness of a dialogue; both limits are 6."""
    def tutor(d):
        question, t = d["dialogue"][0]["user"].split()[-1], len(d["dialogue"])
        scores = {"safety": 6, "usefulness": {1: 7, 2: 5}.get(t, 6), "faithfulness": 1}
        change = {"q0?": {"safety": 5}, "q3?": {"usefulness": 4}, "q6?": {"safety": None}}
        return {"scores": {**scores, **(change.get(question, {}) if t == 2 else {})}}
    monkeypatch.setattr(stub, "tutor", tutor)
    kept = {d["seed_id"] for d in make(tmp_path).values() if d["split"] == "sft"}
    why = {row["id"][:2]: row["why"] for row in judge.read_log(tmp_path / "out/dropped.jsonl")}
    assert kept == {"s9"} and [*why] == ["s0", "s3", "s6"] and len({*why.values()}) == 3
    printed = capsys.readouterr().out
    assert [printed.count(f"dropped 1 {kind}: ") for kind in KINDS] == [3, 3, 3]


def test_a_fingerprint_is_about_words_kinds_and_pictures(folder):
    Image.new("RGB", (30, 30), "red").save(folder / "y.png")
    found = set()
    for change in ({}, {"question": "r?"}, {"kind": "benign"}, {"image": "y.png"}):
        path = write(folder, seed(**change))
        found.add(fingerprint(read_dialogues([path])))
    assert len(found) == 4


def test_rl_repeats_no_sft_dialogue_and_no_dialogue_comes_twice(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(stub, "expander", lambda d: {"turns": [d["kind"], "the same words"]})
    monkeypatch.setattr(synth, "TURNS", dict.fromkeys(KINDS, (2, 2)))
    # b has the words and the picture of a; for the RL seed d the words alone suffice
    rows = [("a", 0, "sft"), ("b", 0, "sft"), ("c", 1, "sft"), ("d", 2, "rl"), ("e", 3, "bench")]
    write(tmp_path, *[seed(id=name, seed_id=name, image=f"{picture}.png", split=split)
                      for name, picture, split in rows], name="seeds.jsonl")
    assert {d["seed_id"] for d in make(tmp_path).values()} == {"a", "c", "e"}


def test_a_share_of_the_pictures_gets_noise_or_a_text_and_the_seed_decides(stub, tmp_path):
    write_seeds(tmp_path, 100)
    flags = "--shares 1 0 0 --perturb 0.5".split()
    texts, noises = [], []
    for d in make(tmp_path, *flags).values():
        old = np.asarray(Image.open(tmp_path / f"{d['seed_id'][1:]}.png"), float)
        for path in d["images"]:
            new = np.asarray(Image.open(tmp_path / "out" / path), float)
            if len(new) > 32:
                texts.append((new[:32] == old).all() and new[32:].min() < 100)
            elif (old != new).any():
                noises.append((new - old)[..., 1:].std() / 255)
    assert 12 < sum(texts) < 38 and 12 < len(noises) < 38 and 0.028 < np.mean(noises) < 0.032
    # everybody who is asked sees what the student will see
    shown = {request["image"] for _, _, request in stub.asked[3:] if request["image"]}
    written = (tmp_path / "out/images").glob("*.png")
    assert shown and shown <= {image_png(str(path)) for path in written}
    for number in ("0", "1"):
        make(tmp_path, *flags, "--seed", number, out=number)
    assert files_in(tmp_path / "0") == files_in(tmp_path / "out") != files_in(tmp_path / "1")


def test_resume_asks_only_for_what_failed_and_ends_with_the_same_bytes(stub, tmp_path, monkeypatch):
    """Here one reply of the blue agent has no proper tags; for kills see test_resume.py."""
    make(tmp_path, out="whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        good, bad = stub.blue({}), {"reply": "no tags"}
        patch.setattr(stub, "blue", lambda d: bad if "red_team 1: sly q6?" in str(d) else good)
        make(tmp_path)
    make(tmp_path, "--resume")
    assert [d["kind"] for d in documents(stub, "expander")] == ["red_team"]
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_the_audit_finds_a_leak_between_splits(folder):
    one, two = talk(*say("a b c d e f g h")), {**talk(*say("a b c d e")), "seed_id": "2"}
    for leak in (0, 1):
        write(folder, one, name="sft.jsonl")
        write(folder, two, {**two, "id": "3"}, *[{**one, "id": "4"}] * leak, name="bench.jsonl")
        command = [sys.executable, Path(__file__).with_name("audit.py"), folder]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == leak and f"{leak} seeds and 0 pictures" in done.stdout
    # trigrams in common: 3 of 6, 3 of 6 and 6 of 6; different words in bench: 8 of 18
    assert "Jaccard 0.67 on average" in done.stdout and "bench: distinct-1 0.444" in done.stdout
